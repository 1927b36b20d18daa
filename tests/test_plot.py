"""plot.py and the pictures that runs leave: what they show is what was logged."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import TINY, read_log, run

import curves


def plot(*args, cwd, code=0, **kwargs):
    out, err = run('plot.py', *args, cwd=cwd, code=code, **kwargs)
    return out if code == 0 else err


@pytest.fixture(scope='module')
def runs(prepared, tmp_path_factory):
    """Two runs, the second stopped and resumed."""
    place = tmp_path_factory.mktemp('runs')
    (place / 'data').symlink_to(prepared / 'data')
    run('train.py', *TINY, '--out_dir=out/a', '--picture=True', cwd=place)
    run('train.py', *TINY, '--max_iters=10', '--out_dir=out/b', cwd=place)
    run('train.py', *TINY, '--init_from=resume', '--learning_rate=1e-3', '--out_dir=out/b', cwd=place)
    return place


def test_a_run_leaves_a_picture(runs):
    assert (runs / 'out' / 'a' / 'loss.png').read_bytes()[:4] == b'\x89PNG' and not (runs / 'out' / 'b' / 'loss.png').exists()


@pytest.mark.parametrize('x, label', [('step', 'steps'), ('tokens', 'tokens'), ('time', 'hours'), ('flops', 'FLOPs')])
def test_several_runs_in_one_picture(runs, x, label):
    out = plot('out/a', 'out/b', f'--x={x}', f'--picture={x}.svg', cwd=runs)
    tree = ElementTree.parse(runs / f'{x}.svg')
    shown = [text.strip() for text in tree.getroot().itertext() if text.strip()]
    assert {'a', 'b', label, 'learning rate', 'tokens per second', 'norm of the gradient'} <= set(shown)
    assert out.startswith(f'{x}.svg: 2 runs over {label}\n')


@pytest.mark.filterwarnings('error')
def test_a_run_of_one_loss_is_drawn(tmp_path):
    records = [{'iter': 0, 'tokens': 0, 'val_loss': 5.0, 'time': 0.1},
               {'iter': 0, 'tokens': 64, 'loss': 4.0, 'lr': 1e-3, 'grad_norm': 1.0, 'tok_per_sec': 9.0, 'time': 0.2}]
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    curves.draw([curves.read(str(tmp_path))], str(tmp_path / 'loss.png'))
    assert (tmp_path / 'loss.png').read_bytes()[:4] == b'\x89PNG'


def test_the_table_is_of_the_log(runs):
    out = plot('out/b', '--text', cwd=runs)
    log = read_log(runs / 'out' / 'b')
    losses, evaluations = ([r for r in log if key in r] for key in ('loss', 'val_loss'))
    row = out.splitlines()[-1].split()
    assert [r['iter'] for r in losses] == list(range(20))  # resumed, and one curve
    assert row[:3] == ['b', '20', f'{20 * 64:,}']
    assert row[3] == f"{np.mean([r['loss'] for r in losses[-10:]]):.4f}" and row[4] == f"{evaluations[-1]['val_loss']:.4f}"
    assert row[5] == f"{min(r['val_loss'] for r in evaluations):.4f}"


def test_in_the_terminal_the_curve_falls(runs):
    lines = plot('out/a', '--text', cwd=runs).splitlines()
    marks = {column: row for row, line in enumerate(lines[:20]) for column, mark in enumerate(line[10:]) if mark == '*'}
    first, last = marks[min(marks)], marks[max(marks)]
    assert first < 5 and last > 12 and 'o validation' in lines[22]
    assert re.match(r' +[\d.]+ \|', lines[0])


def test_without_matplotlib_it_says_so_and_draws_in_the_terminal(runs, tmp_path):
    (tmp_path / 'matplotlib.py').write_text('raise ImportError')
    env = {'PYTHONPATH': str(tmp_path)}
    assert 'needs a package: pip install matplotlib' in plot('out/a', cwd=runs, code=2, env=env)
    assert 'o validation' in plot('out/a', '--text', cwd=runs, env=env)


@pytest.mark.parametrize('args, words', [
    ('out/none', 'out/none: there is no such folder'), ('data', 'there is no log.jsonl with a training step in it'),
    ('out/a --picture=a.bmp2', "a picture's name ends with .png or .svg"),
    ('out/a --smoothing=1', 'smoothing=1.0 is not within'),
    ('out/a --picture=no/where.png', "'no/where.png' cannot be written"), ('out/a --x=stpe', 'did you mean step?')])
def test_refused(runs, args, words):
    err = plot(*args.split(), cwd=runs, code=2)
    assert words in err and len(err.splitlines()) == 1


def test_flops_need_the_checkpoint(runs, tmp_path):
    (tmp_path / 'log.jsonl').write_text((runs / 'out' / 'a' / 'log.jsonl').read_text())
    assert "x='flops' needs the run's ckpt.pt" in plot(str(tmp_path), '--x=flops', cwd=runs, code=2)
    plot(str(tmp_path), '--picture=alone.png', cwd=runs)


def test_a_log_that_lacks_much_is_drawn_as_far_as_it_goes(tmp_path):
    records = [{'iter': 0, 'tokens': 5, 'loss': 3.0, 'time': 1}, {'iter': 1, 'tokens': 10, 'loss': float('nan'), 'time': 2},
               {'iter': 2, 'tokens': 15, 'loss': 2.0, 'grad_norm': 0.0, 'time': 3}, {'iter': 3, 'loss': 1.0}]
    (tmp_path / '_$x').mkdir()
    (tmp_path / '_$x' / 'log.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    for how in ('--text', '--picture=a.svg', '--x=time'):
        row = plot('_$x', '_$x', how, cwd=tmp_path).splitlines()[-1].split()
        assert row == ['_$x', '2', '15', '2.5000', '0.00']
    assert '_$x' in ''.join(ElementTree.parse(tmp_path / 'a.svg').getroot().itertext())


def test_smoothing_keeps_a_line_and_a_mean():
    line = list(np.linspace(5, 1, 101))
    smoothed = curves.smooth(line, 0.1)
    assert smoothed[20:80] == pytest.approx(line[20:80])  # no lag
    assert curves.smooth([3.0] * 7, 0.5) == [3.0] * 7 and curves.smooth(line, 0) == pytest.approx(line)
