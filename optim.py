"""
Parameter groups, optimizers, and learning-rate schedules.
"""

import math

import torch

from configurator import UserError


def parameter_groups(params, weight_decay):
    """Weight decay on matrices (embeddings included), none on vectors (biases and norms), as GPT-2's successors do."""
    return [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]


class Muon:
    """
    Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for all the rest, as if they were one optimizer.

    Muon's step is its momentum made orthogonal, so that no direction of a matrix is left behind. It is scaled to the size
    of AdamW's steps (Liu et al. 2025, `match_rms_adamw`): both take the same learning rate and weight decay. Matrices that
    are joined for speed only (query, key and value; gate and up) take a step each.
    """

    def __init__(self, model, learning_rate, weight_decay, betas, momentum, fused):
        c = model.config
        joined = {'c_attn': [c.n_head * c.head_size, *2 * [c.n_kv_head * c.head_size]], 'c_gate_up': 2 * [c.n_inner]}
        self.matrices, rest = [], []  # of the former (the matrix, its parts, which share its memory)
        for name, p in model.named_parameters():
            if name.startswith('h.') and p.dim() == 2:
                parts = p.detach().split(joined.get(name.split('.')[-2], [len(p)]))
                self.matrices.append((p, [torch.nn.Parameter(part) for part in parts]))
            else:
                rest.append(p)
        self.muon = torch.optim.Muon([part for _, parts in self.matrices for part in parts], weight_decay=weight_decay,
                                     momentum=momentum, adjust_lr_fn='match_rms_adamw')
        self.adamw = torch.optim.AdamW(parameter_groups(rest, weight_decay), lr=learning_rate, betas=betas, fused=fused)
        self.hidden = {'params': [p for p, _ in self.matrices], 'lr': learning_rate}

    @property
    def param_groups(self):
        return [self.hidden, *self.adamw.param_groups]  # anew: loading a state replaces AdamW's

    def step(self):
        for p, parts in self.matrices:
            for part, grad in zip(parts, p.grad.split([len(part) for part in parts])):
                part.grad = grad
        self.muon.param_groups[0]['lr'] = self.hidden['lr']
        self.muon.step()
        self.muon.zero_grad()
        self.adamw.step()

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for p in group['params']:
                p.grad = None

    def state_dict(self):
        """As an optimizer's, with the states of both; the settings are not kept."""
        return {'state': {'muon': self.muon.state_dict()['state'], 'adamw': self.adamw.state_dict()['state']},
                'param_groups': []}

    def load_state_dict(self, state_dict):
        for optimizer, state in zip((self.muon, self.adamw), (state_dict['state'][key] for key in ('muon', 'adamw'))):
            optimizer.load_state_dict({'state': state, 'param_groups': optimizer.state_dict()['param_groups']})


def make_optimizer(name, model, learning_rate, beta1, beta2, momentum, weight_decay, device):
    """
    The optimizer called `name`, in one fused kernel where the device has it:

    adamw       Adam with decoupled weight decay (Loshchilov and Hutter 2019)
    adam        its weight decay is part of the gradient (Kingma and Ba 2015)
    sgd         with `momentum`
    muon        see Muon
    adamw8bit   AdamW whose memory takes a quarter (Dettmers et al. 2022), from bitsandbytes; on CUDA only

    Raises UserError for one that is not there.
    """
    betas, fused = (beta1, beta2), device.split(':')[0] in ('cpu', 'cuda')
    if name == 'muon':
        if not hasattr(torch.optim, 'Muon'):
            raise UserError(f"optimizer='muon' needs torch 2.9 or newer, and this is {torch.__version__}; use adamw")
        return Muon(model, learning_rate, weight_decay, betas, momentum, fused)
    groups = parameter_groups(list(model.parameters()), weight_decay)
    if name == 'sgd':
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=fused)
    if name == 'adamw8bit':
        if not device.startswith('cuda'):
            raise UserError(f"optimizer='adamw8bit' runs on CUDA only, and device is {device}; use adamw")
        try:
            import bitsandbytes
        except ImportError:
            raise UserError("optimizer='adamw8bit' needs a package: pip install bitsandbytes") from None
        return bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, betas=betas)
    kind = {'adamw': torch.optim.AdamW, 'adam': torch.optim.Adam}[name]
    return kind(groups, lr=learning_rate, betas=betas, fused=fused)


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
