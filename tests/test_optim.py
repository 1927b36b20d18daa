"""Schedules pass through the points that their names promise; decay falls on matrices only; optimizers do what they say."""

import copy
import math

import pytest
import torch
from test_model import FAMILIES, make

from configurator import UserError
from optim import make_optimizer, make_schedule, parameter_groups


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
    decayed, rest = parameter_groups(list(model.parameters()), 0.1)
    assert (decayed['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed['params']) and all(p.dim() == 1 for p in rest['params'])
    assert sum(p.numel() for group in (decayed, rest) for p in group['params']) == model.count_parameters()


def gradients(model, seed):
    torch.manual_seed(seed)
    idx = torch.randint(model.config.vocab_size, (2, 9))
    model(idx[:, :-1], idx[:, 1:]).backward()


def optimizer(name, model, device='cpu'):
    return make_optimizer(name, model, 1e-2, 0.9, 0.95, 0.95, 0.1, device)


@pytest.mark.parametrize('name', ['adamw', 'adam', 'sgd'])
def test_optimizers_are_torchs(name):
    ours, theirs = make(FAMILIES['llama']), make(FAMILIES['llama'])
    theirs.load_state_dict(ours.state_dict())
    groups = parameter_groups(list(theirs.parameters()), 0.1)
    opt = {'adamw': lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)),
           'adam': lambda: torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.95)),
           'sgd': lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.95)}[name]()
    for model, o in ((ours, optimizer(name, ours)), (theirs, opt)):
        for step in range(3):
            gradients(model, step)
            o.step()
            o.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_muon_moves_each_matrix_along_an_orthogonal_one_and_adamw_the_rest(family):
    """By hand: query, key, value, gate and up each on their own; the step's size is that of an AdamW step."""
    model = make(FAMILIES[family])
    c, before = model.config, {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = optimizer('muon', model)
    gradients(model, 0)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.step()
    opt.zero_grad()
    heads = [c.n_embd, *2 * [c.n_kv_head * c.head_size]]
    for name, p in model.named_parameters():
        assert p.grad is None
        if not (name.startswith('h.') and p.dim() == 2):
            decay = 1 - 1e-2 * (0.1 if p.dim() == 2 else 0)
            step = grads[name] / (grads[name].abs() + 1e-8)  # AdamW's first
            torch.testing.assert_close(p.detach(), before[name] * decay - 1e-2 * step, rtol=1e-4, atol=1e-5)
            continue
        sizes = heads if 'c_attn' in name else 2 * [c.n_inner] if 'c_gate_up' in name else [len(p)]
        for old, new, grad in zip(*(part.split(sizes) for part in (before[name], p.detach(), grads[name]))):
            step = (old * (1 - 1e-2 * 0.1) - new) / (1e-2 * 0.2 * max(old.shape) ** 0.5)
            u, s, vt = torch.linalg.svd(grad, full_matrices=False)
            kept = s > 1e-2 * s.max()  # the iteration brings singular values near 1, from what is not too small
            assert ((u.T @ step @ vt.T).diagonal()[kept] - 0.95).abs().max() < 0.35
            assert kept.sum() > 2 and step.norm() < 1.3 * min(old.shape) ** 0.5


def test_muon_goes_on_from_its_state():
    models, opts = [make(FAMILIES['llama']) for _ in 'ab'], []
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        opts.append(optimizer('muon', model))
    for step in range(2):
        gradients(models[0], step)
        opts[0].step()
        opts[0].zero_grad()
    models[1].load_state_dict(models[0].state_dict())
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()) | {'param_groups': opts[1].state_dict()['param_groups']})
    for model, opt in zip(models, opts):
        for group in opt.param_groups:  # as the schedule does, after the state was loaded
            group['lr'] = 3e-3
        gradients(model, 7)
        opt.step()
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.equal(a, b)


def test_what_is_not_there_is_said(monkeypatch):
    model = make(FAMILIES['llama'])
    with pytest.raises(UserError, match="optimizer='adamw8bit' runs on CUDA only, and device is cpu"):
        optimizer('adamw8bit', model)
    monkeypatch.delattr(torch.optim, 'Muon')
    with pytest.raises(UserError, match="optimizer='muon' needs torch 2.9 or newer"):
        optimizer('muon', model)
