"""
One model on several processes: DDP, where each holds all of it, and FSDP, where each holds a share of every tensor.

Both average the gradients over the processes, DDP once a step and FSDP in every micro-step, and give the losses that one
process would give. Checkpoints hold whole tensors in either case.
"""

import contextlib
import datetime
import inspect
import math
import os
import uuid

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError

host = None  # the group in which the processes agree on numbers, without a wait for the device


def distributed():
    """(rank, local_rank, world_size) as torchrun sets them; (0, 0, 1) without it."""
    if 'RANK' not in os.environ:
        return 0, 0, 1
    return tuple(int(os.environ.get(key, default)) for key, default in
                 (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


def share_step(batch_size, gradient_accumulation_steps, processes):
    """
    (windows in a step, however many processes there are; windows of it for each; numbers of windows that a micro-batch of it
    may have, the largest first). Raises UserError where the windows do not divide.
    """
    total = batch_size * gradient_accumulation_steps
    if total % processes:
        raise UserError(f'batch_size {batch_size} * gradient_accumulation_steps {gradient_accumulation_steps} = {total} '
                        f'windows do not divide over {processes} processes; make the product a multiple of {processes}')
    share = total // processes
    up_to_root = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
    return total, share, sorted({*up_to_root, *(share // n for n in up_to_root)}, reverse=True)


def start(backend, device):
    """Joins this process to those that torchrun started; they wait for each other up to an hour."""
    global host
    store, rank, world_size = fresh_store()
    # of an hour, in which the first process may have to wait for a disk or a mirror
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(hours=1),
                            device_id=torch.device(device) if device.startswith('cuda') else None)
    host = dist.new_group(backend='gloo', timeout=datetime.timedelta(hours=1)) if backend != 'gloo' else dist.group.WORLD


def fresh_store():
    """
    Where the processes find each other: a part of torchrun's store of their own. The store itself outlives processes, so that
    those which are started again would find the addresses of the dead (pytorch's issue 135712).
    """
    store, rank, world_size = next(dist.rendezvous('env://'))
    me = uuid.uuid4().hex
    if rank == 0:
        store.set('first', me)
        for other in range(1, world_size):
            store.set(f'{me}/{store.get(f"{me}/{other}").decode()}', 'welcome')
        return dist.PrefixStore(me, store), rank, world_size
    while True:
        first = store.get('first').decode()  # this may be a dead one, which welcomes nobody
        store.set(f'{first}/{rank}', me)
        with contextlib.suppress(dist.DistStoreError):  # it did not within a second
            store.wait([f'{first}/{me}'], datetime.timedelta(seconds=1))
            return dist.PrefixStore(first, store), rank, world_size


def total(*numbers):
    """The sum of each number over all processes, which wait for each other here."""
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=host)
    return sums.tolist()


def by_the_first(work, *args):
    """What `work(*args)` returns on the first process, for all of them."""
    if not dist.is_initialized():
        return work(*args)
    result = [work(*args) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, group=host)
    return result[0]


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
    mesh = dist.init_device_mesh(device.split(':')[0], (world_size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local_gradients(model, wait):
    """
    A context in which DDP's gradients are only summed up here, as in all micro-steps of a step but the last (`wait`). FSDP's
    go to the processes whose share they are every time: nobody has memory for all of them.
    """
    return model.no_sync() if wait and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def copy_whole(state, here=True):
    """
    A copy on the CPU of a state dictionary, with whole tensors in place of shares: every process must call it. It is kept
    where `here`.
    """
    if isinstance(state, dict):
        return {key: copy_whole(value, here) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_whole(value, here) for value in state)
    if not isinstance(state, torch.Tensor):
        return state
    full = state.full_tensor() if hasattr(state, 'full_tensor') else state
    return full.detach().to('cpu', copy=True) if here else None


def all_finite(tensors):
    """Whether none of the tensors, or of their shares on any process, has a number that is not finite."""
    parts = (p.to_local() if hasattr(p, 'to_local') else p for p in tensors)
    return not any(total(any(not p.isfinite().all() for p in parts)))


def share_of(value, p):
    """A whole tensor, or whatever else belongs to weight `p`, sharded as that is."""
    if not (hasattr(p, 'full_tensor') and isinstance(value, torch.Tensor) and value.shape == p.shape):
        return value
    return dist.tensor.distribute_tensor(value.to(p.device), p.device_mesh, p.placements)


def load_weights(model, weights):
    """Sets a model's weights, sharded or not, from whole tensors."""
    model.load_state_dict({name: share_of(weights[name], p) for name, p in model.state_dict().items()})


def load_moments(optimizer, state, sharded):
    """Sets an optimizer's state, sharded as its weights are, from whole tensors; its hyper-parameters stay."""
    moments = state['state']
    if sharded:
        params = [p for group in optimizer.param_groups for p in group['params']]
        moments = {i: {key: share_of(value, params[i]) for key, value in entry.items()} for i, entry in moments.items()}
    optimizer.load_state_dict({'state': moments, 'param_groups': optimizer.state_dict()['param_groups']})
