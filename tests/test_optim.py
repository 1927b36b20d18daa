"""Schedules pass through the points that their names promise; decay falls on matrices only."""

import math

import pytest
from test_model import FAMILIES, make

from optim import make_schedule, parameter_groups


def schedule(name, decay='linear', warmup=10):
    return make_schedule(name, 1.0, 0.1, warmup, 110, 20, decay)


@pytest.mark.parametrize('name, points', [
    ('cosine', {10: 1.0, 60: 0.55, 85: 0.1 + 0.45 * (1 - math.sqrt(0.5)), 110: 0.1, 500: 0.1}),
    ('linear', {10: 1.0, 60: 0.55, 85: 0.325, 110: 0.1, 500: 0.1}),
    ('wsd', {10: 1.0, 60: 1.0, 90: 1.0, 100: 0.55, 110: 0.1, 500: 0.1}),
    ('constant', {10: 1.0, 60: 1.0, 110: 1.0, 500: 1.0})])
def test_schedules(name, points):
    lr = schedule(name)
    assert [lr(it) for it in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])  # the warm-up never begins at 0
    assert {it: lr(it) for it in points} == pytest.approx(points)
    assert schedule(name, warmup=0)(0) == 1.0


def test_wsd_decays_by_one_minus_the_root():
    lr = schedule('wsd', decay='1-sqrt')
    assert [lr(90), lr(95), lr(110)] == pytest.approx([1.0, 0.1 + 0.9 * 0.5, 0.1])


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_decay_falls_on_matrices_only(family):
    model = make(FAMILIES[family])
    decayed, rest = parameter_groups(model, 0.1)
    assert (decayed['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed['params']) and all(p.dim() == 1 for p in rest['params'])
    assert sum(p.numel() for group in (decayed, rest) for p in group['params']) == model.count_parameters()
