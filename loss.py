"""
What training minimises: sums over the targets (N,), of which -1 does not count, from the states x (N, C) that the output
layer `weight` (V, C) reads. And what preference tuning minimises, from the targets' log-probabilities.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

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


def token_nats(x, weight, targets):
    """The negative log-likelihood of each target (N,), in nats, 0 for -1; its logits are made again in the backward pass."""
    def part(x, target):
        return F.cross_entropy(F.linear(x, weight).float(), target, ignore_index=-1, reduction='none')

    n_chunks = min(-(-len(x) * len(weight) // CHUNK), len(x))
    if n_chunks <= 1:
        return part(x, targets)
    return torch.cat([recompute(part, *chunk, use_reentrant=False)
                      for chunk in zip(x.tensor_split(n_chunks), targets.tensor_split(n_chunks))])


def conversation_log_probs(nats, begins, most):
    """Log-probabilities of a row's conversations (R, most), 0 where there are fewer: sums of their tokens' -`nats` (R, T)."""
    number = (begins.cumsum(1) - 1).clamp(min=0)
    return torch.zeros(len(nats), most, device=nats.device).scatter_add(1, number, -nats)


def preference(nats, begins, reference, beta, label_smoothing):
    """
    Direct preference optimisation: -log sigmoid(reward of the chosen - reward of the rejected), summed over the pairs, where a
    reward is `beta` times how much likelier an answer is than the reference has it (Rafailov et al. 2023, eq. 7). A share
    `label_smoothing` of the pairs is taken to be the wrong way around (Mitchell 2023, conservative DPO).

    `nats` (2R, T) of the targets, `begins` (2R, T) where conversations begin, `reference` (2R, K) log-probabilities; rows are
    chosen and rejected in turn. Returns the loss and the sums of rewards, chosen and rejected, and of pairs in the right order.
    """
    reward = beta * (conversation_log_probs(nats, begins, reference.size(1)) - reference)
    chosen, rejected = reward[0::2], reward[1::2]
    margin = chosen - rejected
    is_pair = torch.arange(margin.size(1), device=margin.device) < begins[0::2].sum(1, keepdim=True)
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    figures = [(part * is_pair).sum() for part in (chosen, rejected, margin > 0)]
    return (losses * is_pair).sum(), torch.stack(figures).detach()


CRITERIA = {'cross_entropy': cross_entropy, 'mse': brier_score, 'mae': absolute_error}
