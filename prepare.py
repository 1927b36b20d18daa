"""
Prepares text for training: documents → token ids in data/<name>/train*.bin and val*.bin, and a manifest, meta.json.

    python prepare.py data/shakespeare.py                                  # a recipe
    python prepare.py --source=notes/ --tokenizer=gpt2 --name=mine         # your own text
    python prepare.py --source=dump.jsonl.gz --text_field=body --tokenizer=bpe:8192 --name=dump
    python prepare.py --source=hf:HuggingFaceFW/fineweb-edu --subset=sample-10BT --tokenizer=gpt2 --name=edu
    python prepare.py --inspect=data/mine                                  # what is in it, and whether it is whole
    python prepare.py --adopt=../nanoGPT/data/openwebtext --tokenizer=gpt2 # nanoGPT's own files

Whether a document goes to validation is decided by a hash of its text, so that it stays there whatever is added. A text
of one document (or so few that the hash picks none) is split by position: its end is validation.

What a kill leaves unfinished is taken up by the same command, and the result does not depend on the number of workers
(see shards.py). All of it is in data/<name>.unfinished/ until it is complete.
"""

from configurator import UserError, at_least, configure

# ---- the text
source = ''  # a text file, .jsonl or Parquet file, a folder of them, an http(s) address of one, or hf:ORGANISATION/DATASET
include = '*.txt *.md *.jsonl *.jsonl.gz *.jsonl.zst *.parquet'  # in a folder: the files to read, patterns separated by blanks
exclude = ''  # in a folder: names of files and folders to pass over, patterns separated by blanks
text_field = 'text'  # the field of a .jsonl line, or the column of Parquet or of a data set on the hub, that holds the text
separator = ''  # what stands between two documents of a text file (\n is a line end), line ends around it aside; '' = a file
                # is a document
subset = ''  # hf: the configuration, such as sample-10BT; '' = the only one
split = 'train'  # hf: the split that is read; training and validation are both made from it
revision = ''  # hf: a commit or branch; '' = the latest
skip_broken = False  # pass over lines that are not JSON or have no text, and count them, instead of stopping
allow_network = True  # False refuses sources that would have to be fetched
# ---- conversations, instead of text
stage = 'pretrain'  # pretrain | sft | dpo: texts, or conversations (messages, or prompt and response), or pairs of them
                    # (prompt, chosen and rejected), for the stages of train.py
block_size = 1024  # sft and dpo: tokens in a row, which is training's block_size; what is longer is cut
chat_template = ''  # sft and dpo: a file (Jinja) with the template; '' = the tokenizer's own, or ChatML, whose tokens it gets
fields = ''  # sft and dpo: what a record calls them: 'prompt=question response=answer'; 'prompt=a+b' is both, where not empty
# ---- the tokens
tokenizer = 'bytes'  # bytes, a tiktoken encoding such as gpt2, bpe:SIZE to train one on the text, the path of a
                     # tokenizer.json or SentencePiece model or of a folder with one, or a Hugging Face id
eot_token = ''  # ends each document; '' = the tokenizer's own end-of-text
special_tokens = '<|endoftext|>'  # bpe: the special tokens it gets, separated by blanks
bpe_bytes = 1_000_000_000  # bpe: it is trained on the first so many bytes of the training documents
parse_special = False  # True: a special token spelled in the text becomes its id; False: it is text like any other
# ---- the data set
name = ''  # the data set's name: files go to data/<name>/
val_fraction = 0.1  # share of the documents (or, of a single document, of its tokens) kept for validation; 0 keeps none
deduplicate = False  # keep only one of several documents with the same text
min_bytes = 0  # leave out documents with fewer bytes of text
max_bytes = 0  # leave out documents with more; 0 = any
shard_tokens = 100_000_000  # tokens in a file, about; a document longer than that makes its file longer
seed = 1337  # of the documents' order
note = ''  # a sentence about the data that goes into the manifest
# ---- the work
num_workers = 0  # processes; 0 = one for each CPU core
overwrite = False  # replace a data set of the same name, or one that was begun with other settings
inspect = ''  # instead of preparing: print and check the data set of this name or folder
adopt = ''  # instead of preparing: a folder with nanoGPT's train.bin and val.bin, to be used as they are
# ----
config = configure(globals())

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil

