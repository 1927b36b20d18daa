"""
One model on several processes: DDP, where each holds all of it, and FSDP, where each holds a share of every tensor.

Both average the gradients over the processes, DDP once a step and FSDP in every micro-step, and give the losses that one
process would give. Checkpoints hold whole tensors in either case.
"""

import contextlib
import inspect
import os

import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError


def distributed():
    """(rank, local_rank, world_size) as torchrun sets them; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(key, default)) for key, default in
                 (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


def ddp(model):
    """The model with its gradients averaged, in buckets, while the rest of them is still being computed."""
    # the buffers are constants, which need no broadcast at every step; torch 2.13 renamed the argument that says so
    new = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    constant = {'forward_sync_buffers' if new else 'broadcast_buffers': False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **constant)


def shard(model, device, world_size):
    """
    Leaves each process its share of the weights, and so of gradients and optimizer; a block's are gathered while it
    computes (FSDP, Zhao et al. 2023). The weights must be the same on all processes. Raises UserError where torch cannot.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError(f'fsdp=True needs torch 2.6 or newer, and this is {torch.__version__}') from None
    mesh = torch.distributed.init_device_mesh(device.split(':')[0], (world_size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local_gradients(model, wait):
    """
    A context in which DDP's gradients are only summed up here, as in all micro-steps of a step but the last (`wait`). FSDP's
    go to the processes whose share they are every time: nobody has memory for all of them.
    """
    return model.no_sync() if wait and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def whole(state, here=True):
    """
    A state dictionary with whole tensors, on the CPU, in place of sharded ones: every process must call it. They are kept
    where `here`.
    """
    if isinstance(state, dict):
        return {key: whole(value, here) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, here) for value in state)
    if not hasattr(state, 'full_tensor'):
        return state
    full = state.full_tensor()
    return full.cpu() if here else None


def as_shards(state, optimizer):
    """An optimizer's state, whole, sharded as the weights that it belongs to."""
    params = [p for group in optimizer.param_groups for p in group['params']]

    def share(value, p):
        if not (hasattr(p, 'full_tensor') and isinstance(value, torch.Tensor) and value.shape == p.shape):
            return value
        return torch.distributed.tensor.distribute_tensor(value.to(p.device), p.device_mesh, p.placements)

    kept = {i: {key: share(value, params[i]) for key, value in entry.items()} for i, entry in state['state'].items()}
    return state | {'state': kept}
