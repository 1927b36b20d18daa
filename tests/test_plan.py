"""plan.py: its memory is what autograd keeps, its laws are the papers', what was published comes out, its recipe trains."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from conftest import GPT2, ROOT, TINY, run, start

import costs
import scaling
from device import autocast
from model import ModelConfig, Transformer

LLAMA = dict(n_head=4, n_embd=128, n_inner=384, norm='rmsnorm', mlp='swiglu', pos='rope', bias=False, vocab_size=300)
SHAPES = {
    'llama': LLAMA, 'grouped': LLAMA | {'n_kv_head': 1},
    'gpt2': dict(n_head=4, n_embd=128, norm='layernorm', mlp='gelu', pos='learned', vocab_size=300),
}


def kept(shape, dtype, checkpoint_activations):
    """Bytes that autograd keeps for the backward pass of 2 windows, weights and constants apart."""
    model = Transformer(shape)
    model.checkpoint_activations = checkpoint_activations
    ours, storages, tensors = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)  # so that no other gets its place
        return tensor

    idx = torch.randint(shape.vocab_size, (2, shape.block_size))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast('cpu', dtype):
        model(idx, idx)
    return sum(storages.values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('block_size', [512, 1280])  # attention in blocks, and torch's own
@pytest.mark.parametrize('name', SHAPES)
def test_the_activations_are_those_that_autograd_keeps(name, block_size, dtype):
    one, three = (ModelConfig(**SHAPES[name], block_size=block_size, n_layer=n) for n in (1, 3))
    a_layer = (kept(three, dtype, False) - kept(one, dtype, False)) / 2 / (2 * block_size)  # bytes of a token
    width = 4 if dtype == 'float32' else 2
    if width == 2:  # the weights in bfloat16 are kept too, and are a part of their own
        a_layer -= 2 * sum(p.numel() for p in Transformer(one).h.parameters() if p.dim() == 2) / (2 * block_size)
    assert costs.layer_bytes(one, width, on_cpu=True) == pytest.approx(a_layer, rel=0.08)


def test_checkpointed_activations_are_an_input_a_layer():
    one, three = (ModelConfig(**LLAMA, block_size=256, n_layer=n) for n in (1, 3))
    assert (kept(three, 'float32', True) - kept(one, 'float32', True)) / 2 / 512 == pytest.approx(4 * one.n_embd, rel=0.02)
    whole, less = (costs.memory(Transformer(three), 2, 'float32', 'adamw', True, checkpoint)['activations']
                   for checkpoint in (False, True))
    assert less < whole / 2


def plan(*args, cwd=ROOT, code=0):
    out, err = run('plan.py', *args, cwd=cwd, code=code)
    return out if code == 0 else err


@pytest.mark.parametrize('config, parameters', [
    ('gpt2', '124,439,808'), ('gpt51m_bookcorpus', '51,008,512'), ('llamacraft437m', '437,584,896'),
    ('smollm135m', '134,515,008'), ('minueza32m_base', '32,792,760')])
def test_recipes_have_the_published_sizes(config, parameters):
    assert f'model: {parameters} parameters' in plan(f'config/{config}.py')


def test_what_was_published_comes_out():
    """14 hours and $4.73 on an A10G; 4 days on 8 A100s at the 30% of their peak that nanoGPT reached; a day on a V100."""
    out = plan('config/smollm135m.py', '--device_name=a10g', '--price=0.3377')
    hours, dollars = map(float, re.search(r'fits; ([\d.]+) hours, \$([\d.]+) for', out).groups())
    assert hours == pytest.approx(14, rel=0.1) and dollars == pytest.approx(4.73, rel=0.1)
    out = plan('config/gpt2.py', '--device_name=A100', '--devices=8', '--mfu=0.3')
    assert float(re.search(r'fits; ([\d.]+) days', out)[1]) == pytest.approx(4, rel=0.1)
    out = plan('config/gpt51m_bookcorpus.py', '--device_name=v100')
    assert float(re.search(r'fits; ([\d.]+) hours', out)[1]) < 24


@pytest.mark.parametrize('name', scaling.LAWS)
def test_the_optimum_is_where_the_loss_is_least(name):
    law, n = scaling.LAWS[name], np.geomspace(1e6, 1e9, 20_000)
    assert law.optimum(3.2e17)[0] == pytest.approx(n[law.loss(n, 3.2e17 / 6 / n).argmin()], rel=1e-3)
    best_n, best_d = law.optimum(3.2e17)
    assert best_n == pytest.approx(50e6, rel=0.12) and best_d == pytest.approx(1.1e9, rel=0.12)  # the 51M write-up's choice
    assert 6 * best_n * best_d == pytest.approx(3.2e17)


def test_the_51m_model_is_the_nearest_shape():
    out = plan('config/gpt51m_bookcorpus.py', '--flops=3.2e17', '--law=hoffmann')
    assert re.search(r'hoffmann +48.2M +1.11B +23.0 +3.888 +8 layers, 8 heads, 512 wide +51M +1.04B', out)
    assert re.search(r'SmolLM2-135M \(released\) +135M +2T +14,868', out)


def test_budgets_in_hours_and_dollars_are_one():
    by_hours = plan('--hours=10', '--device_name=v100', '--price=2', '--mfu=0.4')
    by_dollars = plan('--dollars=20', '--device_name=V100', '--price=2', '--mfu=0.4')
    bought = f'{36000 * 125e12 * 0.4:.3g} FLOPs: 10.0 hours, $20.00 for $2 an hour'
    assert by_hours == by_dollars and by_hours.startswith(bought)


def test_the_recipe_it_writes_trains(place):
    out = plan('--flops=3e12', '--vocab_size=257', '--block_size=32', '--dataset=tiny', '--write=mine.py', '--plot=budget.svg',
               cwd=place)
    shown = ''.join(ElementTree.parse(place / 'budget.svg').getroot().itertext())
    assert 'the budget' in shown and 'best sizes by hoffmann' in shown
    n, d = scaling.LAWS['besiroglu'].optimum(3e12)
    text, _ = run('train.py', 'mine.py', '--max_iters=2', '--device=cpu', '--picture=False', cwd=place)
    size = int(re.match(r'([\d,]+) parameters', text)[1].replace(',', ''))
    assert size == pytest.approx(n, rel=0.5) and 'python plan.py mine.py' in out
    tokens = int(re.search(r'= ([\d,]+), [\d.]+ per parameter; [\d.]+ epochs', plan('mine.py', cwd=place))[1].replace(',', ''))
    work = float(re.search(r'work: ([\d,]+) FLOPs', plan('mine.py', cwd=place))[1].replace(',', ''))
    assert tokens * work == pytest.approx(3e12, rel=0.05)
    several = plan(str(ROOT / 'config' / 'minueza32m_base.py'), '--hours=2', '--device_name=h100', '--devices=3',
                   '--optimizer=muon', '--write=several.py', cwd=place)  # for three, with what is particular to its model
    assert 'python plan.py several.py --device_name=h100 --devices=3' in several
    again = plan('several.py', '--device_name=h100', '--devices=3', cwd=place)
    assert float(re.search(r'fits; ([\d.]+) (hours|minutes)', again)[1]) == pytest.approx(2, rel=0.15)
    text = (place / 'several.py').read_text()
    assert 'sliding_window = 1024' in text and "optimizer = 'muon'" in text and 'torchrun --nproc_per_node=3' in text
    assert 'is there already' in plan('--flops=3e12', '--write=mine.py', cwd=place, code=2)


def test_a_fit_finds_the_law_behind_the_runs():
    law, rng = scaling.LAWS['besiroglu'], np.random.default_rng(0)
    n, d = map(np.ravel, np.meshgrid(np.geomspace(4e6, 4e8, 4), np.geomspace(1e8, 1e10, 3)))
    found, _ = scaling.fit(n, d, law.loss(n, d), resamples=0)
    assert found.alpha == pytest.approx(law.alpha, rel=1e-3) and found.E == pytest.approx(law.E, rel=1e-3)
    noisy = law.loss(n, d) * np.exp(0.003 * rng.normal(size=len(n)))
    noisy[5] *= 1.2  # a run that went wrong moves it little
    found, spread = scaling.fit(n, d, noisy, resamples=20)
    assert found.loss(1e9, 2e10) == pytest.approx(law.loss(1e9, 2e10), rel=0.02)
    low, high = scaling.interval(other.loss(1e9, 2e10) for other in spread)
    assert low < high
    alone, _ = scaling.fit(np.full(4, 1e7), np.geomspace(1e8, 1e10, 4), law.loss(1e7, np.geomspace(1e8, 1e10, 4)), resamples=0)
    assert alone.A == 0 and alone.loss(1e7, 1e11) == pytest.approx(law.loss(1e7, 1e11), rel=1e-3)


@pytest.mark.slow
def test_a_law_of_ones_own_runs(place):
    """Nine real runs, and a larger one that the fit has not seen."""
    for width in (16, 32, 64):
        for steps in (10, 20, 40):
            run('train.py', *TINY, f'--n_embd={width}', f'--max_iters={steps}', f'--out_dir=out/s_{width}_{steps}', cwd=place)
    run('train.py', *TINY, '--n_embd=96', '--max_iters=40', '--out_dir=out/held', cwd=place)
    run('train.py', *TINY, '--n_embd=96', '--max_iters=0', '--out_dir=out/s_nothing', cwd=place)
    out = plan('--fit=out/*', '--check=out/held/', '--n_embd=128', '--plot=law.png', cwd=place)
    assert out.count('out/held') == 1  # what is checked is not fitted
    assert 'L(N, D) = E + A / N^alpha + B / D^beta' in out and 'the middle 80% of 400 fits' in out
    assert re.search(r'out/held, left out: .* predicted \(.* to .*\), [\d.]+ reached', out)
    assert 'these settings: ' in out and (place / 'law.png').read_bytes()[:4] == b'\x89PNG'
    out = plan('--fit=out/s_*', '--flops=1e12', '--write=own.py', cwd=place)
    assert re.search(r'\nfit +', out) and 'SmolLM2' not in out
    assert "dataset = 'tiny'" in (place / 'own.py').read_text() and 'vocab_size = 257' in (place / 'own.py').read_text()
    assert '3 finished runs of 1 sizes and 3 lengths are too few' in plan('--fit=out/s_32_*', cwd=place, code=2)


@pytest.mark.parametrize('args, words', [
    ('--device_name=h10', 'is none of B200, H200'), ('--dollars=5', 'dollars=5 needs a --device_name and a --price'),
    ('--flops=1e17 --hours=3', 'flops and hours are budgets'), ('--fit=out/none*', 'finds no finished run'),
    ('--law=fit --flops=1e17', "law='fit' needs runs"), ('--mfu=35', 'mfu=35.0 is a share of the peak'),
    ('--devices=3', '= 16 windows do not divide over 3 processes; make the product a multiple of 3'),
    ('--flops=1e17 --plot=a.gif2', "a picture's name ends with"),
    ('--flops=1e17 --write=no/such.py', 'is no name for a Python file in a folder that is there'),
    ('--dataset=unknown', 'is not prepared here; give a number'),
    ('--flops=5', 'too few to train anything'), ('--flops=1e30', 'beyond any model'),
    ('--flops=1e15 --n_head=0', 'n_head 0 is less than 1'), ('--plot=a.png', "needs --fit='out/sweep_*' or a budget"),
    ('--flops=1e17 --write=/proc/a.py', 'cannot be written'), (f'{ROOT}/config/owl_sft.py', 'name the recipe that trains it')])
def test_refused(args, words, tmp_path):
    err = plan(*args.split(), cwd=tmp_path, code=2)
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_what_training_takes_is_planned_and_said(place):
    """In a process of its own, whose memory is its own. No clock is asked: LOG.md has how near the time comes."""
    args = [*TINY, *GPT2, '--n_embd=128', '--n_layer=4', '--block_size=128', '--batch_size=32', '--max_iters=5']
    process = start('train.py', *args, cwd=place)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert re.search(r'plan: memory [\d.]+ [MG]B \(weights', out) and re.search(r'plan: \d+ s by the first steps', out)
    taken, planned = (float(size) * {'M': 1e6, 'G': 1e9}[unit] for size, unit in re.findall(
        r'([\d.]+) ([MG])B', re.search(r'this took \d+ s \(planned: \d+ s\) and (.*)', out)[1]))
    assert planned == pytest.approx(taken, rel=0.4)
    out = plan(*(arg for arg in args if not arg.startswith('--picture')), '--device_name=here', '--seconds=1', cwd=place)
    assert re.search(r'here, .*, \d+ GB: fits; .* at [\d,]+ tokens a second, measured', out)
    assert 'does not fit' in plan('--device_name=here', '--device_memory=0.001', cwd=place)