import numpy as np

import rows
import shards
import sources
from chat import for_chats, parse_fields
from dataset import folder_of, read_meta, read_tokenizer
from files import alone, read_json, write_whole
from tokenizer import BEFORE_WORD, STATE_FILE, HuggingFaceTokenizer, load_tokenizer, train_bpe

OF_CONVERSATIONS = ('stage', 'block_size', 'chat_template', 'fields')
OF_THE_WORK = ('name', 'note', 'num_workers', 'overwrite', 'allow_network', 'inspect', 'adopt')  # settings not of the result
VERSION = 1  # of how a source is divided and its documents are ordered: what one began, another cannot finish


# ---- the plan: what the result is a function of

def make_plan(files, tok, begun):
    """The settings and the state of the source, as plain data; `begun`: plans that were made before, or None each."""
    settings = {key: value for key, value in config.items()
                if key not in OF_THE_WORK and (stage != 'pretrain' or key not in OF_CONVERSATIONS)}
    if files is None and source.startswith('hf:'):
        # the data set that the name stood for when the work began, or stands for now
        pinned = [plan['source']['revision'] for plan in begun if plan and
                  all(plan['settings'][key] == settings[key] for key in ('source', 'revision'))]
        state = {'revision': pinned[0] if pinned else sources.hub_revision(source[3:], revision)}
    elif files is None:
        state = {}  # at an address
    else:
        each = [(name, os.path.getsize(path), os.stat(path).st_mtime_ns) for path, name in files]
        state = {'files': len(each), 'bytes': sum(size for _, size, _ in each),
                 'state': shards.hash_bytes(json.dumps(each).encode()).hex()}
    plan = {'version': VERSION, 'settings': settings, 'source': state, 'tokenizer': tok and tok.fingerprint()}
    return plan if stage == 'pretrain' else plan | {'template': tok.beside['chat_template']}


def read_plan(folder):
    """The plan of a data set that is finished or was begun in `folder`, or None."""
    for file in ('plan.json', 'meta.json'):
        try:
            found = read_json(os.path.join(folder, file))
            return found if file == 'plan.json' else found.get('plan')
        except (OSError, ValueError):
            pass
    return None


def difference(then, now):
    """In words, what differs between two plans; '' if nothing does."""
    if not then or then.get('version') != now['version']:
        return 'it was made by another version of prepare.py' if then else 'it has no record of how it was made'
    changed = [f'{key} was {then["settings"].get(key)!r}, is now {value!r}' for key, value in now['settings'].items()
               if then['settings'].get(key) != value]
    if changed:
        return ', '.join(changed)
    if then['source'] != now['source']:
        was, now = (f'{plan["source"].get("files", 1):,} files of {plan["source"].get("bytes", 0):,} bytes'
                    for plan in (then, now))
        return 'the source has changed' + (f': {was} then, {now} now' if was != now else ', though not in size')
    if then.get('template') != now.get('template'):
        return 'the chat template is another one now'
    return '' if then['tokenizer'] == now['tokenizer'] else f'the tokenizer {tokenizer} is another one now'


# ---- the work

