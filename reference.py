"""
What a reference model thinks of the answers in preference data: the log-probabilities that dpo measures its model against,
computed once and kept beside the data, under the fingerprint of the model, the precision and the data that they are of.
"""

import dataclasses
import hashlib
import json
import os

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import parallel
from configurator import UserError
from dataset import folder_of, val_batches
from device import autocast
from files import whole
from loss import conversation_log_probs
from model import Transformer
from tokenizer import tokenizer_from_state


def load(name, tokenizer):
    """The reference's checkpoint. Raises UserError where it has another tokenizer than the data."""
    loaded = checkpoint.load_any(name)
    its_own = tokenizer_from_state(loaded['tokenizer'])
    if its_own.fingerprint() != tokenizer.fingerprint():
        raise UserError(f"reference='{name}' was trained with tokenizer {its_own.name} ({its_own.vocab_size} ids), and the "
                        f'model has {tokenizer.name} ({tokenizer.vocab_size} ids): choose one with the same')
    return loaded


def fingerprint(loaded, dtype):
    """Of a model and the precision that it computes in."""
    found = hashlib.sha256(json.dumps([loaded['model_config'], dtype], sort_keys=True).encode())
    for name, p in sorted(loaded['model'].items()):
        found.update(name.encode())
        found.update(p.contiguous().float().numpy())
    return found.hexdigest()[:16]


def paths(splits, mark):
    """Where the log-probabilities of each split lie; `splits`: (kind, Rows) of all data sets."""
    found = []
    for kind, split in splits:
        data = hashlib.sha256(json.dumps([mark, split.manifest['files'], split.block_size], sort_keys=True).encode())
        found.append(os.path.join(folder_of(split.name), f'reference.{kind}.{data.hexdigest()[:16]}.npy'))
    return found


def missing(splits, mark):
    """Whether any process lacks any of them."""
    return any(parallel.total(*(not os.path.isfile(path) for path in paths(splits, mark))))


def compute(splits, mark, loaded, block_size, micro_batch, device, dtype, fsdp):
    """Computes and writes them. Every process calls it, and takes a share."""
    rank, local_rank, world_size = parallel.distributed()
    config = dataclasses.replace(checkpoint.model_config(loaded, 'the reference'), block_size=block_size)
    if config.pos == 'learned':
        loaded['model']['positions.weight'] = loaded['model']['positions.weight'][:block_size]
    # without gradients, but computed as if for them: attention has other roundings where it is not for training
    model = Transformer.from_weights(config, loaded['model']).eval().requires_grad_(False)
    if fsdp:
        parallel.shard(model, device, world_size)
    model.to(device)
    for path, (_, split) in zip(paths(splits, mark), splits):
        found = torch.zeros(split.n_windows, 2, split.most_in_row)
        mine = range(rank, split.n_windows, world_size)
        for i, batch in enumerate(val_batches(split, split.n_windows, micro_batch, rank, world_size)):
            x, y, begins, _ = (torch.from_numpy(part).to(device) for part in batch)
            with autocast(device, dtype):
                nats = model(x, y, reduction='none', begins=begins)
            sums = conversation_log_probs(nats, begins, split.most_in_row).view(micro_batch, 2, -1).cpu()
            windows = list(mine[i * micro_batch:(i + 1) * micro_batch])
            found[windows] = sums[:len(windows)]
        if dist.is_initialized():
            dist.all_reduce(found, group=parallel.host)
        if local_rank == 0:
            with whole(path) as f:
                np.save(f, found.numpy())
    parallel.total(0)  # nobody reads before all is written


def read(splits, mark):
    """Gives the splits their log-probabilities. Raises UserError for a damaged file."""
    for path, (_, split) in zip(paths(splits, mark), splits):
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f'{path} is damaged ({e}); remove it, and it is made anew') from None
        if found.shape != split.reference.shape or found.dtype != np.float32 or not np.isfinite(found).all():
            raise UserError(f'{path} is damaged (its numbers are not those of {split.name}); remove it, and it is made anew')
        split.reference = found
