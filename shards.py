"""
Documents → shuffled token files, by many processes, in bounded memory, and from wherever a kill left it.

First round: a unit of work, which is a few spans of the source, is read and encoded into parts; within a part the
documents are sorted by their keys. A key is a random number that is a function of the seed and the document. Second
round: each shard, which is a range of keys, is gathered from all parts. This is the shuffle of MapReduce (Dean and
Ghemawat 2004): every document can end up anywhere, though no process holds more than a part or a batch of one shard.

Files appear whole or not at all, a unit's report and a shard's entry last, so that what has one is done. Nothing depends
on which process does what: the result is a function of the documents and the settings.
"""

import bisect
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from typing import NamedTuple

import numpy as np

import rows as chat_rows
from configurator import UserError
from files import read_json, write_whole
from sources import Reader
from tokenizer import STATE_FILE, tokenizer_from_state

PART_TOKENS = 2**24  # held in memory by a worker at a time, about
PART_ROWS = 2**18  # documents, and pieces of long ones, in a part at most
INDEX = np.dtype([  # what is known of each document in a part, or of each piece of a long one
    ('key', '<u8'),  # its place in the order; the highest bit says validation
    ('document', '<u8'),  # a hash of its file's name and its position there
    ('digest', '<u8'),  # of the text, another part than the key is made of
    ('piece', '<u8'),  # the number of the piece in its document
    ('start', '<u8'), ('tokens', '<u8'), ('bytes', '<u8'),  # where its ids begin in the part, their number, the text's bytes
    ('last', '<u1')])  # whether it ends the document


class Job(NamedTuple):
    """What the processes have to know."""
    folder: str  # where the work is done
    reader: dict  # the arguments of sources.Reader but `cut`
    parse_special: bool
    val_fraction: float
    deduplicate: bool
    min_bytes: int
    max_bytes: int  # 0 = any
    shard_tokens: int
    seed: int
    stage: str  # pretrain, or what the rows are for (rows.py)
    block_size: int  # tokens in a row

    def tokenizer(self):
        return read_tokenizer(os.path.join(self.folder, STATE_FILE))

    def path(self, part):
        return os.path.join(self.folder, 'parts', part)


@functools.lru_cache(maxsize=1)
def read_tokenizer(path):
    """A tokenizer from its state, made once in a process."""
    return tokenizer_from_state(read_json(path))


# ---- the first round: a unit of work is a few spans, and gives one or more parts

def encode_unit(job, number, spans):
    """Encodes the documents of `spans` into parts; returns (and, last of all, writes) a report on them."""
    tok = job.tokenizer()
    reader = Reader(cut=tok.cut, full_digest=job.deduplicate, stage=job.stage, **job.reader)
    dtype = part_dtype(job, tok)
    bos, eot = (np.array([] if i is None else [i], dtype) for i in (tok.bos_id, tok.eot_id))
    report = {'parts': [], 'tokens': 0, 'too_short': 0, 'too_long': 0, 'files': {}, **dict.fromkeys(chat_rows.OUTCOMES, 0)}
    rows, arrays, held = [], [], 0

    def flush():
        nonlocal rows, arrays, held
        index = np.array(rows, INDEX)
        order = np.lexsort((index['piece'], index['document'], index['key']))
        index = index[order]
        index['start'] = np.cumsum(index['tokens']) - index['tokens']
        part = f'{number:06d}-{len(report["parts"]):04d}'
        write_whole(job.path(f'{part}.ids'), np.concatenate([ids for i in order for ids in arrays[i]]).tobytes())
        write_whole(job.path(f'{part}.index'), index.tobytes())
        report['parts'].append(part)
        report['tokens'] += held
        rows, arrays, held = [], [], 0

    for span in spans:
        in_file = report['files'].setdefault(span.name, [0, 0])  # documents, bytes
        for doc in reader.documents(span):
            if doc.size < job.min_bytes or job.max_bytes and doc.size > job.max_bytes:
                report['too_short' if doc.size < job.min_bytes else 'too_long'] += doc.last
                continue
            place = hash_bytes(f'{doc.name}:{doc.position}'.encode('utf-8', 'surrogateescape'))
            # documents of the same text stand side by side, so that they can be told, if only one of them is to stay
            key = hash_bytes(doc.digest + (b'' if job.deduplicate else place), key=(job.seed % 2**64).to_bytes(8, 'little'))
            key, place, digest = (int.from_bytes(part[:8], 'little') for part in (key, place, doc.digest[8:]))
            key = key >> 1 | goes_to_val(doc, job.val_fraction) << 63
            if job.stage != 'pretrain':
                if held >= PART_TOKENS or len(rows) >= PART_ROWS:
                    flush()
                ids, outcome = chat_rows.encode(tok, doc.conversation, job.stage, job.block_size)
                if outcome:
                    report[outcome] += 1
                with encoded.get_lock():
                    encoded.value += doc.size
                if ids is not None:
                    arrays.append([ids])
                    rows.append((key, place, digest, 0, 0, len(ids), doc.size, True))
                    held += len(ids)
                    in_file[:] = in_file[0] + 1, in_file[1] + doc.size
                continue
            n = 0
            for text, ids in tok.encode_pieces(doc.pieces, job.parse_special, begins=doc.part == 0):
                if held >= PART_TOKENS or len(rows) >= PART_ROWS:
                    flush()
                n_bytes = len(text.encode('utf-8', 'replace'))
                arrays.append([bos] * (n == 0 and doc.part == 0) + [ids.astype(dtype)])
                rows.append((key, place, digest, doc.part << 32 | n, 0, sum(map(len, arrays[-1])), n_bytes, False))
                held += rows[-1][5]
                in_file[1] += n_bytes
                n += 1
                with encoded.get_lock():
                    encoded.value += n_bytes
            if doc.last:
                arrays[-1].append(eot)
                rows[-1] = (*rows[-1][:5], rows[-1][5] + 1, rows[-1][6], True)
                held += 1
                in_file[0] += 1
    if rows:
        flush()
    report |= {'replaced': reader.replacer.count, 'broken': reader.broken, 'first_broken': reader.first_broken}
    write_whole(job.path(f'{number:06d}.json'), json.dumps(report).encode())
    return report


