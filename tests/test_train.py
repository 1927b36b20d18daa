"""The trainer: a killed run goes on as if nothing had been, two processes are one, and its records can be relied on."""

import itertools
import json
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GPT2, TINY, losses, read_log, run, start, write_tokens


def checkpoint(out_dir, name='ckpt.pt'):
    return torch.load(out_dir / name, weights_only=True)


def assert_same(a, b):
    """Two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def test_killed_and_resumed_equals_uninterrupted(place):
    """
    kill -9 at arbitrary moments: the same losses to the last digit, the same weights and moments bit for bit. (A GPT-2;
    test_soak.py has Llamas.)
    """
    args = [*TINY, *GPT2, '--dropout=0.1', '--max_iters=60', '--checkpoint_interval=7',
            '--gradient_accumulation_steps=2']
    run('train.py', *args, '--out_dir=out/whole', cwd=place)
    out = place / 'out' / 'killed'
    resume = []
    for at_least in (8, 30):  # lines of the log; the kill falls some milliseconds later, wherever that is
        process = start('train.py', *args, '--out_dir=out/killed', *resume, cwd=place)
        while not (out / 'ckpt.pt').exists() or len((out / 'log.jsonl').read_text().splitlines()) < at_least:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.communicate()
        resume = ['--init_from=resume']
    text, _ = run('train.py', *args, '--out_dir=out/killed', *resume, cwd=place)
    assert 'resumed at iter' in text and 'changed:' not in text
    whole, killed = losses(place / 'out' / 'whole'), losses(out)
    assert whole == killed and len(whole) == 60 + 7
    a, b = checkpoint(place / 'out' / 'whole'), checkpoint(out)
    for key in ('model', 'optimizer', 'iter', 'best_val_loss', 'tokenizer', 'model_config', 'scaler'):
        assert_same(a[key], b[key])


def test_a_run_begun_on_one_process_goes_on_the_same_on_two(place):
    args = [*TINY, '--gradient_accumulation_steps=2']
    run('train.py', *args, '--out_dir=out/one', cwd=place)
    run('train.py', *args, '--max_iters=10', '--lr_decay_iters=20', '--out_dir=out/two', cwd=place)
    text, _ = run('train.py', '--out_dir=out/two', '--init_from=resume', '--max_iters=20', cwd=place, torchrun=2)
    assert 'changed: max_iters was 10, is now 20 (command line)' in text and text.count('changed:') == 1
    one, two = losses(place / 'out' / 'one'), losses(place / 'out' / 'two')
    assert one.keys() == two.keys()
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-5)


def test_two_processes_equal_one_with_accumulation_and_ragged_targets(place):
    """Whole windows without a target, and processes whose targets differ in number by far."""
    ids = np.random.default_rng(0).integers(0, 256, 3000)
    mask = np.random.default_rng(1).random(3000) < np.linspace(0, 1, 3000) ** 3
    (place / 'ragged').mkdir()
    write_tokens(place / 'ragged' / 'data', ids, ids[:500], mask)
    args = [*TINY, '--dataset=ragged/data', '--gradient_accumulation_steps=4', '--eval_iters=3']
    run('train.py', *args, '--out_dir=out/one', cwd=place)
    run('train.py', *args, '--out_dir=out/two', cwd=place, torchrun=2)
    one, two = losses(place / 'out' / 'one'), losses(place / 'out' / 'two')
    assert one.keys() == two.keys() and len(one) == 23
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-5)
    a, b = (checkpoint(place / 'out' / which)['model'] for which in ('one', 'two'))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_accumulation_changes_nothing_but_memory(place):
    """4 x 4 windows with as many targets as may be are one batch of 16: sums over counts, not a mean of means."""
    ids = np.random.default_rng(0).integers(0, 256, 3000)
    mask = np.random.default_rng(1).random(3000) < np.linspace(0, 1, 3000) ** 3
    (place / 'ragged').mkdir()
    write_tokens(place / 'ragged' / 'data', ids, mask=mask)
    for name, how in (('parts', '--batch_size=4 --gradient_accumulation_steps=4'), ('once', '--batch_size=16')):
        run('train.py', *TINY, '--dataset=ragged/data', *how.split(), f'--out_dir=out/{name}', cwd=place)
    parts, once = losses(place / 'out' / 'parts'), losses(place / 'out' / 'once')
    assert list(parts.values()) == pytest.approx(list(once.values()), rel=1e-5)


def test_the_log_says_what_happened(place):
    args = [*TINY, '--max_iters=40', '--log_interval=5', '--keep_every=20', '--learning_rate=1e-2']
    text, _ = run('train.py', *args, cwd=place)
    out = place / 'out' / 'tiny'
    log = read_log(out)
    steps, evaluations = ([r for r in log if key in r] for key in ('loss', 'val_loss'))
    assert [r['iter'] for r in steps] == list(range(0, 40, 5)) and [r['iter'] for r in evaluations] == [0, 10, 20, 30, 40]
    for r in steps:
        assert set(r) == {'iter', 'tokens', 'loss', 'lr', 'grad_norm', 'tok_per_sec', 'mfu', 'time'}
        assert r['tokens'] == (r['iter'] + 1) * 4 * 16 and r['mfu'] is None and r['tok_per_sec'] > 0
    for r in evaluations:
        assert r['val_ppl'] == pytest.approx(np.exp(r['val_loss']))
        meta = json.loads((place / 'data' / 'tiny' / 'meta.json').read_text())['files']['val.bin']
        assert r['val_bpb'] == pytest.approx(r['val_loss'] / np.log(2) * meta['tokens'] / meta['bytes'])
    assert evaluations[-1]['val_loss'] < evaluations[0]['val_loss'] - 1  # it learns
    assert steps[-1]['lr'] < 1e-2 and steps[2]['lr'] == pytest.approx(1e-2)
    best = min(evaluations, key=lambda r: r['val_loss'])
    assert checkpoint(out, 'best.pt')['iter'] == best['iter'] and f"{best['val_loss']:.4f}" in text
    assert sorted(p.name for p in out.iterdir()) == ['best.pt', 'ckpt.1.pt', 'ckpt.pt', 'ckpt_20.pt', 'ckpt_40.pt',
                                                    'log.jsonl']
    assert 'left' in text and 'python sample.py --out_dir=out/tiny' in text


def test_a_resume_says_what_differs(place):
    run('train.py', *TINY, '--max_iters=4', cwd=place)
    text, _ = run('train.py', *TINY, '--init_from=resume', '--max_iters=6', '--learning_rate=1', cwd=place)
    assert 'changed: learning_rate was 0.008, is now 1.0 (command line)' in text and 'changed: max_iters was 4' in text
    (place / 'other').mkdir()
    write_tokens(place / 'other' / 'data', np.arange(4000) % 100, np.arange(500) % 100)
    text, _ = run('train.py', '--out_dir=out/tiny', '--init_from=resume', '--max_iters=7', '--dataset=other/data', cwd=place)
    assert 'changed: the token files of other/data are not those that the run began with' in text
    assert 'changed: learning_rate' not in text  # what is not said anew is as it was


def test_torchrun_with_one_process_is_the_same_run(place):
    run('train.py', *TINY, cwd=place)
    run('train.py', *TINY, '--out_dir=out/torchrun', cwd=place, torchrun=1)
    assert losses(place / 'out' / 'tiny') == losses(place / 'out' / 'torchrun')


def test_samples_and_evaluations_touch_no_training_randomness(place):
    args = [*TINY, '--dropout=0.2']
    text, _ = run('train.py', *args, '--sample_interval=5', '--sample_prompt=import ', cwd=place)
    run('train.py', *args, '--eval_interval=7', '--out_dir=out/quiet', cwd=place)
    assert text.count('--------\nimport ') == 4
    with_samples, without = losses(place / 'out' / 'tiny'), losses(place / 'out' / 'quiet')
    assert all(with_samples[i, 'loss'] == without[i, 'loss'] for i in range(20))


def test_a_mixture_trains_and_is_evaluated_by_source(place):
    write_tokens(place / 'other', np.arange(4000) % 100, np.arange(500) % 100)
    run('train.py', *TINY, f'--dataset=tiny:0.7 {place}/other:0.3', cwd=place)
    record = read_log(place / 'out' / 'tiny')[-1]
    parts = record['val_loss/tiny'], record[f'val_loss/{place}/other']
    assert record['val_loss'] == pytest.approx(0.7 * parts[0] + 0.3 * parts[1])


def test_a_checkpoint_begins_another_run(place):
    """init_from a path: its weights and shape, but a new optimizer, step and schedule."""
    run('train.py', *TINY, '--n_layer=3', cwd=place)
    plain = [arg for arg in TINY if not arg.startswith(('--n_', '--max_iters', '--out_dir'))]
    run('train.py', *plain, '--init_from=out/tiny/ckpt.pt', '--max_iters=2', '--out_dir=out/next', cwd=place)
    before, after = read_log(place / 'out' / 'tiny'), read_log(place / 'out' / 'next')
    assert after[0]['iter'] == 0 and after[0]['val_loss'] == pytest.approx(before[-1]['val_loss'], rel=1e-6)
    assert checkpoint(place / 'out' / 'next')['model_config']['n_layer'] == 3


def test_a_branch_decays_from_the_stable_phase(place):
    """As if the run had ended there: the same losses as one run with that end, and the trunk stays as it is."""
    stable = [arg for arg in TINY if not arg.startswith(('--max_iters', '--out_dir'))]
    run('train.py', *stable, '--keep_every=10', '--max_iters=30', '--wsd_decay_iters=5', '--out_dir=out/trunk', cwd=place)
    text, _ = run('train.py', '--schedule=wsd', '--init_from=out/trunk/ckpt_10.pt', '--max_iters=18', '--device=cpu',
                  '--out_dir=out/branch', cwd=place)
    assert 'branches off at iter 10' in text
    run('train.py', *stable, '--max_iters=18', '--wsd_decay_iters=8', '--out_dir=out/whole', cwd=place)
    whole, branch = losses(place / 'out' / 'whole'), losses(place / 'out' / 'branch')
    assert branch == {key: loss for key, loss in whole.items() if key in branch} and (17, 'loss') in branch
    assert read_log(place / 'out' / 'branch')[-2]['lr'] < 0.2 * 8e-3
    saved = checkpoint(place / 'out' / 'branch')
    assert (saved['iter'], saved['config']['wsd_decay_iters'], saved['config']['init_from']) == (18, 8, 'ckpt_10.pt')
    text, _ = run('train.py', '--init_from=resume', '--max_iters=20', '--out_dir=out/branch', cwd=place)
    assert 'resumed at iter 18' in text and read_log(place / 'out' / 'branch')[-2]['lr'] > 0
    _, err = run('train.py', '--schedule=wsd', '--init_from=out/trunk/ckpt_30.pt', '--max_iters=40', '--out_dir=out/late',
                 cwd=place, code=2)
    assert 'is of step 30, its learning rate falls since step 25; branch off at an earlier one' in err
    write_tokens(place / 'other', np.arange(4000) % 100, np.arange(500) % 100)
    text, _ = run('train.py', '--schedule=wsd', '--init_from=out/trunk/ckpt_10.pt', f'--dataset={place}/other', '--max_iters=2',
                  '--warmup_iters=1', '--device=cpu', '--out_dir=out/tuned', cwd=place)
    assert 'branches' not in text and read_log(place / 'out' / 'tuned')[0]['iter'] == 0  # on other data it is a new run


def test_a_branch_that_is_resumed_with_its_recipe_keeps_its_own_decay(place):
    """What a recipe says of the whole run's end does not count for a branch, at its beginning or later."""
    (place / 'recipe.py').write_text("schedule = 'wsd'\nwsd_decay_iters = 15\n")
    args = ['recipe.py', *TINY, '--dropout=0.1']
    run('train.py', *args, '--keep_every=10', '--max_iters=30', '--out_dir=out/trunk', cwd=place)
    args += ['--init_from=auto:out/trunk/ckpt_10.pt', '--max_iters=60']
    run('train.py', *args, '--out_dir=out/whole', cwd=place)
    process = start('train.py', *args, '--out_dir=out/parts', cwd=place)
    while not process.stdout.readline().startswith('iter 11/'):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)  # which saves
    process.communicate()
    text, _ = run('train.py', *args, '--out_dir=out/parts', cwd=place)
    assert 'resumed at iter' in text and losses(place / 'out' / 'parts') == losses(place / 'out' / 'whole')


