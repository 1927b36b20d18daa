"""
Prepares text for training: documents → token ids in data/<name>/train.bin and val.bin, and a manifest, meta.json.

    python prepare.py data/shakespeare.py                                  # a recipe
    python prepare.py --source=notes/ --tokenizer=gpt2 --name=mine         # your own text
    python prepare.py --source=dump.jsonl --text_field=body --name=dump

A source is a text file, a folder of them, or .jsonl with a text in each line. Every file, and every line of .jsonl, is
a document; documents are separated by the end-of-text id. Whether one goes to validation is decided by a hash of its
text. A text of one document (or so few that the hash picks none) is split by position: its end is validation.
"""

from configurator import UserError, configure

# ---- settings
source = ''  # a text file, a folder, a .jsonl file, or the http(s) address of one file
name = ''  # the data set's name: files go to data/<name>/
tokenizer = 'bytes'  # bytes, or a tiktoken encoding such as gpt2
val_fraction = 0.1  # share of the documents (or, of a single document, of its tokens) kept for validation; 0 keeps none
include = '*.txt *.md *.jsonl'  # in a folder: the files to read, patterns separated by blanks
exclude = ''  # in a folder: names of files and folders to pass over, patterns separated by blanks
text_field = 'text'  # the field of a .jsonl line that holds the text
note = ''  # a sentence about the data that goes into the manifest
overwrite = False  # replace a data set of the same name
allow_network = True  # False refuses sources that would have to be fetched
# ----
config = configure(globals())

import codecs
import fnmatch
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import tempfile
import time
import urllib.parse
import urllib.request

import numpy as np

from dataset import folder_of
from tokenizer import load_tokenizer

CHUNK = 2**20  # characters (or bytes) held in memory at a time


class CountingReplacer:
    """A codec error handler: bytes that are not UTF-8 become U+FFFD, and are counted."""
    count = 0

    def __call__(self, error):
        self.count += 1
        return '\ufffd', error.end


def find_files(source):
    """The files that `source` stands for, sorted, as (path, name to record)."""
    if os.path.isfile(source):
        return [(source, os.path.basename(source))]
    if not os.path.isdir(source):
        raise UserError(f"source='{source}' is neither a file nor a folder")
    found = []
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = [f for f in subfolders if not _matches(f, exclude)]
        found += [os.path.join(folder, f) for f in files if _matches(f, include) and not _matches(f, exclude)]
    named = [(path, os.path.relpath(path, source).replace(os.sep, '/')) for path in found]
    return sorted(named, key=lambda item: item[1])


def _matches(file, patterns):
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns.split())


def read_documents(path):
    """Yields each document of a file as an iterator over pieces of its text."""
    lines = path.endswith('.jsonl')
    try:
        f = open(path, encoding='utf-8-sig', errors='count and replace', newline='\n' if lines else '')
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror}); --exclude passes it over') from None
    with f:
        if lines:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield iter([_text_of(line, path, number)])
        else:
            yield iter(lambda: f.read(CHUNK), '')


def _text_of(line, path, number):
    try:
        record = json.loads(line)
    except ValueError as e:
        raise UserError(f'{path}, line {number}: not JSON ({e})') from None
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        fields = ', '.join(sorted(record)) if isinstance(record, dict) else 'none: it is no object'
        raise UserError(f"{path}, line {number} has no text in the field text_field='{text_field}'; its fields are: {fields}")
    return record[text_field]


def cut_safely(pieces):
    """
    Recuts the pieces of a long text where no token crosses: before a blank, or after a single line's end, between two
    words. No pattern of a byte-level BPE matches across such a place, so that encoding piece by piece gives the ids of
    the whole. (After eight million characters without one it cuts anywhere.)
    """
    held = []
    for piece in pieces:
        last = re.match(r'(?s:.*)(?:\S(?= )|\S\n(?=\S))', piece) if len(piece) >= CHUNK else None
        if last:
            yield ''.join(held) + piece[:last.end()]
            held = [piece[last.end():]]
        else:
            held.append(piece)
        if len(held) > 8:
            yield ''.join(held)
            held = []
    yield ''.join(held)


def goes_to_validation(beginning):
    """Whether a document does, by a hash of its first CHUNK characters: for good, whatever else there is."""
    digest = hashlib.blake2b(beginning[:CHUNK].encode('utf-8', 'replace'), digest_size=8).digest()
    return int.from_bytes(digest, 'big') / 2**64 < val_fraction


class Writer:
    """Writes one token file and keeps its manifest entry."""

    def __init__(self, path, dtype):
        self.file, self.dtype, self.sha256 = open(path, 'wb'), dtype, hashlib.sha256()
        self.entry = {'tokens': 0, 'documents': 0, 'bytes': 0, 'max_id': 0}

    def write(self, ids, n_bytes=0, n_documents=0):
        """Appends ids, which stand for `n_bytes` of text and end `n_documents`."""
        if len(ids) == 0:
            return
        ids = np.asarray(ids, self.dtype)
        data = ids.tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.entry['tokens'] += len(ids)
        self.entry['documents'] += n_documents
        self.entry['bytes'] += n_bytes
        self.entry['max_id'] = max(self.entry['max_id'], int(ids.max()))

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {**self.entry, 'sha256': self.sha256.hexdigest()}