def train_tokenizer(folder, reader, units):
    """The tokenizer of 'bpe:SIZE', trained on the beginning of the documents that are not for validation."""
    size = tokenizer.removeprefix('bpe:')
    special = special_tokens.split()
    if eot_token:
        raise UserError(f"eot_token='{eot_token}' is for a tokenizer.json; what bpe trains ends texts with <|endoftext|>")
    if not size.isdecimal() or int(size) < 257 + len(special):
        raise UserError(f"tokenizer='{tokenizer}': write bpe:SIZE with a size of at least {257 + len(special)}, which is the "
                        'bytes, the special tokens and one merge')
    if '<|endoftext|>' not in special:
        raise UserError(f"special_tokens='{special_tokens}' must have <|endoftext|> among them, which ends each document")
    n_bytes = 0

    def texts():
        nonlocal n_bytes
        for span in (span for unit in units for span in unit):
            for doc in reader.documents(span):
                if not shards.goes_to_val(doc, val_fraction):
                    for text in doc.pieces:
                        yield text
                        n_bytes += len(text.encode('utf-8', 'replace'))
                        if n_bytes >= bpe_bytes:
                            return

    print(f'training the tokenizer {tokenizer}', flush=True)
    text = train_bpe(texts(), int(size), special)
    tok = HuggingFaceTokenizer(tokenizer, text, json.loads(text)['model']['vocab']['<|endoftext|>'])
    if tok.cut is None:
        raise UserError(f"special_tokens='{special_tokens}' are words of the text; write them unlike it, such as <|name|>")
    print(f'trained it on {n_bytes:,} bytes of text')
    if tok.vocab_size < int(size):
        print(f'note: the text gave only {tok.vocab_size:,} tokens of {int(size):,}')
    write_whole(os.path.join(folder, 'tokenizer.json'), text.encode())
    return tok


def prepare(folder, files, tok, plan, workers):
    """
    Everything from the settings to the finished files in `folder`; goes on from what it holds already.

    `files`: of the source, None if it is in the network; `tok`: the tokenizer, None if it is to be trained.
    """
    os.makedirs(os.path.join(folder, 'parts'), exist_ok=True)
    write_whole(os.path.join(folder, 'plan.json'), json.dumps(plan, indent=2).encode())
    reader = {'text_field': text_field, 'separator': separator.replace('\\n', '\n'), 'skip_broken': skip_broken,
              'fields': fields}
    job = shards.Job(folder, reader, parse_special, val_fraction, deduplicate, min_bytes, max_bytes, shard_tokens, seed, stage,
                     block_size)
    if source.startswith('hf:'):
        spans = sources.hub_spans(source[3:], subset, split, plan['source'].get('revision', ''))
    else:
        if files is None:
            files = [(sources.fetch(source, os.path.join(folder, 'download')), os.path.basename(source))]
        spans = sources.find_spans(files, reader['separator'], divisible=not tok or tok.cut is not None)
    plain_text = [span.path for span in spans if span.kind in ('text', 'separated')]
    if stage != 'pretrain' and plain_text:
        raise UserError(f"stage='{stage}' reads conversations from .jsonl, Parquet or the hub, and {plain_text[0]} is none of "
                        'these; --exclude passes it over')
    units = sources.in_units(spans, sources.span_size(files or []))

    # the tokenizer lies beside the data, so that nothing else is needed from here on
    if not os.path.exists(os.path.join(folder, STATE_FILE)):
        tok = tok or train_tokenizer(folder, sources.Reader(cut=BEFORE_WORD, **reader), units)
        write_whole(os.path.join(folder, STATE_FILE), json.dumps(tok.state()).encode())

    # first round: documents → parts
    report_paths = [job.path(f'{i:06d}.json') for i in range(len(units))]
    reports = {i: read_json(path) for i, path in enumerate(report_paths) if os.path.exists(path)}
    todo = {i: (job, i, unit) for i, unit in enumerate(units) if i not in reports}
    if reports and todo:
        print(f'going on: {len(reports)} of {len(units)} units of the source are encoded already', flush=True)
    plain = all(span.kind in ('text', 'separated', 'jsonl') and span.end >= 0 for span in spans)
    total = sum(span.size for i in todo for span in units[i]) if plain else 0
    reports |= workers.run(shards.encode_unit, todo, 'encoding', total)
    reports = [reports[i] for i in range(len(units))]
    if not any(report['tokens'] for report in reports):
        broken = next((f'; {report["first_broken"]}' for report in reports if report['broken']), '')
        none = ', '.join(f'{n} {rows.OUTCOMES[key]}' for key, n in outcomes(reports).items() if n)
        raise UserError(f"source='{source}': no {'text' if stage == 'pretrain' else 'conversation'} in "
                        f"{len(files or spans)} files (include='{include}'){broken}" + (f'; {none}' if none else ''))

    # second round: parts → shards
    parts = [part for report in reports for part in report['parts']]
    ranges = shards.plan_shards(job, parts)
    entry_paths = {file: os.path.join(folder, f'{file}.json') for file in ranges}
    entries = {file: read_json(path) for file, path in entry_paths.items() if os.path.exists(path)}
    todo = {file: (job, parts, file, keys) for file, keys in ranges.items() if file not in entries}
    entries |= workers.run(shards.write_shard, todo, 'shuffling')
    left_out = {'duplicates': sum(entry.pop('duplicates') for entry in entries.values())}
    if any(file.startswith('all') for file in ranges):
        entries = shards.split_by_position(job, list(ranges))

    # the manifest
    left_out |= {key: sum(report[key] for report in reports) for key in ('too_short', 'too_long', 'broken')} | outcomes(reports)
    write_sources(folder, reports)
    meta = manifest(job.tokenizer(), dict(sorted(entries.items())), note) | {
        'left_out': left_out, 'replaced': sum(report['replaced'] for report in reports), 'plan': plan}
    write_whole(os.path.join(folder, 'meta.json'), json.dumps(meta, indent=2).encode())