def test_auto_begins_from_a_model_with_a_shorter_context(place):
    run('train.py', *TINY, cwd=place)
    text, _ = run('train.py', *TINY, '--init_from=auto:out/tiny/ckpt.pt', '--block_size=8', '--out_dir=out/short', cwd=place)
    assert 'changed: block_size was 16, is now 8' in text and 'done: 20 iters' in text


def test_a_number_of_processes_without_torchrun_means_nothing(place):
    run('train.py', *TINY, cwd=place)
    run('train.py', *TINY, '--out_dir=out/set', cwd=place, env={'WORLD_SIZE': '4'})
    assert losses(place / 'out' / 'tiny') == losses(place / 'out' / 'set')


def test_what_training_is_told_is_felt(place):
    """Each of these changes the weights, as the setting's name says; what is not read would leave them as they are."""
    numbers = itertools.count()

    def weights(*more):
        folder = f'out/{next(numbers)}'
        run('train.py', *TINY, '--max_iters=6', '--wsd_decay_iters=4', *more, f'--out_dir={folder}', cwd=place)
        return checkpoint(place / folder)['model']['wte.weight']

    plain = weights()
    assert torch.equal(plain, weights())
    for setting in ('beta1=0.5', 'beta2=0.9', 'grad_clip=0.01', 'weight_decay=1', 'wsd_decay=1-sqrt', 'min_lr=4e-3',
                    'warmup_iters=4', 'init_std=0.03', 'seed=1'):
        assert not torch.equal(plain, weights(f'--{setting}')), setting


