"""
Where documents come from: text files, .jsonl and Parquet, in folders or alone, compressed or not, and the Hugging Face hub.

A source is divided into spans, each a share of one file that a worker reads on its own: `find_spans`. The division is
a function of the files alone, so that what is made of it does not depend on the number of workers. A `Reader` yields
the documents of a span one by one, and holds no more than a piece of a text in memory at a time; a line of .jsonl, a
row of Parquet and what stands between two separators are documents that are held whole.
"""

import codecs
import contextlib
import errno
import fnmatch
import functools
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.request
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import chat
from configurator import UserError

CHUNK = 2**20  # bytes (or characters) read at a time
SPAN = 2**26  # bytes of a file that make a span, at most; in a small source a 16th of that, so that all workers get some
COMPRESSED = ('.gz', '.zst')


class Span(NamedTuple):
    """A share of a file: bytes of text, row groups of Parquet, or a shard of a data set on the hub."""
    path: str
    name: str  # the file's, relative to the source
    kind: str  # text | separated | jsonl | parquet | hub
    start: int
    end: int  # -1: to the end of a compressed file, whose size is not known
    size: int  # bytes to be read, for the progress bar; 0 where that is not known
    number: int  # of the span within its file


class Document(NamedTuple):
    """A document, or the part of it that lies in one span; or a conversation."""
    name: str  # the file's
    position: int  # of its beginning in the file: a byte, a row or a line, by the kind
    part: int  # 0, or the number of the span within a text file that several spans share
    last: bool  # whether it ends here
    head: bytes  # hash of its first CHUNK bytes, by which it goes to training or to validation
    digest: bytes  # hash of the whole of it, if that was asked for; else `head`
    size: int  # bytes of UTF-8, of the whole of it
    pieces: Iterator[str]  # of this part
    conversation: object = None  # what chat.read_conversation or, for dpo, chat.read_pair makes of it


def find_files(source, include='*', exclude=''):
    """The files that `source` stands for, sorted, as (path, name relative to the source). Raises UserError."""
    if os.path.isfile(source):
        return [(source, os.path.basename(source))]
    if not os.path.isdir(source):
        raise UserError(f"source='{source}' is neither a file nor a folder")

    def refuse(error):
        raise UserError(f'{error.filename} cannot be read ({error.strerror}); --exclude passes it over')

    found = []
    for folder, subfolders, files in os.walk(source, onerror=refuse):
        subfolders[:] = [f for f in subfolders if not _matches(f, exclude)]
        found += [os.path.join(folder, f) for f in files if _matches(f, include) and not _matches(f, exclude)]
    for path in found:
        if not os.path.isfile(path):
            raise UserError(f'{path} is a link to nothing, or no file; --exclude passes it over')
    named = [(path, os.path.relpath(path, source).replace(os.sep, '/')) for path in found]
    return sorted(named, key=lambda item: item[1])


def _matches(file, patterns):
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns.split())