def outcomes(reports):
    """What was done with conversations, and how often."""
    return {key: sum(report[key] for report in reports) for key in rows.OUTCOMES} if stage != 'pretrain' else {}


def manifest(tok, entries, note):
    return {'dtype': shards.token_dtype(tok).name, 'vocab_size': tok.vocab_size, 'eot_id': tok.eot_id, 'bos_id': tok.bos_id,
            'tokenizer': {'name': tok.name, 'fingerprint': tok.fingerprint(), 'file': STATE_FILE},
            'files': entries, 'note': note} | ({} if stage == 'pretrain' else {
                'stage': stage, 'block_size': block_size, 'chat_template': tok.beside['chat_template']})


def write_sources(folder, reports):
    """sources.tsv: the files that were read, with their documents and bytes of text."""
    found = {}
    for report in reports:
        for file, counts in report['files'].items():
            found[file] = [a + b for a, b in zip(found.get(file, (0, 0)), counts)]
    rows = [f'{file}\t{documents}\t{n_bytes}\n' for file, (documents, n_bytes) in found.items()]
    text = ''.join(['file\tdocuments\tbytes\n', *rows])
    write_whole(os.path.join(folder, 'sources.tsv'), text.encode('utf-8', 'backslashreplace'))


def finish(folder, target):
    """Removes what only the work needed, and gives the folder its name."""
    files = read_json(os.path.join(folder, 'meta.json'))['files']
    for entry in os.listdir(folder):
        path = os.path.join(folder, entry)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif entry not in {*files, *(file.get('mask') for file in files.values()), 'meta.json', 'sources.tsv', STATE_FILE,
                           'tokenizer.json'}:
            os.remove(path)
    old = f'{target}.old'
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(target):
        os.replace(target, old)
    os.replace(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def summarize(target, meta):
    left_out = meta.get('left_out', {})
    what_is = {'sft': 'conversations', 'dpo': 'pairs'}.get(meta.get('stage'), 'documents')
    for n, what in (*((left_out.get(key), f'{what_is} {words}') for key, words in rows.OUTCOMES.items()),
                    (meta.get('replaced'), 'stretches of bytes that are not UTF-8 were replaced by U+FFFD'),
                    (left_out.get('broken'), 'records that are not JSON or have no text were passed over'),
                    (left_out.get('duplicates'), 'documents were left out as duplicates'),
                    (left_out.get('too_short'), f'documents were left out as shorter than min_bytes={min_bytes}'),
                    (left_out.get('too_long'), f'documents were left out as longer than max_bytes={max_bytes}')):
        if n:
            print(f'note: {n:,} {what}')
    for kind in ('train', 'val'):
        files = [file for file in meta['files'] if file.startswith(kind)]
        if files:
            tokens, documents, n_bytes = (sum(meta['files'][file][key] for file in files)
                                          for key in ('tokens', 'documents', 'bytes'))
            what = f'{target}/{files[0]}' if len(files) == 1 else f'{target}/{kind}_*.bin, {len(files)} files'
            if 'stage' in meta:
                taught = sum(meta['files'][file]['taught'] for file in files)
                print(f"{what}: {documents:,} {what_is} in {tokens // meta['block_size']:,} rows of {meta['block_size']:,} "
                      f'tokens, {taught:,} of them taught')
            else:
                of = f'{documents:,} document{"s" * (documents > 1)}' if documents else 'a part of one document'
                print(f'{what}: {tokens:,} tokens, {of}, {n_bytes:,} bytes')
    if 'stage' in meta and not any(file.startswith('val') for file in meta['files']):
        print('note: there is nothing for validation')


def check_settings():
    if not source or not name:
        raise UserError(f"source='{source}' and name='{name}' must both be given: --source=PATH --name=mine")
    if not re.fullmatch(r'[\w.-]+', name) or name.startswith('.'):
        raise UserError(f"name='{name}' may have letters, digits, '_', '-' and '.' (not first) only: it becomes a folder")
    if name.endswith(('.old', '.unfinished', '.lock')):
        raise UserError(f"name='{name}' ends as the work's own files do; choose another")
    if stage == 'pretrain' and (fields or chat_template):
        raise UserError(f"fields='{fields}', chat_template='{chat_template}' are for conversations: --stage=sft, or dpo")
    if stage != 'pretrain' and tokenizer.startswith('bpe:'):
        raise UserError(f"tokenizer='{tokenizer}' with stage='{stage}': conversations are written in the tokenizer of the "
                        'model that is to learn them; name that, or the data it was trained on: --tokenizer=data/NAME')
    if stage != 'pretrain' and parse_special:
        raise UserError(f"parse_special is for texts, not for stage='{stage}'; leave it out")
    if stage != 'pretrain' and block_size >= 2**24:
        raise UserError(f'block_size={block_size} is not below {2**24}')
    parse_fields(fields)
    if not 0 <= val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} is not within 0 <= val_fraction < 1')
    at_least(config, 0, 'min_bytes', 'max_bytes', 'num_workers', 'seed')
    at_least(config, 1, 'shard_tokens', 'bpe_bytes')
    at_least(config, 2, 'block_size')
    remote = re.match('https?://', source) or source.startswith('hf:') and not os.path.isdir(source[3:])
    if remote and not allow_network:
        raise UserError(f'{source} would have to be fetched from the network')