@pytest.mark.parametrize('how', [['--optimizer=muon', '--zero_init'], ['--optimizer=sgd', '--criterion=mse', '--n_layer=1'],
                                 ['--optimizer=adam', '--criterion=mae', '--checkpoint_activations']])
def test_two_processes_equal_one_and_a_resume_is_exact_whatever_trains(place, how):
    args = [*TINY, '--gradient_accumulation_steps=2', '--dropout=0', '--wsd_decay_iters=10', *how]
    run('train.py', *args, '--out_dir=out/one', cwd=place)
    run('train.py', *args, '--out_dir=out/two', cwd=place, torchrun=2)
    run('train.py', *args, '--max_iters=10', '--lr_decay_iters=20', '--out_dir=out/resumed', cwd=place)
    run('train.py', '--init_from=resume', '--max_iters=20', '--out_dir=out/resumed', cwd=place)
    one, two, resumed = (losses(place / 'out' / which) for which in ('one', 'two', 'resumed'))
    assert one == resumed and one[20, 'val_loss'] != one[0, 'val_loss']
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)


def test_shares_of_the_weights_train_as_one_process_does(place):
    """FSDP on 2 and 4 processes; the checkpoints are everybody's."""
    args = [*TINY, '--gradient_accumulation_steps=4', '--eval_iters=3', '--learning_rate=1e-3']
    run('train.py', *args, '--out_dir=out/one', cwd=place)
    text, _ = run('train.py', *args, '--max_iters=10', '--lr_decay_iters=20', '--fsdp', '--sample_interval=10',
                  '--checkpoint_activations', '--out_dir=out/shares', cwd=place, torchrun=2)
    assert text.count('--------') == 2
    run('train.py', '--init_from=resume', '--max_iters=15', '--fsdp', '--out_dir=out/shares', cwd=place, torchrun=4)
    run('train.py', '--init_from=resume', '--max_iters=20', '--out_dir=out/shares', cwd=place)
    one, shares = losses(place / 'out' / 'one'), losses(place / 'out' / 'shares')
    assert one.keys() == shares.keys() - {(15, 'val_loss')}
    assert [one[key] for key in one] == pytest.approx([shares[key] for key in one], rel=1e-5)
    a, b = (checkpoint(place / 'out' / which) for which in ('one', 'shares'))
    assert all(torch.allclose(a['model'][name], b['model'][name], atol=1e-5) for name in a['model'])
    for wrong, words in (('--optimizer=muon', "adamw, adam and sgd in float32 or bfloat16, and here are 'muon' and float32"),
                         ('--batch_size=auto', 'fsdp=True needs a number as batch_size, and it is auto')):
        _, err = run('train.py', *args, '--fsdp', wrong, '--out_dir=out/no', cwd=place, torchrun=2, code=1)
        assert words in err


