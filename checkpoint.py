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

Nothing in a file is ever executed, its checksums must fit, and what it says of itself is checked before it is believed: the
reader is torchfile.py.
"""

import concurrent.futures
import contextlib
import math
import os
import sys
import time

import torch

import huggingface
import torchfile
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
    can share their bytes. Raises OSError where there is no room; `path` is what it was then.
    """
    assert checkpoint.keys() == KEYS.keys(), checkpoint.keys() ^ KEYS.keys()
    fresh = f'{path}.new'
    with contextlib.suppress(FileNotFoundError):  # of a crash
        os.remove(fresh)
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
        with contextlib.suppress(FileNotFoundError):
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
        self.lost_best = False

    def save(self, also=(), **checkpoint):
        """Takes over a checkpoint that nobody changes any more; it is written after the one before."""
        self.writing = self.pool.submit(self._write, also, checkpoint)
        self.time = time.monotonic()

    def _write(self, also, checkpoint):
        is_best = any(name.endswith('best.pt') for name in also)
        try:
            save(self.path, self.keep_last, also, **checkpoint)
        except OSError as e:
            self.lost_best |= is_best
            self.problem = f"checkpoint of step {checkpoint['iter']} could not be written ({e.strerror or e})"
            return self.say(f'{self.problem}; the run goes on, and the one before is still there')
        self.problem, self.lost_best = None, self.lost_best and not is_best
        self.saved(checkpoint['iter'], also)

    def news(self, minutes):
        """Whether the last one was so many minutes ago (0: never), and, once, whether it should have become best.pt in vain."""
        lost, self.lost_best = self.lost_best, False
        return 0 < minutes * 60 <= time.monotonic() - self.time, lost

    def wait(self):
        """Returns when all is written; what went wrong with the last one, or None."""
        if self.writing:
            self.writing.result()
        return self.problem


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
    found.setdefault('loop', {})
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
        ('config', _plain(config)), ('loop', _plain(found['loop'])), ('data', all(map(_manifest, found['data'].values()))),
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


def latest(out_dir, say, needed=True):
    """The path of a run's latest checkpoint that is whole; what is damaged is said. UserError, or None, if there is none."""
    names = [name for name in run_names(os.path.join(out_dir, 'ckpt.pt')) if os.path.exists(name)]
    for name in names:
        try:
            verify(name)
            return name
        except UserError as e:
            if name == names[-1] and needed:
                raise
            say(f'{e}; looking for the one before')


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
    tokenizer = tokenizer_from_state(checkpoint['tokenizer'])
    huggingface.check_tokenizer(tokenizer, config, name)
    model = Transformer.from_weights(config, checkpoint.pop('model'))
    return model.eval(), tokenizer, checkpoint


def peek(path):
    """A checkpoint without its weights' content; None where there is none of ours, which loading it will explain."""
    try:
        return _read(path, tensors=False, checksums=False)
    except UserError:
        return None


def best_val_loss(path):
    return (peek(path) or {'best_val_loss': math.inf})['best_val_loss']


def step_of(path):
    return (peek(path) or {}).get('iter')


def shape_of(settings, vocab_size):
    """The shape of the model that train.py's settings describe. Raises UserError for what is none."""
    try:
        return ModelConfig(**{key: settings[key] for key in ModelConfig.__annotations__} | {'vocab_size': vocab_size})
    except ValueError as e:
        raise UserError(str(e)) from None


def model_config(checkpoint, path):
    """The shape of a checkpoint's model. Raises UserError if that is no shape, or not that of its weights."""
    try:
        config = ModelConfig(**checkpoint['model_config'])
    except (TypeError, ValueError) as e:
        raise UserError(f'{path} is not a checkpoint of sourdough: its model_config is no shape ({e})') from None
    _check_shapes(config, checkpoint, path)
    return config


def grow_vocabulary(checkpoint, vocab_size, seed):
    """
    Gives the model in a checkpoint rows for new tokens, in place: the mean of those that there are, each a little aside
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
    """
    weights, generator = checkpoint['model'], torch.Generator().manual_seed(seed)
    missing = vocab_size - checkpoint['model_config']['vocab_size']
    if missing <= 0:
        return
    tied = checkpoint['model_config']['tie_weights']
    for name in ('wte.weight',) if tied else ('wte.weight', 'lm_head.weight'):
        former = weights[name]
        aside = torch.randn(missing, former.size(1), generator=generator) * former.std(0)
        weights[name] = torch.cat((former, former.mean(0) + 0.1 * aside))
    if tied:
        weights['lm_head.weight'] = weights['wte.weight']
    checkpoint['model_config']['vocab_size'] = vocab_size


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
    ours = Transformer.without_weights(config).state_dict()
    wrong = [f'{name} is {_shape(theirs, name)} there and {_shape(ours, name)} here'
             for name in sorted(ours.keys() | theirs.keys(), key=str) if _shape(ours, name) != _shape(theirs, name)]
    if wrong:
        more = f', and {len(wrong) - 1} more tensors differ' if len(wrong) > 1 else ''
        raise UserError(f'{path} holds a model of another shape: {wrong[0]}{more}')


def _shape(state, name):
    there = isinstance(state.get(name), torch.Tensor) and state[name].is_floating_point()
    return tuple(state[name].shape) if there else 'absent'
