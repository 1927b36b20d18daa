"""The losses, in chunks and by hand: values, gradients, targets that do not count, precision, memory."""

import pytest
import torch
from torch.nn import functional as F

import loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """What would fit into one chunk is computed at once, with torch's own cross-entropy."""
    monkeypatch.setattr(loss, 'CHUNK', 1)


def given(n=37, c=16, v=301, scale=3.0):
    torch.manual_seed(0)
    x, weight = scale * torch.randn(n, c), torch.randn(v, c)
    targets = torch.randint(v, (n,))
    targets[[0, 5, n - 1]] = -1
    return x.requires_grad_(), weight.requires_grad_(), targets


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction='sum')


def with_gradients(criterion, x, weight, targets):
    x.grad = weight.grad = None
    value = criterion(x, weight, targets)
    (value * 0.25).backward()  # what comes after scales it
    return value.detach(), x.grad, weight.grad


@pytest.mark.parametrize('chunk', [2**26, 384 * 36, 384 * 10, 1])  # all at once, two chunks, several, one for each token
def test_cross_entropy_is_that_of_all_logits(chunk, monkeypatch):
    monkeypatch.setattr(loss, 'CHUNK', chunk)
    for ours, theirs in zip(with_gradients(loss.cross_entropy, *given()), with_gradients(plain, *given())):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    x, weight, _ = given()
    nothing = torch.full((37,), -1)
    value, x_grad, w_grad = with_gradients(loss.cross_entropy, x, weight, nothing)
    assert value == 0 and not x_grad.any() and not w_grad.any()


def test_cross_entropy_in_bfloat16_is_as_near_as_that_of_all_logits(monkeypatch):
    monkeypatch.setattr(loss, 'CHUNK', 384 * 10)
    exact = with_gradients(plain, *given())
    with torch.autocast('cpu', torch.bfloat16):
        ours, theirs = with_gradients(loss.cross_entropy, *given()), with_gradients(plain, *given())
    for a, b, c in zip(ours, theirs, exact):
        assert a.dtype == c.dtype
        assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-6


def test_gradients_vanish_where_the_model_is_certain():
    """In bfloat16 p - 1 would be 0 or a multiple of 1/256 near p = 1."""
    x, weight, targets = torch.eye(4, requires_grad=True), (7.0 * torch.eye(4)).requires_grad_(), torch.arange(4)
    exact = with_gradients(plain, x, weight, targets)
    with torch.autocast('cpu', torch.bfloat16):
        ours = with_gradients(loss.cross_entropy, x, weight, targets)
    torch.testing.assert_close(ours[1].diagonal(), exact[1].diagonal(), rtol=0.01, atol=0)


def test_nothing_is_kept_without_gradients():
    x, weight, targets = given()
    with torch.no_grad():
        value = loss.cross_entropy(x, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(x, weight, targets))


@pytest.mark.parametrize('criterion, distance', [('mse', lambda d: d.square()), ('mae', lambda d: d.abs())])
def test_distances_from_the_one_hot_target(criterion, distance):
    x, weight, targets = given(scale=0.5)

    def by_hand(x, weight, targets):
        p = F.linear(x, weight).softmax(-1)
        return distance(p - F.one_hot(targets.clamp(min=0), len(weight)))[targets >= 0].sum()

    for ours, theirs in zip(with_gradients(loss.CRITERIA[criterion], x, weight, targets),
                            with_gradients(by_hand, x, weight, targets)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