@pytest.mark.skipif(sys.platform != 'linux', reason="a process's peak memory is read from /proc")
def test_the_micro_batch_that_fits_is_found_and_the_step_stays(place):
    args = [*TINY, '--gradient_accumulation_steps=2']
    run('train.py', *args, '--out_dir=out/given', cwd=place)
    text, _ = run('train.py', *args, '--batch_size=auto', '--out_dir=out/found', cwd=place)
    assert 'micro-steps 1 x windows 8 x' in text
    given, found = losses(place / 'out' / 'given'), losses(place / 'out' / 'found')
    assert given.keys() == found.keys() and list(given.values()) == pytest.approx(list(found.values()), rel=1e-4)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_mixed_precision_comes_close_to_float32(place, dtype):
    run('train.py', *TINY, cwd=place)
    run('train.py', *TINY, f'--dtype={dtype}', '--out_dir=out/mixed', cwd=place)
    full, mixed = losses(place / 'out' / 'tiny'), losses(place / 'out' / 'mixed')
    assert list(full.values()) == pytest.approx(list(mixed.values()), rel=1e-2) and full != mixed
    scaler, model = (checkpoint(place / 'out' / 'mixed')[key] for key in ('scaler', 'model'))
    assert bool(scaler) == (dtype == 'float16') and all(p.dtype == torch.float32 for p in model.values())