def find_spans(files, separator, divisible):
    """
    The spans of `files`, in order. `separator` parts the documents of a text file ('' = the file is one); `divisible`
    says whether the tokenizer allows a single text to be cut.
    """
    spans, most = [], span_size(files)
    for path, name in files:
        kind = _kind(path, separator)
        if kind == 'parquet':
            bounds, sizes = _row_groups(path, most)
        else:
            size = os.path.getsize(path)
            # a separator that can overlap itself, such as two line ends, is found rightly only from the beginning
            whole = (kind == 'text' and not divisible or
                     kind == 'separated' and any(separator.startswith(separator[i:]) for i in range(1, len(separator))))
            bounds = [0, size] if whole else [*range(0, max(1, size - most // 2), most), size]
            sizes = [end - start for start, end in zip(bounds, bounds[1:])]
            if path.endswith(COMPRESSED):
                bounds, sizes = [0, -1], [size]
        spans += [Span(path, name, kind, start, end, size, number)
                  for number, (start, end, size) in enumerate(zip(bounds, bounds[1:], sizes))]
    return spans


def span_size(files):
    """Bytes of a span, by the size of the source."""
    return min(SPAN, max(SPAN // 16, sum(os.path.getsize(path) for path, _ in files) // 256))


def in_units(spans, most):
    """Spans put together into units of work of at most `most` bytes, or one span; shards of the hub alone."""
    units, size = [], 0
    for span in spans:
        if not units or size + span.size > most:
            units.append([])
            size = 0
        units[-1].append(span)
        size += span.size if span.kind != 'hub' else most + 1
    return units


def _kind(path, separator):
    plain = path.removesuffix('.gz').removesuffix('.zst')
    if plain.endswith(('.jsonl', '.ndjson')):
        return 'jsonl'
    if plain.endswith('.parquet'):
        return 'parquet'
    return 'separated' if separator else 'text'


def _open_plain(path):
    """A file's bytes, uncompressed."""
    try:
        if path.endswith('.gz'):
            return gzip.open(path)
        if path.endswith('.zst'):
            return _pyarrow(path).input_stream(path, compression='zstd')  # notices a file that is cut short, as others do not
        return open(path, 'rb')
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror}); --exclude passes it over') from None


def _pyarrow(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path} needs a package: pip install pyarrow') from None
    return pyarrow


def _parquet(path):
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f'{path} is not a Parquet file that can be read ({str(e).splitlines()[0][:100]})') from None


def _row_groups(path, most):
    """The first row group of each span of a Parquet file, and the end; and the spans' bytes."""
    with _parquet(path) as file:
        bounds, sizes = [0], [0]
        for i in range(file.num_row_groups):
            if sizes[-1] >= most:
                bounds.append(i)
                sizes.append(0)
            sizes[-1] += file.metadata.row_group(i).total_byte_size
        return [*bounds, file.num_row_groups], sizes


class CountingReplacer:
    """A codec error handler: bytes that are not UTF-8 become U+FFFD, and are counted."""
    count = 0

    def __call__(self, error):
        self.count += 1
        return '\ufffd', error.end


class Reader:
    """Reads documents; `cut` is a tokenizer's pattern of where a single long text may be cut (see tokenizer.py)."""

    def __init__(self, text_field='text', separator='', cut=None, skip_broken=False, full_digest=False, stage='pretrain',
                 fields=''):
        self.text_field, self.separator, self.cut = text_field, separator.encode('utf-8', 'surrogateescape'), cut
        self.skip_broken, self.full_digest = skip_broken, full_digest
        self.parse = {'sft': chat.read_conversation, 'dpo': chat.read_pair}.get(stage)  # None: a record holds a text
        self.names = chat.parse_fields(fields)  # of a record's fields, where it holds a conversation
        self.replacer = CountingReplacer()
        codecs.register_error('count and replace', self.replacer)
        self.broken, self.first_broken = 0, ''  # records without a text, and where the first is

    def documents(self, span):
        """Yields the documents that begin in `span`. Raises UserError for what cannot be read."""
        try:
            yield from getattr(self, f'_{span.kind}')(span)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise UserError(f'{span.path} is damaged or cut short ({e})') from None
        except OSError as e:
            raise UserError(f'{span.path} cannot be read ({e.strerror or e}); --exclude passes it over') from None
        if self.broken and not self.skip_broken:
            more = f' (and {self.broken - 1} more in the same part of the file)' if self.broken > 1 else ''
            raise UserError(f'{self.first_broken}{more}; mend it, or --skip_broken passes such records over')

    # a text file is one document; if it is large, each of its spans has a part

    def _text(self, span):
        with _open_plain(span.path) as f:
            beginning = f.read(CHUNK).removeprefix(codecs.BOM_UTF8)
        if not beginning:
            return
        head = _digest(beginning, 8)
        size, digest = (os.path.getsize(span.path), head) if span.end >= 0 else (0, head)
        if self.full_digest or span.end < 0:
            size, digest = _measure(span.path)
        start, end = self._safe_cut(span.path, span.start, size), self._safe_cut(span.path, span.end, size)
        if span.number and start == end:
            return  # there is no place to cut between the last span and this one
        yield Document(span.name, 0, span.number, end in (size, -1), head, digest, size, self._decode(span.path, start, end))

    def _decode(self, path, start, end):
        """The text between two bytes of a file (-1: to its end), about CHUNK characters at a time."""
        decoder = codecs.getincrementaldecoder('utf-8')('count and replace')
        with _open_plain(path) as f:
            if start:  # a compressed file has no other beginning, and cannot seek
                f.seek(start)
            left, at_start = end - start if end >= 0 else float('inf'), start == 0
            while left > 0:
                data = f.read(min(CHUNK, left))
                left = left - len(data) if data else 0
                text = decoder.decode(data, final=left == 0)
                if at_start and text:
                    text, at_start = text.removeprefix('\ufeff'), False
                if text:
                    yield text

    def _safe_cut(self, path, offset, size):
        """The first byte from `offset` on at which the text may be cut; its beginning and its end are such places."""
        if not 0 < offset < size:
            return offset
        with open(path, 'rb') as f:
            f.seek(offset)
            while data := f.read(CHUNK):
                into = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)  # to where a character begins
                text = data[into:].decode('utf-8', 'surrogateescape')
                if found := re.search(self.cut, text):
                    return offset + into + len(text[:found.end()].encode('utf-8', 'surrogateescape'))
                offset += len(data)
        return size

    # documents within a file, each held whole

    def _jsonl(self, span):
        for position, record in _records(span, b'\n'):
            record = record.decode('utf-8', 'count and replace').removeprefix('\ufeff').strip()
            if not record:
                continue
            try:
                value = json.loads(record)
            except (ValueError, RecursionError) as e:
                self._broken(span, position, f'is not JSON ({e})')
                continue
            yield from self._record(span, position, value)

    def _separated(self, span):
        for position, record in _records(span, self.separator):
            text = record.decode('utf-8', 'count and replace').removeprefix('\ufeff').strip('\r\n')
            yield from self._record(span, position, {self.text_field: text})

    def _parquet(self, span):
        with _parquet(span.path) as file:
            fields = file.schema_arrow.names
            wanted = [field for field in fields if field in sum(self.names.values(), [])] if self.parse else [self.text_field]
            if self.parse and not wanted:
                raise UserError(f"{span.path} holds no conversations; its fields are: {', '.join(fields)}, and --fields says "
                                'which is which')
            if not self.parse and self.text_field not in fields:
                raise UserError(f"{span.path} has no field text_field='{self.text_field}'; its fields are: {', '.join(fields)}")
            position = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
            try:
                for batch in file.iter_batches(1000, range(span.start, span.end), wanted):
                    for row in batch.to_pylist():
                        yield from self._record(span, position, row)
                        position += 1
            except ValueError as e:  # pyarrow's ArrowInvalid too
                raise UserError(f'{span.path}, after row {position}, holds what is no text, or is damaged ({e})') from None

    def _hub(self, span):
        rows = open_hub(*json.loads(span.path))
        shard = rows.shard(num_shards=rows.num_shards, index=span.number)
        with _hub_errors(span.name):
            for position, row in enumerate(shard):
                yield from self._record(span, position, row)

    def _record(self, span, position, value):
        """The document in a record, if there is one."""
        if self.parse:
            return (yield from self._conversation(span, position, value))
        text = value.get(self.text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            fields = ', '.join(sorted(map(str, value))) if isinstance(value, dict) else 'none: it is no object'
            return self._broken(span, position, f"has no text in the field text_field='{self.text_field}'; its fields are: "
                                                f'{fields}')
        try:
            data = text.encode()
        except UnicodeEncodeError:  # JSON can write half a character, which no text has
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'count and replace')
            data = text.encode()
        if text and (self.skip_broken or not self.broken):
            head = _digest(data[:CHUNK], 8)
            pieces = (text[i:i + CHUNK] for i in range(0, len(text), CHUNK))
            yield Document(span.name, position, 0, True, head, _digest(data) if self.full_digest else head, len(data), pieces)

    def _conversation(self, span, position, value):
        """The conversation in a record, or the pair of them, if there is one."""
        try:
            found = self.parse(value, self.names)
        except ValueError as e:
            return self._broken(span, position, str(e))
        data = json.dumps(found, ensure_ascii=False, sort_keys=True).encode('utf-8', 'replace')
        texts = [found] if isinstance(found, list) else found[:2]
        size = sum(len(message['content'].encode('utf-8', 'replace')) for text in texts for message in text)
        if self.skip_broken or not self.broken:
            yield Document(span.name, position, 0, True, _digest(data, 8), _digest(data), size, iter(()), found)
        return None

    def _broken(self, span, position, problem):
        """Counts a record without a text; what is wrong with the first is said when the span is done."""
        self.broken += 1
        if not self.first_broken:
            place = f'line {_line_number(span.path, position)}' if span.kind == 'jsonl' else f'row {position}'
            self.first_broken = f'{span.name if span.kind == "hub" else span.path}, {place} {problem}'


def _records(span, separator):
    """The records that begin in a span, as (position of the first byte, bytes)."""
    with _open_plain(span.path) as f:
        # one that begins at the span's first byte is known by the separator before it
        base = max(0, span.start - len(separator))
        if base:
            f.seek(base)
        begins_before = span.start > 0
        buffer, begin, seen = bytearray(), 0, 0  # what is read; where its first record begins; how far it is searched
        while block := f.read(CHUNK):
            buffer += block
            while (found := buffer.find(separator, seen)) >= 0:
                if not begins_before:
                    yield base + begin, bytes(buffer[begin:found])
                begins_before = False
                begin = seen = found + len(separator)
                if base + begin >= span.end >= 0:
                    return
            seen = max(begin, len(buffer) - len(separator) + 1)
            begin = seen if begins_before else begin
            del buffer[:begin]
            base, seen, begin = base + begin, seen - begin, 0
        if buffer and not begins_before:
            yield base, bytes(buffer)


def _digest(data, size=16):
    return hashlib.blake2b(data, digest_size=size).digest()


def _measure(path):
    """(bytes, digest) of a file's uncompressed content."""
    size, digest = 0, hashlib.blake2b(digest_size=16)
    with _open_plain(path) as f:
        while block := f.read(CHUNK):
            size += len(block)
            digest.update(block)
    return size, digest.digest()


def _line_number(path, position):
    """Which line of a file begins at that byte."""
    lines = 1
    with _open_plain(path) as f:
        while position > 0 and (block := f.read(min(CHUNK, position))):
            position -= len(block)
            lines += block.count(b'\n')
    return lines


# ---- the network: one file at an address, and the Hugging Face hub

def fetch(address, folder):
    """Downloads one file into `folder`, unless it is there already, and returns its path."""
    path = os.path.join(folder, re.sub('[?#].*', '', address).rpartition('/')[2] or 'download.txt')
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    print(f'fetching {address}', flush=True)
    try:
        with urllib.request.urlopen(address, timeout=60) as response, open(f'{path}.tmp', 'wb') as f:
            shutil.copyfileobj(response, f)
            expected = int(response.headers.get('Content-Length', f.tell()))
            if f.tell() != expected:
                raise OSError(f'{f.tell()} of {expected} bytes came')
    except (OSError, ValueError, http.client.HTTPException) as e:
        if getattr(e, 'errno', None) == errno.ENOSPC:
            raise
        raise UserError(f'source={address} could not be fetched ({e}); with a copy of it at hand, --source=PATH') from None
    os.replace(f'{path}.tmp', path)
    return path


def _datasets(repository):
    try:
        import datasets
    except ImportError:
        raise UserError(f"source='hf:{repository}' needs a package: pip install datasets") from None
    return datasets


@functools.lru_cache
def open_hub(repository, subset, split, revision):
    """A data set of the hub as a stream of rows, opened once in a process."""
    datasets = _datasets(repository)
    datasets.disable_progress_bars()
    with _hub_errors(f'hf:{repository}'):
        return datasets.load_dataset(repository, subset or None, split=split, revision=revision or None, streaming=True)


@contextlib.contextmanager
def _hub_errors(source):
    """Whatever `datasets` raises, as one line: it has errors of many kinds for a wrong name or a missing network."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        problem = ' '.join(str(e).split())[:300]
        raise UserError(f"source='{source}' cannot be read ({type(e).__name__}: {problem}); check subset and split, or the "
                        'network') from None


def hub_revision(repository, revision):
    """The commit that a repository's name stands for today, so that a run that is taken up again reads the same data."""
    _datasets(repository)
    import huggingface_hub
    with _hub_errors(f'hf:{repository}'):
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision or None).sha


def hub_spans(repository, subset, split, revision):
    """A span for each shard of a data set on the hub."""
    rows = open_hub(repository, subset, split, revision)
    path = json.dumps([repository, subset, split, revision])
    return [Span(path, f'hf:{repository}, shard {n}', 'hub', 0, -1, 0, n) for n in range(rows.num_shards)]
