"""
The one door for checkpoints. A checkpoint is a plain dictionary of tensors, numbers, text and lists:

    model         the weights, under the names of the plain, unwrapped, uncompiled model
    model_config  the model's shape, as `ModelConfig` takes it
    tokenizer     all of it, so that sampling needs nothing else (tokenizer.py)
    config        every setting of the run
    optimizer, scaler, iter, elapsed, best_val_loss    what a resumed run goes on from

Loading runs with `weights_only=True`: nothing in a file is ever executed.
"""

import os
import pickle
import shutil
import zipfile

import torch

from configurator import UserError
from model import ModelConfig, Transformer
from tokenizer import tokenizer_from_state

KEYS = ('model', 'model_config', 'tokenizer', 'config', 'optimizer', 'scaler', 'iter', 'elapsed', 'best_val_loss')


def save(path, **checkpoint):
    """Writes a checkpoint so that `path` is at any moment the old file or the new one, whole."""
    assert set(checkpoint) == set(KEYS), set(checkpoint) ^ set(KEYS)
    temporary = f'{path}.tmp'
    with open(temporary, 'wb') as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path))


def keep(path, other):
    """A second name for the checkpoint at `path`: files are replaced, never changed, so the two can share their bytes."""
    temporary = f'{other}.tmp'
    if os.path.exists(temporary):
        os.remove(temporary)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)
    sync_folder(os.path.dirname(other))


def load(path):
    """The checkpoint at `path`, its tensors on the CPU. Raises UserError where there is none, or none that is ours."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no checkpoint')
    if not zipfile.is_zipfile(path):  # what torch.save writes is one, and its directory stands at the very end
        raise UserError(f'{path} is not a checkpoint: the file is damaged or of another kind')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f'{path} is not a checkpoint: it holds more than plain data, which is never loaded') from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f'{path} is not a checkpoint: the file is damaged ({str(e).splitlines()[0]})') from None
    missing = [key for key in KEYS if key not in checkpoint] if isinstance(checkpoint, dict) else KEYS
    if missing:
        raise UserError(f'{path} is not a checkpoint of sourdough: it lacks {", ".join(missing)}')
    return checkpoint


def load_model(path):
    """The checkpoint at `path` as (model, tokenizer, the checkpoint itself), the model on the CPU, ready to sample from."""
    checkpoint = load(path)
    try:
        model = Transformer(ModelConfig(**checkpoint['model_config']))
    except (TypeError, ValueError) as e:
        raise UserError(f'{path} is not a checkpoint of sourdough: its model_config is no shape ({e})') from None
    load_weights(model, checkpoint, path)
    return model.eval(), tokenizer_from_state(checkpoint['tokenizer']), checkpoint


def load_weights(model, checkpoint, path):
    """Copies a checkpoint's weights into `model`. Raises UserError, with both shapes, where they do not fit."""
    ours, theirs = model.state_dict(), checkpoint['model']
    wrong = [f'{name} is {_shape(theirs, name)} there and {_shape(ours, name)} here'
             for name in sorted(ours.keys() | theirs.keys()) if _shape(ours, name) != _shape(theirs, name)]
    if wrong:
        more = f', and {len(wrong) - 1} more tensors differ' if len(wrong) > 1 else ''
        raise UserError(f'{path} holds a model of another shape: {wrong[0]}{more}')
    model.load_state_dict(theirs)


def _shape(state, name):
    return tuple(state[name].shape) if name in state else 'absent'


def sync_folder(folder):
    """Makes a rename in `folder` survive a power cut, on systems that can open a folder."""
    if os.name == 'posix':
        fd = os.open(folder or '.', os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