def main():
    check_settings()
    target = folder_of(name)
    folder = f'{target}.unfinished'
    if source.startswith('hf:') and os.path.isdir(source[3:]):
        files = sources.find_files(source[3:])
    else:
        files = None if re.match('https?://|hf:', source) else sources.find_files(source, include, exclude)
    tok = None if tokenizer.startswith('bpe:') else load_tokenizer(tokenizer, eot_token)
    if stage != 'pretrain':
        tok = for_chats(tok, chat_template)
    os.makedirs('data', exist_ok=True)
    with alone(f'{target}.lock', f'{target}: another process is preparing this data set; wait, or choose another --name'):
        prepare_or_go_on(target, folder, files, tok)


def prepare_or_go_on(target, folder, files, tok):
    """Makes data set `target`, in `folder` until it is complete, unless it is there already."""
    plan = make_plan(files, tok, [read_plan(folder), read_plan(target)])
    if os.path.exists(target) and not overwrite:
        changed = difference(read_plan(target), plan)
        if changed:
            raise UserError(f'{target} exists already, but {changed}; --overwrite replaces it, --name chooses another')
        shutil.rmtree(f'{target}.old', ignore_errors=True)  # of a kill at the very end
        print(f'{target} is there already, made from the same source with the same settings')
        return summarize(target, read_json(os.path.join(target, 'meta.json')))
    if os.path.exists(folder):
        begun = read_plan(folder)  # none: killed before there was one, or while the folder was removed
        changed = difference(begun, plan)
        if changed and begun and not overwrite:
            raise UserError(f'{folder} was begun otherwise: {changed}; that command goes on, --overwrite begins anew')
        if changed:
            shutil.rmtree(folder)
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        try:
            with shards.Workers(num_workers) as workers:
                prepare(folder, files, tok, plan, workers)
        except UserError:
            kept = [file for _, _, files in os.walk(folder) for file in files]
            if not any(file.endswith('.ids') for file in kept) and not {'tokenizer.json', os.path.basename(source)} & set(kept):
                shutil.rmtree(folder)  # there is nothing to go on from
            raise
    finish(folder, target)
    summarize(target, read_json(os.path.join(target, 'meta.json')))