def encode_all(files, tok, dtype, folder):
    """Encodes every document into train.bin or val.bin, and the list of sources beside them; returns the entries."""
    writers = {split: Writer(os.path.join(folder, f'{split}.bin'), dtype) for split in ('train', 'val')}
    started = shown = time.time()
    with open(os.path.join(folder, 'sources.tsv'), 'w', encoding='utf-8', errors='backslashreplace') as sources:
        sources.write('file\tdocuments\tbytes\n')
        for path, recorded in files:
            n_documents = n_bytes = 0
            for pieces in read_documents(path):
                beginning = next(pieces, '')
                if not beginning:
                    continue
                writer = writers['val' if goes_to_validation(beginning) else 'train']
                pieces = itertools.chain([beginning], pieces)
                for text in pieces if tok.name == 'bytes' else cut_safely(pieces):
                    size = len(text.encode('utf-8', 'replace'))
                    writer.write(tok.encode(text), size)
                    n_bytes += size
                    if time.time() - shown > 5:
                        shown = time.time()
                        read = sum(w.entry['bytes'] for w in writers.values())
                        print(f'{read / 1e6:,.1f} MB read, {read / 1e6 / (shown - started):.1f} MB/s', flush=True)
                writer.write([tok.eot_id], n_documents=1)
                n_documents += 1
            sources.write(f'{recorded}\t{n_documents}\t{n_bytes}\n')
    return {split: writer.close() for split, writer in writers.items()}


def split_by_position(folder, entries, tok, dtype):
    """Where all documents fell to one side: puts them together again and makes the end of the whole validation."""
    everything = os.path.join(folder, 'everything')
    os.replace(os.path.join(folder, 'train.bin' if entries['train']['tokens'] else 'val.bin'), everything)
    n_tokens = os.path.getsize(everything) // np.dtype(dtype).itemsize
    n_val = round(n_tokens * val_fraction)
    result = {}
    with open(everything, 'rb') as f:
        for split, left in (('train', n_tokens - n_val), ('val', n_val)):
            writer = Writer(os.path.join(folder, f'{split}.bin'), dtype)
            while left:
                ids = np.fromfile(f, dtype, min(left, CHUNK))
                writer.write(ids, len(tok.decode_bytes(ids.tolist())), int((ids == tok.eot_id).sum()))
                left -= len(ids)
            result[split] = writer.close()
    os.remove(everything)
    return result


def fetch(address, folder):
    """Downloads one file into `folder` and returns its path."""
    if not allow_network:
        raise UserError(f'{address} would have to be fetched from the network')
    path = os.path.join(folder, os.path.basename(urllib.parse.urlsplit(address).path) or 'download.txt')
    print(f'fetching {address}', flush=True)
    try:
        with urllib.request.urlopen(address, timeout=60) as response, open(path, 'wb') as f:
            shutil.copyfileobj(response, f)
            expected = int(response.headers.get('Content-Length', f.tell()))
            if f.tell() != expected:
                raise OSError(f'{f.tell()} of {expected} bytes came')
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f'source={address} could not be fetched ({e}); with a copy of it at hand, --source=PATH') from None
    return path


def prepare(folder, target):
    """Everything from the settings to the finished files in `folder`."""
    tok = load_tokenizer(tokenizer)
    dtype = '<u2' if tok.vocab_size <= 2**16 else '<u4'
    where = fetch(source, folder) if re.match('https?://', source) else source
    files = find_files(where)
    entries = encode_all(files, tok, dtype, folder)
    if not any(entry['tokens'] for entry in entries.values()):
        raise UserError(f"source='{source}': no text in {len(files)} files (include='{include}')")
    if val_fraction and not all(entry['tokens'] for entry in entries.values()):
        entries = split_by_position(folder, entries, tok, dtype)
    for split in [split for split, entry in entries.items() if not entry['tokens']]:
        os.remove(os.path.join(folder, f'{split}.bin'))
        del entries[split]
    if where != source:
        os.remove(where)
    meta = {
        'dtype': 'uint16' if dtype == '<u2' else 'uint32', 'vocab_size': tok.vocab_size, 'eot_id': tok.eot_id,
        'tokenizer': {'name': tok.name, 'fingerprint': tok.fingerprint()},
        'files': {f'{split}.bin': entry for split, entry in entries.items()},
        'note': note, 'settings': {k: v for k, v in config.items() if k not in ('overwrite', 'allow_network')},
    }
    with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=2)
    if replacer.count:
        print(f'note: {replacer.count:,} stretches of bytes that are not UTF-8 were replaced by U+FFFD')
    for file, entry in meta['files'].items():
        print(f"{target}/{file}: {entry['tokens']:,} tokens, {entry['documents']:,} documents, {entry['bytes']:,} bytes")


def main():
    if not source or not name:
        raise UserError(f"source='{source}' and name='{name}' must both be given: --source=PATH --name=mine")
    if not re.fullmatch(r'[\w.-]+', name) or name.startswith('.'):
        raise UserError(f"name='{name}' may have letters, digits, '_', '-' and '.' (not first) only: it becomes a folder")
    if not 0 <= val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} is not within 0 <= val_fraction < 1')
    target = folder_of(name)
    if os.path.exists(target) and not overwrite:
        raise UserError(f'{target} exists already; --overwrite replaces it, --name chooses another')
    os.makedirs('data', exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f'.{name}.', dir='data')  # the files appear only when they are complete
    os.chmod(folder, 0o755)
    try:
        prepare(folder, target)
        if os.path.exists(target):
            os.replace(target, folder + '.old')
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder + '.old', ignore_errors=True)


if __name__ == '__main__':
    replacer = CountingReplacer()
    codecs.register_error('count and replace', replacer)
    main()
