"""sample.py: a checkpoint is all that it needs, samples are their seeds', and what is left out is said."""

import re
import shutil

import pytest
from conftest import ROOT, TINY, losses, run


@pytest.mark.slow
def test_the_owl_is_recited_from_its_first_words(place):
    """config/mini_owl.py as written, then greedy sampling, from the checkpoint alone."""
    run('train.py', str(ROOT / 'config' / 'mini_owl.py'), '--sample_interval=0', cwd=place)
    bare = place / 'elsewhere'  # no data, no log: a checkpoint needs nothing beside it
    bare.mkdir()
    shutil.copy(place / 'out' / 'mini_owl' / 'ckpt.pt', bare / 'owl.pt')
    story = (ROOT / 'data' / 'owl.txt').read_text()
    (bare / 'beginning.txt').write_text('In the bakery')
    greedy = ('--init_from=owl.pt', '--temperature=0')
    out, _ = run('sample.py', *greedy, '--prompt=In the bakery', cwd=bare)
    assert out == story + '\n'  # it begins with the prompt, and ends at end-of-text
    out, _ = run('sample.py', *greedy, '--prompt_file=beginning.txt', '--max_new_tokens=50', cwd=bare)
    assert out == story[:len('In the bakery') + 50] + '\n'


def test_seeds_and_several_samples(place):
    run('train.py', *TINY, cwd=place)
    args = ('--out_dir=out/tiny', '--prompt=def ', '--max_new_tokens=30', '--temperature=1.5')
    three, _ = run('sample.py', *args, '--num_samples=3', cwd=place)
    samples = three.split('\n--------\n')
    assert len(samples) == 3 and len(set(samples)) == 3 and all(s.startswith('def ') for s in samples)
    assert run('sample.py', *args, cwd=place)[0].rstrip('\n') == samples[0].rstrip('\n')
    assert run('sample.py', *args, '--seed=1338', cwd=place)[0].rstrip('\n') == samples[1].rstrip('\n')
    assert len(run('sample.py', *args, '--prompt=', cwd=place)[0]) > 5  # from end-of-text
    (place / 'prompts.txt').write_text('import os\n\ndef \n')
    both, _ = run('sample.py', *args[:1], *args[2:], '--prompts_file=prompts.txt', '--num_samples=2', cwd=place)
    both = both.rstrip('\n').split('\n--------\n')
    assert both[2:] == [sample.rstrip('\n') for sample in samples[:2]]  # whatever is continued beside it
    assert both[0].startswith('import os') and both[1].startswith('import os') and both[0] != both[1]


def test_stops_lengths_and_what_is_said_of_the_context(place):
    run('train.py', *TINY, cwd=place)
    args = ('--out_dir=out/tiny', '--temperature=0')
    text, notes = run('sample.py', *args, '--prompt=def ', '--max_new_tokens=12', cwd=place)
    assert notes == '' and len(text) == len('def ') + 12 + 1
    cut = text[8:11]
    stopped, _ = run('sample.py', *args, '--prompt=def ', '--max_new_tokens=12', f'--stop=never|{cut}', cwd=place)
    assert stopped == 'def ' + text[4:text.index(cut, 4)] + '\n'
    assert run('sample.py', *args, '--prompt=def ', '--max_new_tokens=0', cwd=place)[0] == 'def \n'
    _, notes = run('sample.py', *args, '--prompt=def ', '--max_new_tokens=40', cwd=place)
    assert notes == ('note: the text came to 44 tokens, and the model sees 16: each time that these were full, the oldest 4 '
                     'dropped out of its sight\n')
    _, notes = run('sample.py', *args, '--prompt=' + 'x' * 50, '--max_new_tokens=4', cwd=place)
    assert notes == 'note: the prompt has 50 tokens, and the model sees 16: the first 36 are left out\n'


@pytest.mark.slow
def test_bench_prints_the_speed_of_training_first(place):
    pytest.importorskip('transformers')
    out, _ = run('bench.py', *TINY, '--vs=transformers', '--rounds=2', '--steps=3', cwd=place)
    first, *rest = out.splitlines()
    assert re.fullmatch(r'[\d,.]+ tok/s', first)
    assert 'steps of 4 x 16 tokens' in rest[0] and 'data of tiny' in rest[0]
    seconds = dict(re.findall(r'(\w+) ([\d.]+)', rest[1].partition(';')[2]))
    step = float(re.match(r'step: ([\d.]+) s', rest[1])[1])
    assert list(seconds) == ['forward', 'backward', 'optimizer', 'data']
    assert sum(map(float, seconds.values())) < 1.5 * step + 0.01
    assert 'that matrix products in float32 reach here' in rest[2] and ' GB at most' in rest[3]
    assert rest[4].startswith('sourdough, float32: ') and rest[5].startswith('transformers, float32: ') and len(rest) == 6
    out, _ = run('bench.py', '--n_layer=1', '--n_embd=32', '--dataset=none', '--device=cpu', '--rounds=1', cwd=place)
    assert 'random tokens, since data/none is not there' in out
    _, err = run('bench.py', *TINY, '--batch_size=auto', cwd=place, code=2)
    assert 'batch_size=auto is for train.py' in err
    _, err = run('bench.py', *TINY, '--vs=nowhere', cwd=place, code=2)
    assert 'there is no nowhere/model.py' in err and 'cannot be measured' in err


def test_bench_prints_its_figure_first(place):
    run('train.py', *TINY, '--block_size=64', cwd=place)
    out, _ = run('bench.py', '--task=sample', '--init_from=out/tiny', '--max_new_tokens=40', '--rounds=1', '--compile=False',
                 '--vs=transformers', cwd=place)
    first, about, *_, theirs = out.splitlines()
    assert re.fullmatch(r'[\d,]+\.\d tok/s', first) and 'batch 1, 16 + 40 tokens' in about
    assert re.fullmatch(r'transformers .*, bfloat16: .* tok/s \(.*\); ours is .* times as fast', theirs)


def test_a_model_is_watched_as_it_grows(place):
    run('train.py', *TINY, '--keep_every=10', cwd=place)
    out, _ = run('sample.py', '--compare=out/tiny/ckpt_*.pt', '--prompt=def ', '--max_new_tokens=8', cwd=place)
    first, second = out.split('======== ')[1:]
    loss = {it: value for (it, kind), value in losses(place / 'out' / 'tiny').items() if kind == 'val_loss'}
    for it, part in ((10, first), (20, second)):
        head, text = part.split('\n', 1)
        assert head.startswith(f'out/tiny/ckpt_{it}.pt: step {it}, ') and text.startswith('def ')
        assert head.endswith(f', validation loss {loss[it]:.4f}')
    assert first.split('\n', 1)[1] == run('sample.py', '--init_from=out/tiny/ckpt_10.pt', '--prompt=def ', '--max_new_tokens=8',
                                          cwd=place)[0]
