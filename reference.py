"""
What a reference model thinks of the answers in preference data: the log-probabilities that dpo measures its model against,
computed once and kept beside the data, under the fingerprint of the model, the precision and the data that they are of.
"""

import dataclasses
import hashlib
import json
import os
import uuid

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import huggingface
import parallel
from configurator import UserError
from dataset import folder_of, val_batches
from device import autocast
from files import write_whole
from loss import conversation_log_probs
from model import Transformer
from tokenizer import tokenizer_from_state


def load(name, tokenizer):
    """The reference's checkpoint. Raises UserError where it is not there, or its tokenizer is another one."""
    if not os.path.exists(name) and not huggingface.hub_id(name):
        raise UserError(f"reference='{name}' is neither a checkpoint or folder that is there, nor an id on the hub")
    loaded = checkpoint.load_any(name)
    its_own = tokenizer_from_state(loaded['tokenizer'])
    if its_own.vocab_size < tokenizer.vocab_size or not its_own.agrees_with(tokenizer):
        raise UserError(f"reference='{name}' was trained with tokenizer {its_own.name} ({its_own.vocab_size} ids), and the "
                        f'model has {tokenizer.name} ({tokenizer.vocab_size} ids): choose one with the same')
    return loaded


def fingerprint(loaded):
    """Of a model."""
    found = hashlib.sha256(json.dumps(loaded['model_config'], sort_keys=True).encode())
    for name, p in sorted(loaded['model'].items()):
        found.update(name.encode())
        found.update(p.contiguous().float().numpy())
    return found.hexdigest()[:16]


def paths(splits, mark, dtype):
    """Where the log-probabilities of each split lie, float32; `splits`: (kind, Rows) of all data sets."""
    found = []
    for kind, split in splits:
        what = json.dumps([mark, dtype, split.manifest['files'], split.block_size], sort_keys=True).encode()
        found.append(os.path.join(folder_of(split.name), f'reference.{kind}.{hashlib.sha256(what).hexdigest()[:16]}.f32'))
    return found


def missing(splits, mark, dtype):
    """Whether any process lacks any of them."""
    return any(parallel.total(*(not os.path.isfile(path) for path in paths(splits, mark, dtype))))


def compute(splits, mark, loaded, block_size, micro_batch, device, dtype, fsdp):
    """Computes and writes them. Every process calls it, and takes a share."""
    rank, local_rank, world_size = parallel.distributed()
    config, weights = checkpoint.model_config(loaded, 'the reference'), dict(loaded['model'])
    if config.pos == 'learned':
        if config.block_size < block_size:
            raise UserError(f'the reference knows {config.block_size} positions, fewer than block_size {block_size}')
        weights['positions.weight'] = weights['positions.weight'][:block_size]
    model = Transformer.from_weights(dataclasses.replace(config, block_size=block_size), weights)
    model.eval().requires_grad_(False)
    if fsdp:
        parallel.shard(model, device, world_size)
    model.to(device)
    for path, (kind, split) in zip(paths(splits, mark, dtype), splits):
        found = torch.zeros(split.n_windows, 2, split.most_in_row)
        mine = range(rank, split.n_windows, world_size)
        for i, batch in enumerate(val_batches(split, split.n_windows, micro_batch, rank, world_size)):
            x, y, begins, _ = (torch.from_numpy(part).to(device) for part in batch)
            # as training and evaluation will compute it: attention on CPUs has other roundings where it is for training
            with torch.set_grad_enabled(kind == 'train'), autocast(device, dtype):
                nats = model(x, y, reduction='none', begins=begins)
            sums = conversation_log_probs(nats, begins, split.most_in_row).view(micro_batch, 2, -1).cpu()
            windows = list(mine[i * micro_batch:(i + 1) * micro_batch])
            found[windows] = sums[:len(windows)]
        if dist.is_initialized():
            dist.all_reduce(found, group=parallel.host)
        if local_rank == 0:
            write(path, found.numpy())
    parallel.total(0)  # nobody reads before all is written


def write(path, values):
    """Another run may be writing the same at the same time."""
    own = f'{path}.{uuid.uuid4().hex}'
    try:
        write_whole(own, values.tobytes())
        os.replace(own, path)
    except OSError as e:
        raise UserError(f'{path} cannot be written ({e.strerror}), where dpo keeps what the reference says') from None


def read(splits, mark, dtype):
    """Gives the splits their log-probabilities. Raises UserError for a damaged file."""
    for path, (_, split) in zip(paths(splits, mark, dtype), splits):
        shape = split.reference.shape
        fits = os.path.getsize(path) == split.reference.nbytes
        found = np.fromfile(path, '<f4').reshape(shape) if fits else np.full(shape, np.nan)
        if not np.isfinite(found).all():
            raise UserError(f'{path} is damaged; remove it, and it is made anew')
        split.reference = found