# ---- instead of preparing

def inspect_data(which):
    """Prints what a data set holds, checks every file against the manifest, and shows a piece of its text."""
    folder = folder_of(which.rstrip('/'))
    meta = read_meta(folder)
    tok = read_tokenizer(folder, meta)
    dtype = np.dtype(meta['dtype']).newbyteorder('<')
    print(f"{folder}: {meta.get('note') or 'no note'}\n"
          f"tokenizer {meta['tokenizer']['name']}, {meta['vocab_size']:,} ids as {meta['dtype']}, end of text {meta['eot_id']}")
    print(f"\n{'file':<20} {'tokens':>16} {'documents':>12} {'bytes of text':>16} {'per token':>9}  check")
    wrong = []
    for file, entry in meta['files'].items():
        problem = check_file(os.path.join(folder, file), entry, dtype, meta['vocab_size'])
        if 'mask_sha256' in entry:
            of_mask = {'tokens': entry['tokens'], 'sha256': entry['mask_sha256']}
            mask_problem = check_file(os.path.join(folder, entry['mask']), of_mask, np.dtype(np.uint8), 4)
            problem = problem or mask_problem and f"{entry['mask']}: {mask_problem}"
        wrong += [problem] * bool(problem)
        print(f"{file:<20} {entry['tokens']:>16,} {entry['documents']:>12,} {entry['bytes']:>16,} "
              f"{entry['bytes'] / max(1, entry['tokens']):>9.3f}  {problem or 'ok'}", flush=True)
    print('\nleft out: ' + (', '.join(f'{n:,} {what}' for what, n in meta.get('left_out', {}).items()
                                     if n and what != 'cut') or 'nothing'))
    if wrong:
        raise UserError(f'{len(wrong)} of {len(meta["files"])} files of {folder} are not as the manifest says; prepare the '
                        'data again')
    file, entry = random.choice(list(meta['files'].items()))
    if 'stage' in meta:
        return show_conversation(folder, file, entry, meta, tok, dtype)
    start = random.randrange(max(1, entry['tokens'] - 200))
    shown = np.fromfile(os.path.join(folder, file), dtype, 200, offset=start * dtype.itemsize)
    texts = [tok.decode(part.tolist()) for part in np.split(shown, np.flatnonzero(shown == meta['eot_id']) + 1)]
    print(f'\n{file} from token {start:,} on:\n--------\n' + '[end of text]\n'.join(texts) + '\n--------')
    return None


