"""
The token files on disk, their manifest, and the order in which training reads them.

A data set is a folder: `train*.bin` and `val*.bin` hold token ids, headerless little-endian uint16 (or uint32), and
`meta.json`, the manifest, says what is in them. Training reads windows of `block_size` inputs and, one further, as many
targets. The windows of step i are a pure function of (seed, i): a resumed run needs no loader state, and 1, 2 or 8
processes read the same batches. Where the files hold conversations (rows.py), a window is a row, or a pair of rows.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import re
import threading
import urllib.parse

import numpy as np

from configurator import UserError
from rows import BEGINS, TAUGHT, sides
from tokenizer import HUB_ID, load_tokenizer, tokenizer_from_state

CHECKSUM_LIMIT = 256 * 2**20  # bytes; larger splits are checked by their size, and by their ids as they are read
MIX_PERIOD = 4096  # steps after which a mixture's rounding repeats


def folder_of(name):
    """'stdlib' → 'data/stdlib'; what contains a separator is a folder already."""
    return name if os.sep in name or '/' in name else os.path.join('data', name)


def read_meta(name):
    """The manifest of data set `name`. Raises UserError where there is none, or none that makes sense."""
    path = os.path.join(folder_of(name), 'meta.json')
    if not os.path.isfile(path):
        how = f'data/{name}.py' if os.path.isfile(os.path.join(os.path.dirname(__file__), 'data', f'{name}.py')) else \
            f'--source=PATH --name={name}'
        raise UserError(f'{path} is missing; prepare the data first: python prepare.py {how}')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        for key, kind in (('dtype', str), ('vocab_size', int), ('eot_id', int), ('tokenizer', dict), ('files', dict)):
            if type(meta[key]) is not kind:
                raise TypeError(f'{key} is no {kind.__name__}')
        entries = meta['files'].values()
        texts = [meta['tokenizer']['name'], meta['tokenizer']['fingerprint'], meta.get('note', ''), *(
            entry['sha256'] for entry in entries)]
        if not all(type(text) is str for text in texts):
            raise TypeError('names, notes and checksums are text')
        counts = [entry[key] for entry in entries for key in ('tokens', 'documents', 'bytes', 'max_id')]
        if not all(type(n) is int and 0 <= n < 2**53 for n in [*counts, *meta.get('left_out', {}).values()]):
            raise TypeError('counts are whole numbers')
        if 'stage' in meta and not _has_rows(meta):
            raise ValueError('its rows are none')
        inside = [meta['tokenizer'].get('file', 'x'), *meta['files'], *(entry.get('mask', 'x') for entry in entries)]
        outside = [file for file in inside if type(file) is not str or not re.fullmatch(r'\w[\w.-]*', file)]
        if outside:
            raise ValueError(f'{outside[0]!r:.80} names no file of its folder')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f'{path} is not a manifest ({type(e).__name__}: {e}); prepare the data again') from None
    most = {'uint16': 2**16, 'uint32': 2**24}.get(meta['dtype'], 0)  # ids; 2**24 is far beyond any tokenizer
    if not 0 < meta['vocab_size'] <= most:
        raise UserError(f"{path}: dtype {meta['dtype']!r:.80} with vocab_size {meta['vocab_size']!r:.80} is neither uint16 "
                        'with at most 65536 nor uint32 with at most 16777216; prepare the data again')
    return meta


def _has_rows(meta):
    """Whether the manifest of conversations says what `Rows` needs to know."""
    size = meta['block_size']
    return meta['stage'] in ('sft', 'dpo') and type(size) is int and 1 < size < 2**24 and all(
        type(text) is str for text in [meta['chat_template'], *(
            entry[key] for entry in meta['files'].values() for key in ('mask', 'mask_sha256'))]) and all(
        type(entry['taught']) is type(entry['most_in_row']) is int and 0 < entry['most_in_row'] < size and
        0 < entry['tokens'] and entry['tokens'] % (size * sides(meta['stage'])) == 0 for entry in meta['files'].values())


def public_source(source):
    """A source that others know as well, an address (without what is secret in it) or a data set of the hub; else ''."""
    if source.startswith('https://'):
        try:
            address = urllib.parse.urlsplit(source)
        except ValueError:  # a bracket too many
            return ''
        return f'https://{address.hostname}{address.path}'
    return source if re.fullmatch(f'hf:{HUB_ID}', source) and not os.path.isdir(source[3:]) else ''


def _kept(meta):
    """What a checkpoint keeps of a manifest."""
    try:
        source = public_source(meta['plan']['settings']['source'])
    except (KeyError, TypeError, AttributeError):  # as in data that was adopted
        source = ''
    return {'note': meta.get('note', ''), 'source': source, 'files': meta['files']}


def read_tokenizer(name, meta):
    """The tokenizer of a data set: the one that lies beside the token files, or else the one of that name."""
    path = os.path.join(folder_of(name), meta['tokenizer'].get('file', 'meta.json'))
    if 'file' not in meta['tokenizer']:
        tokenizer = load_tokenizer(meta['tokenizer']['name'])
    else:
        try:
            with open(path, encoding='utf-8') as f:
                tokenizer = tokenizer_from_state(json.load(f))
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f'{path} cannot be read, though meta.json names it ({type(e).__name__}); prepare the data '
                            'again') from None
    if tokenizer.vocab_size != meta['vocab_size'] and tokenizer.fingerprint() == meta['tokenizer']['fingerprint']:
        raise UserError(f"{path}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but meta.json says vocab_size "
                        f"{meta['vocab_size']}; prepare the data again")
    return tokenizer


class TokenFile:
    """
    A token file, or the mask beside one, that must stay as it is now: Raises UserError when it is read and its size or time
    is another. It is read and not mapped into memory, where a file that is cut off kills the process (SIGBUS).
    """

    def __init__(self, path, dtype):
        self.path, self.dtype = path, dtype
        self.stamp = _stamp(os.stat(path))
        self.length = self.stamp[0] // dtype.itemsize  # elements

    def __getitem__(self, part):
        """Elements start:end, of those that there are."""
        start, end, size = part.start, min(part.stop, self.length), self.dtype.itemsize
        with READING:
            f = _open(self.path, self.stamp)
            try:
                f.seek(start * size)
                data = f.read((end - start) * size)
            except OSError as e:
                raise UserError(f'{self.path} cannot be read ({e.strerror}); see to the disk, and resume the run') from None
            stamp = _stamp(os.fstat(f.fileno()))  # after it was read
        if stamp != self.stamp or len(data) != (end - start) * size:
            raise UserError(f'{self.path} was changed while it is in use; prepare the data again, and resume the run')
        return np.frombuffer(data, self.dtype)


READING = threading.Lock()  # a batch is read in a thread beside the training, and both have the same open files


@functools.lru_cache(maxsize=64)  # each open file is one of the few that a process may have
def _open(path, stamp):  # a file that was prepared anew is opened anew
    try:
        return open(path, 'rb', buffering=0)
    except OSError as e:
        raise UserError(f'{path} cannot be read any more ({e.strerror}); prepare the data again, and resume the run') from None


def _stamp(stat):
    return stat.st_size, stat.st_mtime_ns


class Split:
    """One split of a data set ('train' or 'val') as windows; `stride` is the distance between their starts, tokens."""

    def __init__(self, name, split, block_size, stride=0):
        """
        With `stride` 0 the windows lie side by side, and from the second epoch on their grid is moved by a random
        offset, so that a token does not meet the same window's end each time. Any other stride is kept as it is. Windows
        that overlap go around: one that reaches the end of a file goes on at its beginning, so that all tokens are met
        equally often, the last as the others.

        Raises UserError for files that are missing, damaged, do not match the manifest, or are too short.
        """
        meta, folder = read_meta(name), folder_of(name)
        self.name, self.block_size, self.vocab_size = name, block_size, meta['vocab_size']
        self.manifest = _kept(meta)
        self.moves = stride == 0
        self.stride = stride or block_size
        entries = {f: entry for f, entry in sorted(meta['files'].items()) if f.startswith(split) and f.endswith('.bin')}
        self.n_tokens = sum(entry['tokens'] for entry in entries.values())
        self.n_bytes = sum(entry['bytes'] for entry in entries.values()) or 1  # of text
        if not self.n_tokens:
            raise UserError(f"{folder} has no '{split}' split; prepare it with --val_fraction above 0 and below 1")
        self.dtype = np.dtype(meta['dtype']).newbyteorder('<')
        self.files, self.masks, self.lengths, counts = [], [], [], []
        hashes = self.n_tokens * self.dtype.itemsize <= CHECKSUM_LIMIT
        for file, entry in entries.items():
            if entry['tokens'] > block_size:
                self.files.append(_check(os.path.join(folder, file), self.dtype, entry, meta, hashes))
                # beside the tokens, a byte each, of which TAUGHT says whether it may be a target
                self.masks.append(_check_size(os.path.join(folder, entry['mask']), np.dtype(np.uint8), entry)
                                  if 'mask' in entry else None)
                self.lengths.append(entry['tokens'])
                spare = entry['tokens'] - block_size - 1 - self._reach(entry['tokens'])
                overlap = self.stride < block_size
                counts.append(-(-entry['tokens'] // self.stride) if overlap else spare // self.stride + 1)
        if not counts:
            longest = max(entry['tokens'] for entry in entries.values())
            raise UserError(f"{folder}: the '{split}' split has {longest} tokens, but block_size {block_size} needs at least "
                            f'{block_size + 1}; lower block_size, or prepare more text')
        self.ends = np.cumsum(counts)  # file f holds the windows from ends[f - 1] to ends[f]
        self.n_windows = int(self.ends[-1])

    def _reach(self, n_tokens):
        """The largest offset, in tokens, by which the grid of windows in a file may be moved."""
        return min(self.stride, n_tokens - self.block_size) - 1 if self.moves else 0

    def window(self, k, offset=0.0):
        """Window k → inputs (block_size,) and targets (block_size,), int64; the grid moved by `offset` in [0, 1)."""
        f = int(np.searchsorted(self.ends, k, side='right'))
        tokens = self.files[f]
        first = k - (self.ends[f - 1] if f else 0)
        start = int(first) * self.stride + int(offset * (self._reach(tokens.length) + 1))
        end = start + self.block_size + 1

        def part(file):
            return file[start:end] if end <= file.length else np.concatenate((file[start:end], file[0:end - file.length]))

        ids = part(tokens).astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise UserError(f'{tokens.path}: id {ids.max()} is beyond vocab_size {self.vocab_size}; '
                            'prepare the data again')
        targets = ids[1:].copy()
        if self.masks[f]:
            targets[part(self.masks[f])[1:] & TAUGHT == 0] = -1
        return ids[:-1], targets


class Rows:
    """One split of a data set of conversations as rows, or for dpo pairs of rows; the same as `Split` to whom reads them."""

    def __init__(self, name, split, block_size):
        """Raises UserError for files that are missing, damaged or do not match the manifest, or rows of another size."""
        meta, folder = read_meta(name), folder_of(name)
        if meta['block_size'] != block_size:
            raise UserError(f"{folder} was prepared in rows of block_size {meta['block_size']}, and here it is {block_size}; "
                            f"use --block_size={meta['block_size']}, or prepare it again")
        self.name, self.block_size, self.vocab_size = name, block_size, meta['vocab_size']
        self.manifest = _kept(meta)
        entries = {f: entry for f, entry in sorted(meta['files'].items()) if f.startswith(split) and f.endswith('.bin')}
        if not entries:
            raise UserError(f"{folder} has no '{split}' split; prepare it again")
        dtype = np.dtype(meta['dtype']).newbyteorder('<')
        hashes = sum(entry['tokens'] for entry in entries.values()) * dtype.itemsize <= CHECKSUM_LIMIT
        self.files, self.masks = [], []
        for file, entry in entries.items():
            self.files.append(_check(os.path.join(folder, file), dtype, entry, meta, hashes))
            of_mask = {'tokens': entry['tokens'], 'sha256': entry['mask_sha256'], 'max_id': 0}
            self.masks.append(_check(os.path.join(folder, entry['mask']), np.dtype(np.uint8), of_mask, meta, hashes))
        self.sides = sides(meta['stage'])
        self.ends = np.cumsum([file.length // (block_size * self.sides) for file in self.files])
        self.n_windows = int(self.ends[-1])
        self.most_in_row = max(entry['most_in_row'] for entry in entries.values())
        # of dpo: the reference's log-probability of each conversation (reference.py)
        self.reference = np.zeros((self.n_windows, 2, self.most_in_row), np.float32) if self.sides == 2 else None

    def window(self, k, offset=0.0):
        """
        Row k → inputs (T,), targets (T,) int64, -1 for what is not taught, and where conversations begin (T,) bool. For dpo
        (2, T) of each, chosen and rejected, and the reference's log-probabilities of their conversations (2, most_in_row).
        """
        f = int(np.searchsorted(self.ends, k, side='right'))
        size = self.sides * self.block_size
        start = int(k - (self.ends[f - 1] if f else 0)) * size
        ids = self.files[f][start:start + size].astype(np.int64).reshape(self.sides, -1)
        bits = self.masks[f][start:start + size].reshape(self.sides, -1)
        if ids.max() >= self.vocab_size:
            raise UserError(f'{self.files[f].path}: id {ids.max()} is beyond vocab_size {self.vocab_size}; '
                            'prepare the data again')
        targets = np.full_like(ids, -1)
        targets[:, :-1] = np.where(bits[:, 1:] & TAUGHT, ids[:, 1:], -1)
        begins = bits & BEGINS != 0
        if not begins[:, 0].all() or begins.sum(1).max() > self.most_in_row:
            raise UserError(f'{self.masks[f].path} is damaged: row {k} does not hold the conversations that meta.json says; '
                            'prepare the data again')
        if self.sides == 2:
            return ids, targets, begins, self.reference[k]
        return ids[0], targets[0], begins[0]


def split_of(meta, name, split, block_size, stride):
    """A split of a data set as windows of a text, or as rows of conversations, by its manifest."""
    return Rows(name, split, block_size) if 'stage' in meta else Split(name, split, block_size, stride)


def open_data(names, stage, block_size, stride):
    """
    The data sets' manifests, train splits, and validation splits by name. Raises UserError for a set of another stage, or with
    another tokenizer than the first.
    """
    metas = [read_meta(name) for name in names]
    for name, meta in zip(names, metas):
        made_for = meta.get('stage', 'pretrain')
        if made_for != stage:
            raise UserError(f"stage='{stage}', but data set {name} was prepared for --stage={made_for}; train with that, or "
                            f'prepare it again with --stage={stage}')
        if meta['tokenizer']['fingerprint'] != metas[0]['tokenizer']['fingerprint']:
            raise UserError(f"data set {names[0]} was prepared with tokenizer {metas[0]['tokenizer']['name']}, "
                            f"{name} with {meta['tokenizer']['name']}; a mixture needs one tokenizer")
    has_val = {name: any(file.startswith('val') for file in meta['files']) for name, meta in zip(names, metas)}
    return (metas, [split_of(meta, name, 'train', block_size, stride) for name, meta in zip(names, metas)],
            {name: split_of(meta, name, 'val', block_size, block_size) for name, meta in zip(names, metas) if has_val[name]})


def _check_size(path, dtype, entry):
    """The file with that many elements as the manifest says."""
    if not os.path.isfile(path):
        raise UserError(f'{path} is missing, though meta.json names it; prepare the data again')
    file = TokenFile(path, dtype)
    size, expected = file.stamp[0], entry['tokens'] * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} has {size} bytes, but meta.json says {entry['tokens']} tokens, which is {expected} bytes; "
                        'prepare the data again')
    return file


def _check(path, dtype, entry, meta, hashes):
    """Checks a token file against its manifest entry, its content too if `hashes`; returns the file."""
    file = _check_size(path, dtype, entry)
    if entry['max_id'] >= meta['vocab_size']:
        raise UserError(f"{path}: id {entry['max_id']} is beyond vocab_size {meta['vocab_size']}; prepare the data again")
    if hashes:
        try:
            with open(path, 'rb') as f:
                found = hashlib.sha256(f.read()).hexdigest()
        except OSError as e:
            raise UserError(f'{path} cannot be read ({e.strerror})') from None
        if found != entry['sha256']:
            raise UserError(f"{path} has the checksum {found[:12]}, but meta.json says {entry['sha256'][:12]}; "
                            'prepare the data again')
    return file


def hash_ints(*numbers):
    """Whole numbers → one pseudo-random number below 2**64, the same everywhere (SplitMix64, Steele et al. 2014)."""
    h = 0
    for n in numbers:
        h = (h + n + 0x9E3779B97F4A7C15) % 2**64
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
        h ^= h >> 31
    return h


def permute(k, n, key):
    """
    Element `k` of a pseudo-random permutation of range(n), without ever making the list: a Feistel network shuffles
    the numbers of as many bits, and is walked until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains").
    """
    half = max((n - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    keys = [hash_ints(key, i) for i in range(6)]
    while True:
        left, right = k >> half, k & low
        for round_key in keys:
            left, right = right, left ^ (hash_ints(round_key, right) & low)
        k = left << half | right
        if k < n:
            return k


class TrainingOrder:
    """The windows of every step, for one data set or a weighted mixture of several."""

    def __init__(self, splits, weights, global_batch, seed):
        """`splits`: the data sets' train splits; `weights`: their shares, adding up to 1; `global_batch`: windows."""
        self.splits, self.global_batch, self.seed = splits, global_batch, seed
        # Systematic sampling: lay the sources' shares of a batch end to end and cut the line at u, u + 1, u + 2, ...
        # Each source gets its share rounded down or up. u walks evenly over [0, 1), so that the sums come out right.
        u = np.arange(MIX_PERIOD) * 1597 % MIX_PERIOD / MIX_PERIOD
        line = np.concatenate(([0.0], np.cumsum(np.float64(weights))[:-1], [1.0])) * global_batch
        cuts = np.ceil(line[None, :] - u[:, None]).astype(np.int64).clip(0)  # (MIX_PERIOD, sources + 1)
        self.counts = np.diff(cuts, axis=1)  # windows by step and source
        self.used = np.concatenate((np.zeros((1, len(weights)), np.int64), np.cumsum(self.counts, axis=0)))

    def locate(self, step, position):
        """Where window `position` of a step's global batch lies: (source, window, offset of the grid)."""
        periods, step = divmod(step, MIX_PERIOD)
        source = 0
        while position >= self.counts[step][source]:
            position -= self.counts[step][source]
            source += 1
        sample = periods * int(self.used[-1][source]) + int(self.used[step][source]) + int(position)
        epoch, k = divmod(sample, self.splits[source].n_windows)
        key = hash_ints(self.seed, source, epoch)
        return source, permute(k, self.splits[source].n_windows, key), (key % 2**32 / 2**32 if epoch else 0.0)

    def batch(self, step, positions):
        """The windows at `positions` of a step's global batch: inputs and targets, each (len(positions), T), int64, ..."""
        windows = []
        for position in positions:
            source, k, offset = self.locate(step, position)
            windows.append(self.splits[source].window(k, offset))
        return collate(windows)

    def epochs(self, step):
        """How often each source has been read when `step` steps are done."""
        used = step // MIX_PERIOD * self.used[-1] + self.used[step % MIX_PERIOD]
        return [n / split.n_windows for n, split in zip(used, self.splits)]