def goes_to_val(doc, val_fraction):
    """Whether a document is for validation: by a hash of its beginning, for good, whatever else there is."""
    return int.from_bytes(doc.head, 'big') / 2**64 < val_fraction


def hash_bytes(data, key=b''):
    return hashlib.blake2b(data, digest_size=16, key=key).digest()


def token_dtype(tok):
    return np.dtype('<u2' if tok.vocab_size <= 2**16 else '<u4')


def part_dtype(job, tok):
    """Of the ids in a part: those of conversations have bits above them."""
    return token_dtype(tok) if job.stage == 'pretrain' else np.dtype('<u4')


# ---- the second round: a shard is a range of the documents' order

def plan_shards(job, parts):
    """
    Divides the order into shards of about `shard_tokens`, and each into batches of about PART_TOKENS, by the parts'
    indexes: {file: [(first key, last key), ...]}.
    """
    tokens = np.zeros(2**16)  # by the key's highest bits
    for part in parts:
        index = np.memmap(job.path(f'{part}.index'), INDEX, 'r')
        tokens += np.bincount((index['key'] >> np.uint64(48)).astype(np.int64), index['tokens'], minlength=len(tokens))
    middle = len(tokens) // 2
    sides = {'train': (0, middle), 'val': (middle, len(tokens))}
    if job.val_fraction and not all(tokens[begin:end].any() for begin, end in sides.values()):
        # a text is to be split by position; a handful of conversations is not split at all
        sides = {'all' if job.stage == 'pretrain' else 'train': (0, len(tokens))}
    shards = {}
    for side, (begin, end) in sides.items():
        ranges = divide(tokens, begin, end, job.shard_tokens)
        for i, (a, b) in enumerate(ranges):
            shards[file_name(side, i, len(ranges))] = [(c << 48, (d << 48) - 1) for c, d in divide(tokens, a, b, PART_TOKENS)]
    return shards