def show_conversation(folder, file, entry, meta, tok, dtype):
    """Prints the first conversation of some row (and, of pairs, the rejected one too), what is taught within [[ and ]]."""
    size, n = meta['block_size'], rows.sides(meta['stage'])
    first = n * random.randrange(max(1, entry['tokens'] // size // n))
    spelled = {i: token for token, i in tok.special.items()}
    for row in range(first, first + n):
        ids = np.fromfile(os.path.join(folder, file), dtype, size, offset=row * size * dtype.itemsize)
        bits = np.fromfile(os.path.join(folder, entry['mask']), np.uint8, size, offset=row * size)
        end = next((at for at in range(1, len(bits)) if bits[at] & rows.BEGINS), len(bits))
        end = max((at + 1 for at in range(end) if ids[at] != meta['eot_id'] or bits[at] & rows.TAUGHT), default=end)  # unfilled
        runs = [(taught, [i for i, _ in run])
                for taught, run in itertools.groupby(zip(ids[:end].tolist(), bits[:end]), lambda pair: pair[1] & rows.TAUGHT)]
        text = ''
        for taught, part in runs:
            words = ''.join(''.join(spelled[i] for i in run) if special else tok.decode([*run])
                            for special, run in itertools.groupby(part, lambda i: i in spelled))
            text += f'[[{words}]]' if taught else words
        print(f'\n{file}, row {row:,}, what is taught within [[ and ]]:\n--------\n{text}\n--------')


def check_file(path, entry, dtype, vocab_size):
    """What is wrong with a token file, by its manifest entry; '' if nothing is."""
    if not os.path.isfile(path):
        return 'missing'
    if os.path.getsize(path) != entry['tokens'] * dtype.itemsize:
        return f'has {os.path.getsize(path):,} bytes instead of {entry["tokens"] * dtype.itemsize:,}'
    max_id, sha256 = 0, hashlib.sha256()
    with open(path, 'rb') as f:
        while len(ids := np.fromfile(f, dtype, shards.PART_TOKENS)):
            max_id = max(max_id, int(ids.max()))
            sha256.update(ids.tobytes())
    if sha256.hexdigest() != entry['sha256']:
        return 'another checksum'
    return '' if max_id == entry.get('max_id', max_id) < vocab_size else f'largest id {max_id}, vocabulary {vocab_size}'


def adopt_data(origin):
    """Makes a data set of nanoGPT's train.bin and val.bin: links to them, and a manifest."""
    if stage != 'pretrain':
        raise UserError(f"adopt is for texts, not for stage='{stage}'; leave it out")
    data_name = name or os.path.basename(os.path.abspath(origin))
    target = folder_of(data_name)
    tok = load_tokenizer(tokenizer, eot_token)
    files = [file for file in ('train.bin', 'val.bin') if os.path.isfile(os.path.join(origin, file))]
    if 'train.bin' not in files:
        raise UserError(f"adopt='{origin}' has no train.bin")
    if os.path.exists(os.path.join(origin, 'meta.pkl')):
        raise UserError(f"adopt='{origin}' has a meta.pkl: its ids stand for single characters, which no tokenizer here gives; "
                        'prepare its text instead, --source=PATH/input.txt')
    in_place = os.path.realpath(target) == os.path.realpath(origin)  # only the manifest is missing
    if os.path.exists(os.path.join(target, 'meta.json') if in_place else target) and not overwrite:
        raise UserError(f'{target} exists already; --overwrite replaces it, --name chooses another')
    bytes_of, entries = shards.token_bytes(tok), {}
    for file in files:
        entry, sha256 = {'tokens': 0, 'documents': 0, 'bytes': 0, 'max_id': 0}, hashlib.sha256()
        with open(os.path.join(origin, file), 'rb') as f:
            while len(ids := np.fromfile(f, '<u2', shards.PART_TOKENS)):
                if ids.max() >= tok.vocab_size:
                    raise UserError(f"{origin}/{file}: id {ids.max()} is beyond the {tok.vocab_size} of "
                                    f"tokenizer='{tokenizer}'; name the one that the file was made with")
                entry = {'tokens': entry['tokens'] + len(ids), 'documents': entry['documents'] + int((ids == tok.eot_id).sum()),
                         'bytes': entry['bytes'] + int(bytes_of[ids].sum()), 'max_id': max(entry['max_id'], int(ids.max()))}
                sha256.update(ids.tobytes())
        entries[file] = {**entry, 'sha256': sha256.hexdigest()}
    if not in_place:
        shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target, exist_ok=True)
    for file in files if not in_place else ():
        here, there = os.path.join(target, file), os.path.abspath(os.path.join(origin, file))
        try:
            os.link(there, here)
        except OSError:  # another file system
            os.symlink(there, here)
    write_whole(os.path.join(target, STATE_FILE), json.dumps(tok.state()).encode())
    meta = manifest(tok, entries, note or f'adopted from {origin}')
    write_whole(os.path.join(target, 'meta.json'), json.dumps(meta, indent=2).encode())
    summarize(target, meta)


if __name__ == '__main__':
    try:
        if inspect:
            inspect_data(inspect)
        elif adopt:
            adopt_data(adopt)
        else:
            main()
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f'the disk of {os.path.abspath("data")} is full; make room, and the same command goes on from what is '
                        f'there') from None