def collate(windows):
    """Windows → a batch of each of their parts; the rows of pairs stand one below the other."""
    if windows[0][-1].dtype == np.float32:  # of several sets, the longest row of log-probabilities
        most = max(window[-1].shape[1] for window in windows)
        windows = [(*window[:-1], np.pad(window[-1], ((0, 0), (0, most - window[-1].shape[1])))) for window in windows]
    return tuple(np.concatenate(part) if part[0].ndim == 2 else np.stack(part) for part in zip(*windows))


def parse_mix(dataset):
    """'a:0.7 b:0.3' → (['a', 'b'], [0.7, 0.3]), the weights scaled to add up to 1; without a weight it is 1."""
    if ',' in dataset:
        raise UserError(f"dataset='{dataset}': the parts of a mixture are separated by blanks: 'a:0.7 b:0.3'")
    names, weights = [], []
    for part in dataset.split():
        name, colon, weight = part.rpartition(':') if not os.path.isdir(part) else (part, '', '')
        try:
            weights.append(float(weight) if colon else 1.0)
        except ValueError:
            weights.append(0.0)
        names.append(name if colon else part)
        if not 0 < weights[-1] < float('inf') or not names[-1]:
            raise UserError(f"dataset='{dataset}': a mixture is written 'a:0.7 b:0.3', with weights above 0")
    if not names:
        raise UserError("dataset='' names no data set; --dataset=stdlib is the default")
    return names, [w / sum(weights) for w in weights]


def val_batches(split, n_windows, batch_size, rank, world_size):
    """
    The same windows at every evaluation: `n_windows` (or all there are), evenly spaced over the split, every
    `world_size`-th for this rank. The last batch is filled up with targets of -1, so that all have one shape, and every rank
    has as many batches.
    """
    n = min(n_windows, split.n_windows)
    mine = [i * split.n_windows // n for i in range(rank, n, world_size)]
    x, y, *more = split.window(0)
    nothing = np.zeros_like(x), np.full_like(y, -1), *map(np.zeros_like, more)
    for i in range(0, -(-n // world_size), batch_size):
        pairs = [split.window(k) for k in mine[i:i + batch_size]]
        pairs += [nothing] * (batch_size - len(pairs))
        yield collate(pairs)


def read_ahead(load, steps, depth=2):
    """Yields `load(step)` for each of `steps`, up to `depth` of them made ahead in a thread beside the training."""
    steps = iter(steps)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(load, step) for step in itertools.islice(steps, depth))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(load, step) for step in itertools.islice(steps, 1))
            yield batch
