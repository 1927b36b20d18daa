"""
The one door for checkpoints. A checkpoint is a plain dictionary of tensors, numbers, text and lists:

    model         the weights, under the names of the plain, unwrapped, uncompiled model
    model_config  the model's shape, as `ModelConfig` takes it
    tokenizer     all of it, so that sampling needs nothing else (tokenizer.py)
    config        every setting of the run
    data          the manifests of the token files it was trained on
    hardware      what it was trained on, in words
    optimizer, scaler, iter, tokens, elapsed, best_val_loss    what a resumed run goes on from

Loading runs with `weights_only=True`: nothing in a file is ever executed.
"""

import json
import math
import os
import pickle
import shutil
import zipfile

import torch

import huggingface
from configurator import UserError
from model import ModelConfig, Transformer
from tokenizer import tokenizer_from_state

KEYS = {'model': dict, 'model_config': dict, 'tokenizer': dict, 'config': dict, 'optimizer': dict, 'scaler': dict,
        'data': dict, 'hardware': str, 'iter': int, 'tokens': int, 'elapsed': float, 'best_val_loss': float}


def save(path, also=(), **checkpoint):
    """
    Writes a checkpoint so that `path` is at any moment the old file or the new one, whole.

    `also` are further names for it, made before: files are replaced, never changed, so that they can share their bytes.
    """
    assert checkpoint.keys() == KEYS.keys(), checkpoint.keys() ^ KEYS.keys()
    temporary = f'{path}.tmp'
    with open(temporary, 'wb') as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    for other in also:
        if os.path.exists(f'{other}.tmp'):
            os.remove(f'{other}.tmp')
        try:
            os.link(temporary, f'{other}.tmp')
        except OSError:  # a file system without hard links
            shutil.copyfile(temporary, f'{other}.tmp')
        os.replace(f'{other}.tmp', other)
    os.replace(temporary, path)
    if os.name == 'posix':  # makes the renames survive a power cut
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load(path):
    """The checkpoint at `path`, its tensors on the CPU. Raises UserError where there is none, or none that is ours."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no checkpoint; train a model first, or name the file of another')
    if not zipfile.is_zipfile(path):  # what torch.save writes is one, and its directory stands at the very end
        raise UserError(f'{path} is not a checkpoint: the file is damaged or of another kind')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f'{path} is not a checkpoint: it holds more than plain data, which is never loaded') from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError):
        raise UserError(f'{path} is not a checkpoint: the file is damaged') from None
    found = checkpoint if isinstance(checkpoint, dict) else {}
    found.setdefault('hardware', '')  # former versions knew neither this nor the tokens nor the manifests
    if isinstance(found.get('config'), dict) and isinstance(found.get('iter'), int):
        found.setdefault('tokens', found['iter'] * math.prod(found['config'].get(key, 0) for key in (
            'batch_size', 'gradient_accumulation_steps', 'block_size')))
    if isinstance(found.get('data'), dict) and not all('files' in manifest for manifest in found['data'].values()):
        found['data'] = {}
    missing = [key for key, kind in KEYS.items() if not isinstance(found.get(key), kind)]
    if missing:
        raise UserError(f'{path} is not a checkpoint of sourdough: it lacks {", ".join(missing)}')
    return checkpoint


def load_any(name):
    """
    What a model's name stands for: the file of a checkpoint, the folder of a run, and else what huggingface.py loads, which
    has the keys model, model_config, tokenizer and config only.
    """
    latest = os.path.join(name, 'ckpt.pt')
    if os.path.isfile(latest):
        return load(latest)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, 'config.json')):
        raise UserError(f"init_from='{name}' is no model: the folder holds neither ckpt.pt nor config.json")
    if os.path.isdir(name) or not os.path.exists(name) and huggingface.hub_id(name):
        return huggingface.load(name)
    if not os.path.exists(name) and not name.endswith('.pt'):
        raise UserError(f"init_from='{name}' is neither a checkpoint nor a folder that is there, nor an id on the Hugging Face "
                        'hub such as HuggingFaceTB/SmolLM2-135M')
    return load(name)


def load_model(name):
    """The model of that name (see `load_any`) on the CPU, ready to sample from; its tokenizer; the rest of the checkpoint."""
    checkpoint = load_any(name)
    config = model_config(checkpoint, name)
    check_weights(config, checkpoint, name)
    model = Transformer.from_weights(config, checkpoint.pop('model'))
    return model.eval(), tokenizer_from_state(checkpoint['tokenizer']), checkpoint


def step_of(path):
    """A checkpoint's step, read without its weights; None where there is none of ours, which loading it will explain."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)['iter']
    except Exception:  # whatever else it is
        return None


def read_log(out_dir, last_iter):
    """The records of a run's log.jsonl up to a step; none where there is no log."""
    path = os.path.join(out_dir, 'log.jsonl')
    if not os.path.isfile(path):
        return []
    try:
        with open(path, encoding='utf-8') as f:
            records = [json.loads(line) for line in f if line.endswith('\n')]  # a crash may have cut the last
    except ValueError as e:
        raise UserError(f'{path} is damaged ({e}); move it away to go on without it') from None
    return [record for record in records if record['iter'] <= last_iter]


def model_config(checkpoint, path):
    """The shape of a checkpoint's model. Raises UserError if that is no shape."""
    try:
        return ModelConfig(**checkpoint['model_config'])
    except (TypeError, ValueError) as e:
        raise UserError(f'{path} is not a checkpoint of sourdough: its model_config is no shape ({e})') from None


def check_weights(config, checkpoint, path):
    """Raises UserError where a checkpoint's weights do not fit a shape or are not finite."""
    with torch.device('meta'):
        ours, theirs = Transformer(config).state_dict(), checkpoint['model']
    wrong = [f'{name} is {_shape(theirs, name)} there and {_shape(ours, name)} here'
             for name in sorted(ours.keys() | theirs.keys()) if _shape(ours, name) != _shape(theirs, name)]
    if wrong:
        more = f', and {len(wrong) - 1} more tensors differ' if len(wrong) > 1 else ''
        raise UserError(f'{path} holds a model of another shape: {wrong[0]}{more}')
    broken = [name for name, p in theirs.items() if not p.isfinite().all()]
    if broken:
        raise UserError(f'{path} holds weights that are not finite numbers ({broken[0]}); go back to an earlier checkpoint')


def _shape(state, name):
    return tuple(state[name].shape) if isinstance(state.get(name), torch.Tensor) else 'absent'
