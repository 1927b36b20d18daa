"""
Parameter groups, optimizers, and learning-rate schedules.
"""

import math

import torch

from configurator import UserError


def parameter_groups(model, weight_decay):
    """Weight decay on matrices (embeddings included), none on vectors (biases and norms), as GPT-2's successors do."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]


def make_optimizer(name, model, learning_rate, beta1, beta2, weight_decay, device):
    """The optimizer called `name`; AdamW (Loshchilov and Hutter 2019) in one fused kernel where the device has it."""
    makers = {'adamw': torch.optim.AdamW}
    if name not in makers:
        raise UserError(f"optimizer='{name}' is not there; choose {', '.join(makers)}")
    fused = device.split(':')[0] in ('cpu', 'cuda')
    return makers[name](parameter_groups(model, weight_decay), lr=learning_rate, betas=(beta1, beta2), fused=fused)


def make_schedule(name, learning_rate, min_lr, warmup_iters, lr_decay_iters, wsd_decay_iters, wsd_decay):
    """
    The learning rate as a function of the iteration. All of them rise linearly over `warmup_iters`; then

    cosine    falls along half a cosine to `min_lr` at `lr_decay_iters` (Loshchilov and Hutter 2017)
    linear    falls along a line
    wsd       warm-up, stable, decay: stays, then falls over the last `wsd_decay_iters` before `lr_decay_iters`, along
              a line or along 1 - sqrt (`wsd_decay`) (Hu et al. 2024, Hägele et al. 2024)
    constant  stays

    and all stay at `min_lr` (or, constant, where they are) from `lr_decay_iters` on.
    """
    start = lr_decay_iters - wsd_decay_iters if name == 'wsd' else warmup_iters
    fall = {'cosine': lambda t: 0.5 * (1 + math.cos(math.pi * t)),
            'linear': lambda t: 1 - t,
            'wsd': (lambda t: 1 - math.sqrt(t)) if wsd_decay == '1-sqrt' else (lambda t: 1 - t),
            'constant': lambda t: 1.0}[name]  # t goes from 0 to 1 between `start` and `lr_decay_iters`

    def schedule(it):
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        t = min(max(it - start, 0) / max(lr_decay_iters - start, 1), 1.0)
        return min_lr + (learning_rate - min_lr) * fall(t)

    return schedule