def divide(tokens, begin, end, most):
    """Cuts the bins begin..end into runs of about the same number of tokens, about `most`; without the empty ones."""
    total = np.cumsum(tokens[begin:end])
    n = -(-int(total[-1]) // most)
    edges = begin + np.unique([0, *(np.searchsorted(total, total[-1] * np.arange(1, n) / n) + 1), end - begin])
    return [(a, b) for a, b in zip(edges.tolist(), edges[1:].tolist()) if tokens[a:b].any()]


def file_name(kind, number, count):
    return f'{kind}.bin' if count == 1 else f'{kind}_{number:05d}.bin'


def write_shard(job, parts, file, ranges):
    """Gathers the documents whose keys lie in `ranges` from all parts; returns, and writes, the manifest's entry."""
    tok = job.tokenizer()
    path, dtype, duplicates = os.path.join(job.folder, file), part_dtype(job, tok), 0
    writer = Writer(path, token_dtype(tok)) if job.stage == 'pretrain' else RowWriter(path, job, tok)
    for first, last in ranges:
        rows, part_of = find_rows(job, parts, first, last)
        if job.deduplicate:  # of each text the document that comes first; its pieces share one number
            same = (rows['key'][1:] == rows['key'][:-1]) & (rows['digest'][1:] == rows['digest'][:-1])
            leader = np.maximum.accumulate(np.where(np.concatenate(([True], ~same)), np.arange(len(rows)), 0))
            stays = rows['document'] == rows['document'][leader]
            duplicates += int(rows['last'][~stays].sum())
            rows, part_of = rows[stays], part_of[stays]
        for begin, end in runs(np.cumsum(rows['tokens']) // np.uint64(PART_TOKENS)):  # a long document is not held whole
            batch, ids = rows[begin:end], gather(job, parts, dtype, rows[begin:end], part_of[begin:end])
            lengths = () if job.stage == 'pretrain' else (batch['tokens'],)
            writer.write(ids, int(batch['bytes'].sum()), int(batch['last'].sum()), *lengths)
    return writer.close(duplicates=duplicates)


def find_rows(job, parts, first, last):
    """The rows of all indexes with keys in first..last, in the order of their keys, and the number of each one's part."""
    found, part_of = [], []
    for p, part in enumerate(parts):
        index = np.memmap(job.path(f'{part}.index'), INDEX, 'r')
        begin = bisect.bisect_left(index, first, key=lambda row: int(row['key']))
        end = bisect.bisect_right(index, last, key=lambda row: int(row['key']))
        found.append(np.array(index[begin:end]))
        part_of.append(np.full(end - begin, p))
    rows, part_of = np.concatenate(found), np.concatenate(part_of)
    order = np.lexsort((rows['piece'], rows['document'], rows['key']))
    return rows[order], part_of[order]


def gather(job, parts, dtype, rows, part_of):
    """The ids that `rows` stand for, one after the other."""
    places = np.cumsum(rows['tokens']) - rows['tokens']
    ids = np.empty(int(rows['tokens'].sum()), dtype)
    by_part = np.argsort(part_of, kind='stable')
    for begin, end in runs(part_of[by_part]):
        mine = by_part[begin:end]  # lie side by side in their part, but for duplicates that are left out
        low, high = int(rows['start'][mine[0]]), int(rows['start'][mine[-1]] + rows['tokens'][mine[-1]])
        path = job.path(f'{parts[part_of[mine[0]]]}.ids')
        data = np.fromfile(path, dtype, high - low, offset=low * dtype.itemsize)
        starts = rows['start'][mine] - np.uint64(low)
        for to, start, n in zip(places[mine].tolist(), starts.tolist(), rows['tokens'][mine].tolist()):
            ids[to:to + n] = data[start:start + n]
    return ids


def runs(values):
    """The runs of equal neighbours in an array, as (begin, end)."""
    edges = np.flatnonzero(np.diff(values)) + 1
    return zip([0, *edges.tolist()], [*edges.tolist(), len(values)]) if len(values) else ()


class Writer:
    """Writes one token file and keeps its manifest entry, which lies beside it once the file is complete."""

    def __init__(self, path, dtype):
        self.path, self.dtype = path, dtype
        self.file, self.sha256 = open(f'{path}.tmp', 'wb'), hashlib.sha256()
        self.entry = {'tokens': 0, 'documents': 0, 'bytes': 0, 'max_id': 0}

    def write(self, ids, n_bytes, n_documents):
        """Appends ids, which stand for `n_bytes` of text and end `n_documents`."""
        data = ids.tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.entry['tokens'] += ids.size
        self.entry['documents'] += n_documents
        self.entry['bytes'] += n_bytes
        self.entry['max_id'] = max(self.entry['max_id'], int(ids.max(initial=0)))

    def close(self, **more):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f'{self.path}.tmp', self.path)
        entry = {**self.entry, 'sha256': self.sha256.hexdigest(), **more}
        write_whole(f'{self.path}.json', json.dumps(entry).encode())
        return entry


class RowWriter(Writer):
    """The same of rows, with their bits in a file beside it (.mask)."""

    def __init__(self, path, job, tok):
        super().__init__(path, token_dtype(tok))
        self.job, self.eot_id = job, tok.eot_id
        self.mask = Writer(f'{path.removesuffix(".bin")}.mask', np.dtype(np.uint8))
        self.entry |= {'taught': 0, 'most_in_row': 0}

    def write(self, ids, n_bytes, n_documents, lengths):
        """Appends conversations, as rows.encode gives them, of these lengths."""
        found = chat_rows.fill(ids, lengths, self.job.stage, self.job.block_size, self.eot_id)
        bits = (found >> chat_rows.SHIFT).astype(np.uint8)
        super().write((found % 2**chat_rows.SHIFT).astype(self.dtype), n_bytes, n_documents)
        self.mask.write(bits, 0, 0)
        self.entry['taught'] += int((bits & chat_rows.TAUGHT).sum())
        begins = (bits & chat_rows.BEGINS).astype(bool).sum(1)
        self.entry['most_in_row'] = max(self.entry['most_in_row'], int(begins.max(initial=0)))

    def close(self, **more):
        mask = self.mask.close()
        return super().close(mask=os.path.basename(self.mask.path), mask_sha256=mask['sha256'], **more)


def split_by_position(job, files):
    """Where all documents fell to one side: the end of the whole becomes validation. Returns the new files' entries."""
    tok = job.tokenizer()
    dtype, bytes_of = token_dtype(tok), token_bytes(tok)
    n_tokens = sum(os.path.getsize(os.path.join(job.folder, file)) for file in files) // dtype.itemsize
    n_val = round(n_tokens * job.val_fraction)

    def read():
        for file in files:
            with open(os.path.join(job.folder, file), 'rb') as f:
                while len(ids := np.fromfile(f, dtype, PART_TOKENS)):
                    yield ids

    stream, ids, entries = read(), np.empty(0, dtype), {}
    for kind, total in (('train', n_tokens - n_val), ('val', n_val)):
        count = -(-total // job.shard_tokens)
        for i in range(count):
            file = file_name(kind, i, count)
            writer, left = Writer(os.path.join(job.folder, file), dtype), min(job.shard_tokens, total - i * job.shard_tokens)
            while left:
                ids = ids if len(ids) else next(stream)
                writer.write(ids[:left], int(bytes_of[ids[:left]].sum()), int((ids[:left] == tok.eot_id).sum()))
                left, ids = left - len(ids[:left]), ids[left:]
            entries[file] = writer.close()
    return entries


def token_bytes(tok):
    """How many bytes of text each id stands for."""
    return np.array([len(tok.decode_bytes([i])) for i in range(tok.vocab_size)])


# ---- processes

encoded = None  # a counter that all processes share: bytes of text


class Workers:
    """A pool of `num_workers` processes (0: one for each core), started when there is something to share."""

    def __init__(self, num_workers):
        global encoded
        self.n, self.pool = min(num_workers or usable_cores(), 61), None  # Windows has no more
        self.context = multiprocessing.get_context('spawn')  # every platform has it, and it inherits no locks
        encoded = self.context.Value('q', 0)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.pool:
            if kind:  # an interrupt, too: nobody waits for what the others are still doing
                for process in multiprocessing.active_children():
                    process.terminate()
            self.pool.shutdown(cancel_futures=True)

    def run(self, function, tasks, what, total_bytes=0):
        """{key: function(*task)} for all `tasks`, {key: task}. `what` it is, and how many bytes of text, for the progress."""
        progress, results = Progress(what, len(tasks), total_bytes), {}
        if self.n == 1 or len(tasks) <= 1:
            for key, task in tasks.items():
                results[key] = function(*task)
                progress.show(len(results))
            return results
        if self.pool is None:
            self.pool = concurrent.futures.ProcessPoolExecutor(self.n, self.context, start_worker, (encoded,))
        try:
            # workers start as tasks are handed in, and inherit from that moment that an interrupt is not theirs
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            waiting = {self.pool.submit(function, *task): key for key, task in tasks.items()}
            signal.signal(signal.SIGINT, handler)
            while waiting:
                done, _ = concurrent.futures.wait(waiting, progress.interval, concurrent.futures.FIRST_COMPLETED)
                results |= {waiting.pop(future): future.result() for future in done}
                progress.show(len(results))
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError('a worker process was killed, perhaps for want of memory; the same command goes on from what is '
                            'done, with a smaller --num_workers if need be') from None
        return results


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def start_worker(shared):
    """In a new worker: an interrupt is the parent's to handle, and without a parent there is nothing to do."""
    global encoded
    encoded = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """A line about how far the work is: rewritten in a terminal, printed now and then elsewhere."""

    def __init__(self, what, n_tasks, total_bytes):
        """`total_bytes`: of the text to encode, where that is known; else the tasks done tell how far it is."""
        self.what, self.n_tasks, self.total_bytes = what, n_tasks, total_bytes
        self.interval = 0.5 if sys.stdout.isatty() else 10.0
        self.started = self.shown = time.monotonic()

    def show(self, done):
        now, end = time.monotonic(), done == self.n_tasks
        spent = now - self.started
        if spent < self.interval or now - self.shown < self.interval and not end:
            return  # short work needs no word
        self.shown = now
        by_bytes = min(0.99, encoded.value / self.total_bytes) if self.total_bytes and not end else 0
        share = max(by_bytes, done / self.n_tasks)
        left = f', {clock(spent / share - spent)} left' if 0 < share < 1 else ''
        rate = f'{encoded.value / 1e6:,.1f} MB, {encoded.value / spent / 1e6:.1f} MB/s, ' if self.what == 'encoding' else ''
        line = f'{self.what}: {share:.0%}, {rate}{clock(spent)}{left}'
        if sys.stdout.isatty():
            print(f'\r[{"#" * round(20 * share):<20}] {line:<80}', end='\n' if end else '', flush=True)
        else:
            print(line, flush=True)


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'