@pytest.mark.slow
def test_compiled_equals_eager_or_says_why_not(place, tmp_path):
    run('train.py', *TINY, cwd=place)
    broken = {'CXX': str(tmp_path / 'none'), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)}  # which torch reads when imported
    for name, env in (('compiled', {}), ('no_compiler', broken)):
        process = start('train.py', *TINY, '--compile=True', f'--out_dir=out/{name}', cwd=place, env=env)
        text, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert ('compile: does not work here, going on without it' in text) != (', compiled' in text)
        assert name == 'compiled' or 'going on without' in text
        eager, compiled = losses(place / 'out' / 'tiny'), losses(place / 'out' / name)
        assert list(eager.values()) == pytest.approx(list(compiled.values()), rel=1e-4)
        weights = checkpoint(place / 'out' / name)['model']
        assert not any('_orig_mod' in key for key in weights)


def test_wandb_gets_the_log_and_its_absence_stops_nothing(place):
    pytest.importorskip('wandb')
    run('train.py', *TINY, '--wandb_log', '--wandb_project=ours', '--wandb_run_name=this_one', cwd=place)
    written, = (place / 'out' / 'tiny' / 'wandb').glob('offline-run-*/*.wandb')
    assert b'ours' in written.read_bytes() and b'this_one' in written.read_bytes()
    nobody = {'WANDB_MODE': 'online', 'WANDB_BASE_URL': 'http://127.0.0.1:9', 'WANDB_API_KEY': 'x' * 40,
              'WANDB_INIT_TIMEOUT': '3', 'WANDB_HTTP_TIMEOUT': '1'}
    text, _ = run('train.py', *TINY, '--wandb_log', '--out_dir=out/alone', cwd=place, env=nobody)
    assert 'offline; `wandb sync' in text
    assert losses(place / 'out' / 'alone') == losses(place / 'out' / 'tiny')


def test_missing_data_with_a_recipe_is_prepared_first(tmp_path):
    text, _ = run('train.py', *TINY, '--dataset=owl', '--max_iters=3', cwd=tmp_path)
    assert 'data/owl is not there yet: preparing it with data/owl.py' in text
    assert sorted(os.listdir(tmp_path / 'data' / 'owl')) == ['meta.json', 'sources.tsv', 'tokenizer.state.json', 'train.bin']
