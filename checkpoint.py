"""
The one door for checkpoints. A checkpoint is a plain dictionary of tensors, numbers, text and lists:

    model         the weights, under the names of the plain, unwrapped, uncompiled model
    model_config  the model's shape, as `ModelConfig` takes it
    tokenizer     all of it, so that sampling needs nothing else (tokenizer.py)
    config        every setting of the run
    data          the manifests of the token files it was trained on
    hardware      what it was trained on, in words
    optimizer, scaler, iter, tokens, elapsed, best_val_loss    what a resumed run goes on from
    loop          the same: what the loop of train.py counts

In a run's folder `ckpt.pt` is the latest, `ckpt.1.pt` the one before, and so on; `best.pt` is the best by validation loss, and
`ckpt_<iter>.pt` are those kept for good. All are written whole or not at all (files.py).

Loading runs with `weights_only=True`: nothing in a file is ever executed.
"""

import concurrent.futures
import json
import math
import os
import pickle
import sys
import time
import zipfile

import torch

import huggingface
from configurator import UserError
from files import another_name, sync_folder, whole
from model import ModelConfig, Transformer
from tokenizer import tokenizer_from_state

KEYS = {'model': dict, 'model_config': dict, 'tokenizer': dict, 'config': dict, 'optimizer': dict, 'scaler': dict,
        'data': dict, 'hardware': str, 'loop': dict, 'iter': int, 'tokens': int, 'elapsed': float, 'best_val_loss': float}

KEEP_LAST_LIMIT = 100


def save(path, keep_last, also=(), **checkpoint):
    """
    Writes a checkpoint to `path` (.../ckpt.pt). The one that was there becomes .../ckpt.1.pt, and so on, until there are
    `keep_last`. `also` are further names for the new one, given before: files are replaced, never changed, so that they
    can share their bytes. Raises OSError where there is no room; what was there before is there then.
    """
    assert checkpoint.keys() == KEYS.keys(), checkpoint.keys() ^ KEYS.keys()
    fresh = f'{path}.new'
    with whole(fresh) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:  # which torch's writer makes of the file's own error
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None
    try:
        for other in also:
            another_name(fresh, other)
        names = run_names(path)[:keep_last]
        for newer, older in reversed([*zip(names[1:], names[2:])]):
            if os.path.exists(newer):
                os.replace(newer, older)
        if keep_last > 1 and os.path.exists(path):
            another_name(path, names[1])
        os.replace(fresh, path)
        sync_folder(path)
    except OSError:
        os.remove(fresh)
        raise


def run_names(path):
    """The names of a run's latest checkpoints, newest first: .../ckpt.pt, .../ckpt.1.pt, ..."""
    stem = path.removesuffix('.pt')
    return [path] + [f'{stem}.{i}.pt' for i in range(1, KEEP_LAST_LIMIT)]


class Saver:
    """Writes checkpoints in a thread beside the training, one at a time; what fails is said, and does not stop the run."""

    def __init__(self, path, keep_last, say, saved):
        """`saved(iter, also)` is called, in the thread, when one is written."""
        self.path, self.keep_last, self.say, self.saved = path, keep_last, say, saved
        self.pool, self.writing = concurrent.futures.ThreadPoolExecutor(1), None
        self.time, self.problem = time.monotonic(), None  # of the last one

    def save(self, also=(), **checkpoint):
        """Takes over a checkpoint that nobody changes any more, when the one before is written."""
        self.wait()
        self.writing = self.pool.submit(self._write, also, checkpoint)
        self.time = time.monotonic()

    def _write(self, also, checkpoint):
        try:
            save(self.path, self.keep_last, also, **checkpoint)
        except OSError as e:
            self.problem = f"checkpoint of step {checkpoint['iter']} could not be written ({e.strerror or e})"
            return self.say(f'{self.problem}; the run goes on, and the one before is still there')
        self.problem = None
        self.saved(checkpoint['iter'], also)

    def is_late(self, minutes):
        """Whether the last one was so many minutes ago (0: never)."""
        return 0 < minutes * 60 <= time.monotonic() - self.time

    def wait(self):
        """Returns when all is written; what went wrong with the last one, or None."""
        if self.writing:
            self.writing.result()
        return self.problem


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
    found.setdefault('loop', {})
    if isinstance(found.get('config'), dict) and isinstance(found.get('iter'), int):
        found.setdefault('tokens', found['iter'] * math.prod(found['config'].get(key, 0) for key in (
            'batch_size', 'gradient_accumulation_steps', 'block_size')))
    if isinstance(found.get('data'), dict) and not all('files' in manifest for manifest in found['data'].values()):
        found['data'] = {}
    missing = [key for key, kind in KEYS.items() if not isinstance(found.get(key), kind)]
    if missing:
        raise UserError(f'{path} is not a checkpoint of sourdough: it lacks {", ".join(missing)}')
    return checkpoint


def verify(path):
    load(path)


def latest(out_dir, say):
    """The path of a run's latest checkpoint that is whole; what is damaged is said. Raises UserError where there is none."""
    names = [name for name in run_names(os.path.join(out_dir, 'ckpt.pt')) if os.path.exists(name)]
    for name in names:
        try:
            verify(name)
            return name
        except UserError as e:
            if name == names[-1]:
                raise
            say(f'{e}; going back to the one before')
    raise UserError(f'{out_dir} holds no ckpt.pt')


def has_run(out_dir):
    return any(os.path.isfile(name) for name in run_names(os.path.join(out_dir, 'ckpt.pt')))


def load_any(name):
    """
    What a model's name stands for: the file of a checkpoint, the folder of a run, and else what huggingface.py loads, which
    has the keys model, model_config, tokenizer and config only.
    """
    if has_run(name):
        return load(latest(name, lambda words: print(words, file=sys.stderr)))
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


def peek(path):
    """A checkpoint without its weights' content; None where there is none of ours, which loading it will explain."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception:  # whatever else it is
        return None


def step_of(path):
    return (peek(path) or {}).get('iter')


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
