"""
The one door for checkpoints. A checkpoint is a plain dictionary of tensors, numbers, text and lists:

    model         the weights, under the names of the plain, unwrapped, uncompiled model
    model_config  the model's shape, as `ModelConfig` takes it
    tokenizer     all of it, so that sampling needs nothing else (tokenizer.py)
    config        every setting of the run
    data          the manifests of the token files it was trained on
    hardware      what it was trained on, in words
    optimizer, scaler, iter, tokens, elapsed, best_val_loss    what a resumed run goes on from

Nothing in a file is ever executed, its checksums must fit, and what it says of itself is checked before it is believed: the
reader is torchfile.py.
"""

import json
import math
import os
import shutil

import torch

import huggingface
import torchfile
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
    return _read(path)


def verify(path):
    """
    The same with tensors that have a shape and no content, so that it takes no memory; all of the file is read all the same.
    Raises UserError unless `load` would succeed and the weights have the shape that the file says. Whether they are finite
    numbers is not known then.
    """
    checkpoint = _read(path, tensors=False)
    model_config(checkpoint, path)
    return checkpoint


def _read(path, **how):
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no checkpoint; train a model first, or name the file of another')
    try:
        found = torchfile.read(path, **how)
    except torchfile.NotPlain as e:
        raise UserError(f'{path} is not a checkpoint: it holds more than plain data, which is never loaded ({e})') from None
    except torchfile.BadChecksum:
        raise UserError(f'{path} is damaged: its checksum does not fit; go back to an earlier checkpoint') from None
    except torchfile.Damaged as e:
        raise UserError(f'{path} is not a checkpoint: the file is damaged or of another kind ({e})') from None
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror or e})') from None
    found = found if type(found) is dict else {}
    config = found.get('config')
    found.setdefault('hardware', '')  # former versions knew neither this nor the tokens nor the manifests
    if _plain(config) and type(found.get('iter')) is int:
        sizes = [config.get(key, 0) for key in ('batch_size', 'gradient_accumulation_steps', 'block_size')]
        found.setdefault('tokens', found['iter'] * math.prod(sizes) if all(type(n) is int for n in sizes) else None)
    data = found.get('data')
    if type(data) is dict and not all(type(manifest) is dict and 'files' in manifest for manifest in data.values()):
        found['data'] = {}
    missing = [key for key, kind in KEYS.items() if type(found.get(key)) is not kind]
    if missing:
        raise UserError(f'{path} is not a checkpoint of sourdough: it lacks {", ".join(missing)}')
    wrong = [key for key, right in (
        ('config', _plain(config)), ('data', all(map(_manifest, found['data'].values()))),
        ('optimizer', type(found['optimizer'].get('state')) is dict), ('iter', found['iter'] >= 0),
        ('tokens', found['tokens'] >= 0)) if not right]
    if wrong:
        raise UserError(f'{path} is not a checkpoint of sourdough: its {wrong[0]} is not what train.py writes')
    return found


def _plain(settings):
    return type(settings) is dict and all(type(key) is str and type(value) in (bool, int, float, str)
                                          for key, value in settings.items())


def _manifest(found):
    """Whether this is what Split.manifest is."""
    return type(found['files']) is dict and all(type(found.get(key)) is str for key in ('note', 'source')) and all(
        type(entry) is dict and type(entry.get('sha256')) is str and
        all(type(entry.get(key)) is int for key in ('tokens', 'documents', 'bytes')) for entry in found['files'].values())


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
    tokenizer = tokenizer_from_state(checkpoint['tokenizer'])
    huggingface.check_tokenizer(tokenizer, config, name)
    model = Transformer.from_weights(config, checkpoint.pop('model'))
    return model.eval(), tokenizer, checkpoint


def step_of(path):
    """A checkpoint's step, read without its weights; None where there is none of ours, which loading it will explain."""
    try:
        return torchfile.read(path, tensors=False, checksums=False)['iter']
    except (torchfile.NotPlain, torchfile.Damaged, OSError, LookupError, TypeError):
        return None


def read_log(out_dir, last_iter):
    """The records of a run's log.jsonl up to a step, what is a number in them; none where there is no log."""
    path = os.path.join(out_dir, 'log.jsonl')
    if not os.path.isfile(path):
        return []
    try:
        with open(path, encoding='utf-8') as f:
            records = [json.loads(line) for line in f if line.endswith('\n')]  # a crash may have cut the last
        records = [{key: value for key, value in record.items() if type(value) in (int, float)} for record in records]
        return [record for record in records if record['iter'] <= last_iter]
    except KeyError:
        raise UserError(f'{path} is damaged (a line has no iter); move it away to go on without it') from None
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        raise UserError(f'{path} is damaged ({e}); move it away to go on without it') from None


def model_config(checkpoint, path):
    """The shape of a checkpoint's model. Raises UserError if that is no shape, or not that of its weights."""
    try:
        config = ModelConfig(**checkpoint['model_config'])
    except (TypeError, ValueError) as e:
        raise UserError(f'{path} is not a checkpoint of sourdough: its model_config is no shape ({e})') from None
    _check_shapes(config, checkpoint, path)
    return config


def check_weights(config, checkpoint, path):
    """Raises UserError where a checkpoint's weights do not fit a shape or are not finite."""
    _check_shapes(config, checkpoint, path)
    broken = [name for name, p in checkpoint['model'].items() if not p.isfinite().all()]
    if broken:
        raise UserError(f'{path} holds weights that are not finite numbers ({broken[0]}); go back to an earlier checkpoint')


def _check_shapes(config, checkpoint, path):
    theirs = checkpoint['model']
    if config.n_layer > len(theirs):  # before so many are made to compare
        raise UserError(f'{path} holds a model of another shape: n_layer is {config.n_layer}, and it has {len(theirs)} tensors')
    with torch.device('meta'):
        ours = Transformer(config).state_dict()
    wrong = [f'{name} is {_shape(theirs, name)} there and {_shape(ours, name)} here'
             for name in sorted(ours.keys() | theirs.keys(), key=str) if _shape(ours, name) != _shape(theirs, name)]
    if wrong:
        more = f', and {len(wrong) - 1} more tensors differ' if len(wrong) > 1 else ''
        raise UserError(f'{path} holds a model of another shape: {wrong[0]}{more}')


def _shape(state, name):
    there = isinstance(state.get(name), torch.Tensor) and state[name].is_floating_point()
    return tuple(state[name].shape) if there else 'absent'
