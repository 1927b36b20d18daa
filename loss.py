"""
What training minimises: sums over the targets (N,), of which -1 does not count, from the states x (N, C) that the output
layer `weight` (V, C) reads.
"""

import torch
from torch.nn import functional as F

CHUNK = 2**26  # logits held at once


class LinearCrossEntropy(torch.autograd.Function):
    """
    Cross-entropy, in nats, of the logits `x @ weight.T`. All of them at once would be most of a step's memory where the
    vocabulary is large, so they are made a chunk of tokens at a time, which gives its part of the loss and, right away, of
    the gradients.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradients):
        V = len(weight)
        w = F.pad(weight.to(dtype), (0, 0, 0, -V % 128))  # matrix products are faster in such multiples
        x_grad, w_grad = [], torch.zeros_like(weight) if with_gradients else None
        loss = torch.zeros((), device=x.device)
        n_chunks = min(-(-len(x) * len(w) // CHUNK), len(x))
        for x_part, target in zip(x.to(dtype).tensor_split(n_chunks), targets.tensor_split(n_chunks)):
            logits = x_part @ w.t()
            logits[:, V:] = float('-inf')
            nats = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction='none')
            loss += nats.sum()
            if with_gradients:
                # d nats / d logits is p, and at the target p - 1, taken from the loss: p = exp(-nats), in float32
                grad = logits.softmax(-1).scatter_(1, target.clamp(min=0)[:, None], torch.expm1(-nats)[:, None].to(dtype))
                grad *= (target >= 0)[:, None]
                x_grad.append(grad @ w)
                w_grad += (grad.t() @ x_part)[:V]
        if with_gradients:
            ctx.save_for_backward(torch.cat(x_grad).type_as(x), w_grad)
        return loss

    @staticmethod
    def backward(ctx, scale):
        x_grad, w_grad = ctx.saved_tensors
        return x_grad * scale, w_grad * scale, None, None, None


def cross_entropy(x, weight, targets):
    """The negative log-likelihood of the targets, in nats; in chunks where there are more logits than one holds."""
    if len(x) * len(weight) <= CHUNK:
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction='sum')
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())


def brier_score(x, weight, targets):
    """The squared distance of the probabilities from the one-hot target, summed over the vocabulary (Brier 1950)."""
    p = F.linear(x, weight).float().softmax(-1)
    at_target = p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return ((p.square().sum(-1) - 2 * at_target + 1) * (targets >= 0)).sum()


def absolute_error(x, weight, targets):
    """The absolute distance of the probabilities from the one-hot target, summed over the vocabulary: 2 (1 - p)."""
    p = F.linear(x, weight).float().softmax(-1)
    return (2 * (1 - p.gather(1, targets.clamp(min=0)[:, None])[:, 0]) * (targets >= 0)).sum()


CRITERIA = {'cross_entropy': cross_entropy, 'mse': brier_score, 'mae': absolute_error}
