"""Text becomes token files: nothing lost, nothing half-written, and the same document always on the same side."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import CACHE, ROOT, run, start
from test_tokenizer import ODD, mistral_model

import sources
from dataset import Split
from tokenizer import load_tokenizer, train_bpe


@pytest.fixture(params=['bytes', 'gpt2'])
def tokenizer(request):
    if request.param == 'gpt2' and not os.environ.get('TIKTOKEN_CACHE_DIR'):
        pytest.skip(f'the BPE file of gpt2 is not at hand: no TIKTOKEN_CACHE_DIR, and no {CACHE}')
    return load_tokenizer(request.param)


def read(folder, split):
    return np.fromfile(folder / f'{split}.bin', '<u2').tolist()


def documents(folder, split, tok):
    """The texts of a split, cut at its end-of-text ids."""
    found, current = [], []
    for i in read(folder, split):
        if i == tok.eot_id:
            found.append(tok.decode(current))
            current = []
        else:
            current.append(i)
    assert not current
    return found


def test_a_folder_is_split_by_document_and_the_split_stays_when_documents_are_added(tmp_path):
    tok = load_tokenizer('bytes')
    notes = tmp_path / 'notes'
    (notes / 'deep' / 'drafts').mkdir(parents=True)
    texts = [f'# Note {i}\n\nIt says {i * i}.\n' for i in range(60)]
    for i, text in enumerate(texts):
        (notes / ('deep' if i % 2 else '.') / f'{i}.md').write_text(text)
    (notes / 'deep' / 'drafts' / 'no.md').write_text('not this one')
    (notes / 'picture.png').write_bytes(b'\x89PNG')
    (notes / 'empty.txt').write_text('')
    args = ('--source=notes', '--val_fraction=0.25', '--exclude=drafts')
    run('prepare.py', *args, '--name=mine', cwd=tmp_path)
    data = tmp_path / 'data' / 'mine'
    train, val = documents(data, 'train', tok), documents(data, 'val', tok)
    assert sorted(train + val) == sorted(texts) and 5 < len(val) < 25
    meta = json.loads((data / 'meta.json').read_text())
    for split, texts_in in (('train', train), ('val', val)):
        entry = meta['files'][f'{split}.bin']
        ids = read(data, split)
        assert entry['tokens'] == len(ids) and entry['documents'] == len(texts_in) and entry['max_id'] == max(ids)
        assert entry['bytes'] == sum(len(text.encode()) for text in texts_in)
    assert meta['tokenizer']['name'] == 'bytes' and meta['tokenizer']['fingerprint'] == tok.fingerprint()
    assert len((data / 'sources.tsv').read_text().splitlines()) == 1 + 61

    (notes / 'more.md').write_text('one more note')
    run('prepare.py', *args, '--name=grown', cwd=tmp_path)
    grown = tmp_path / 'data' / 'grown'
    assert set(train) <= set(documents(grown, 'train', tok)) and set(val) <= set(documents(grown, 'val', tok))

    run('prepare.py', *args, '--name=grown', '--overwrite', cwd=tmp_path)
    assert sorted(os.listdir(tmp_path / 'data')) == ['grown', 'mine']  # and no temporary folder


def test_jsonl_gives_a_document_a_line(tmp_path):
    tok = load_tokenizer('bytes')
    texts = [f'line {i}\nwith two rows, é' for i in range(40)]
    (tmp_path / 'dump.jsonl').write_text('\n'.join(json.dumps({'id': 1, 'body': text}) for text in texts) + '\n\n')
    run('prepare.py', '--source=dump.jsonl', '--text_field=body', '--name=dump', '--val_fraction=0.2', cwd=tmp_path)
    data = tmp_path / 'data' / 'dump'
    assert sorted(documents(data, 'train', tok) + documents(data, 'val', tok)) == sorted(texts)


def test_a_single_document_is_split_by_position(tmp_path, tokenizer):
    text = ' '.join(map(str, range(3000)))
    (tmp_path / 'one.txt').write_text(text)
    run('prepare.py', '--source=one.txt', '--name=one', '--val_fraction=0.1', f'--tokenizer={tokenizer.name}', cwd=tmp_path)
    train, val = (read(tmp_path / 'data' / 'one', split) for split in ('train', 'val'))
    assert train + val == tokenizer.encode(text) + [tokenizer.eot_id]
    assert len(val) == round(0.1 * len(train + val))
    files = json.loads((tmp_path / 'data' / 'one' / 'meta.json').read_text())['files']
    assert sum(entry['bytes'] for entry in files.values()) == len(text)
    assert sum(entry['documents'] for entry in files.values()) == 1


def test_bytes_that_are_not_text_are_counted_and_replaced(tmp_path):
    (tmp_path / 'broken.txt').write_bytes(b'good \xff\xfe bad \xc3')
    out, _ = run('prepare.py', '--source=broken.txt', '--name=broken', '--val_fraction=0', cwd=tmp_path)
    assert '3 stretches of bytes that are not UTF-8' in out
    ids = read(tmp_path / 'data' / 'broken', 'train')
    assert load_tokenizer('bytes').decode(ids) == 'good \ufffd\ufffd bad \ufffd'


def test_the_standard_library_is_prepared_without_tests(tmp_path):
    run('prepare.py', str(ROOT / 'data' / 'stdlib.py'), cwd=tmp_path)
    rows = [row.split('\t') for row in (tmp_path / 'data' / 'stdlib' / 'sources.tsv').read_text().splitlines()[1:]]
    names = [name for name, _, _ in rows]
    assert 'json/decoder.py' in names and names == sorted(names)
    assert not any(part in ('test', 'tests', 'site-packages') for name in names for part in name.split('/')[:-1])
    assert sum(int(size) for _, _, size in rows) > 8e6
    meta = json.loads((tmp_path / 'data' / 'stdlib' / 'meta.json').read_text())
    assert 'Python 3' in meta['note']


TEXTS = [f'{ODD[i % len(ODD)]} number {i}\n' * (1 + i % 7) for i in range(400)]


def write_sources(folder):
    """The same documents in every form that can be read; returns {form: arguments}."""
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    lines = ''.join(json.dumps({'id': i, 'text': text}, ensure_ascii=i % 2 == 0) + '\n' for i, text in enumerate(TEXTS))
    (folder / 'd.jsonl').write_text(lines, encoding='utf-8')
    with gzip.open(folder / 'd.jsonl.gz', 'wt', encoding='utf-8') as f:
        f.write(lines)
    with pyarrow.CompressedOutputStream(str(folder / 'd.jsonl.zst'), 'zstd') as f:
        f.write(lines.encode())
    table = pyarrow.table({'id': range(len(TEXTS)), 'text': TEXTS})
    parquet.write_table(table, folder / 'd.parquet', row_group_size=64)
    (folder / 'd.txt').write_text('\n<|doc|>\n'.join(text.strip('\n') for text in TEXTS), encoding='utf-8', newline='')
    (folder / 'hub').mkdir()
    for i in range(3):
        table = pyarrow.table({'id': range(len(TEXTS[i::3])), 'text': TEXTS[i::3]})
        parquet.write_table(table, folder / 'hub' / f'train-{i:05d}-of-00003.parquet')
    parquet.write_table(pyarrow.table({'text': ['another']}), folder / 'hub' / 'other.parquet')
    (folder / 'hub' / 'README.md').write_text('---\nconfigs:\n- config_name: most\n  data_files: train-*.parquet\n'
                                              '- config_name: other\n  data_files: other.parquet\n---\n')
    return {'jsonl': '--source=d.jsonl', 'gz': '--source=d.jsonl.gz', 'zst': '--source=d.jsonl.zst',
            'parquet': '--source=d.parquet', 'separated': '--source=d.txt --separator=<|doc|>',
            'hub': '--source=hf:hub --subset=most'}


@pytest.mark.slow
def test_every_form_of_source_gives_the_same_documents_on_the_same_side(tmp_path):
    tok = load_tokenizer('bytes')
    pytest.importorskip('datasets')
    found = {}
    for form, args in write_sources(tmp_path).items():
        run('prepare.py', *args.split(), f'--name={form}', '--val_fraction=0.2', cwd=tmp_path,
            env={'HF_HOME': str(tmp_path / 'hf')})
        data = tmp_path / 'data' / form
        found[form] = [sorted(text.strip('\n') for text in documents(data, side, tok)) for side in ('train', 'val')]
    texts = sorted(text.strip('\n') for text in TEXTS)
    separated = found.pop('separated')  # without the line ends beside the separator it is another text, on a side of its own
    assert sorted(separated[0] + separated[1]) == texts
    assert all(sorted(train + val) == texts and 40 < len(val) < 120 for train, val in found.values())
    assert all(sides == found['jsonl'] for sides in found.values())


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """A folder with 200 MB of .jsonl in three files, which make three units of work."""
    folder = tmp_path_factory.mktemp('many')
    line = json.dumps({'text': 'The owl fed the jar and waited. ' * 60})
    for k in range(3):
        with open(folder / f'{k}.jsonl', 'w') as f:
            f.writelines(line.replace('owl', f'owl {k}.{i}') + '\n' for i in range(34_000))
    return folder


MANY = ('--name=x', '--shard_tokens=50_000_000', '--val_fraction=0.01')


@pytest.fixture(scope='module')
def uninterrupted(many, tmp_path_factory):
    """{file: checksum} of what comes out of it."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    run('prepare.py', f'--source={many}', *MANY, '--num_workers=1', cwd=folder)
    return checksums(folder)


def checksums(folder):
    """{file: checksum} of a data set x, after checking that they are those of the manifest and nothing else lies there."""
    data = folder / 'data' / 'x'
    files = json.loads((data / 'meta.json').read_text())['files']
    found = {file: hashlib.sha256((data / file).read_bytes()).hexdigest() for file in files}
    assert found == {file: entry['sha256'] for file, entry in files.items()}
    assert sorted(os.listdir(data)) == sorted([*files, 'meta.json', 'sources.tsv', 'tokenizer.state.json'])
    assert os.listdir(folder / 'data') == ['x']
    return found


@pytest.mark.parametrize('num_workers', [2, 3])
def test_the_result_does_not_depend_on_the_number_of_workers(many, uninterrupted, tmp_path, num_workers):
    assert len(uninterrupted) == 6  # five shards of training, one of validation
    run('prepare.py', f'--source={many}', *MANY, f'--num_workers={num_workers}', cwd=tmp_path)
    assert checksums(tmp_path) == uninterrupted


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(many, uninterrupted, tmp_path):
    """Killed again and again, each time a little later, until it is done; the workers die with the parent."""
    work, seen = tmp_path / 'data' / 'x.unfinished', set()
    for attempt in range(100):
        process = start('prepare.py', f'--source={many}', *MANY, '--num_workers=2', cwd=tmp_path)
        try:
            process.communicate(timeout=0.6 + 0.15 * attempt)
        except subprocess.TimeoutExpired:
            process.kill()
            seen |= set(process.communicate()[0].split())  # which returns when the last process that can write to it is gone
            if (tmp_path / 'data' / 'x').exists():  # it was done already, all but its end
                break
            seen |= {path.suffix for path in work.rglob('*')}
            continue
        assert process.returncode == 0
        break
    assert attempt > 3 and {'.ids', '.tmp', '.bin', 'going'} <= seen  # 'going on: 2 of 3 units ...'
    assert checksums(tmp_path) == uninterrupted


def test_an_interrupt_stops_all_at_once_and_the_work_goes_on_later(many, uninterrupted, tmp_path):
    process = start('prepare.py', f'--source={many}', *MANY, '--num_workers=2', cwd=tmp_path, start_new_session=True)
    while not list((tmp_path / 'data').glob('x.unfinished/parts/*.ids')):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.split() == ['interrupted']
    run('prepare.py', f'--source={many}', *MANY, cwd=tmp_path)
    assert checksums(tmp_path) == uninterrupted


def test_a_worker_that_is_killed_is_reported_and_the_work_goes_on_later(many, uninterrupted, tmp_path):
    if not os.path.exists('/proc/self/task'):
        pytest.skip('the workers are found by /proc, which is not here')
    process = start('prepare.py', f'--source={many}', *MANY, '--num_workers=2', cwd=tmp_path)
    while not list((tmp_path / 'data').glob('x.unfinished/parts/*.ids')):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and 'error: a worker process was killed' in err and 'Traceback' not in err
    run('prepare.py', f'--source={many}', *MANY, cwd=tmp_path)
    assert checksums(tmp_path) == uninterrupted


def children(pid):
    with open(f'/proc/{pid}/task/{pid}/children') as f:
        return [int(child) for child in f.read().split()]


def test_a_full_disk_is_said_and_the_work_goes_on_when_there_is_room(many, uninterrupted, tmp_path):
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=150m', 'tmpfs', str(tmp_path)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f'a small file system cannot be mounted here: {mount.stderr.strip()}')
    try:
        _, err = run('prepare.py', f'--source={many}', *MANY, cwd=tmp_path, code=2)
        assert err.startswith('error: the disk of ') and 'is full' in err and len(err.splitlines()) == 1
        assert list((tmp_path / 'data').glob('x.unfinished/parts/*.ids')) and not (tmp_path / 'data' / 'x').exists()
        subprocess.run(['mount', '-o', 'remount,size=2g', str(tmp_path)], check=True)
        run('prepare.py', f'--source={many}', *MANY, cwd=tmp_path)
        assert checksums(tmp_path) == uninterrupted
    finally:
        subprocess.run(['umount', str(tmp_path)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='peak memory is read from /proc, which is not here')
def test_memory_does_not_grow_with_the_text(tmp_path):
    """The peak of all processes for one document of 180 MB is within 60 MB of that for one of 60 MB."""
    peaks = []
    for megabytes in (60, 180):
        (tmp_path / 'long.txt').write_text('The owl fed the jar and waited.\n' * (megabytes * 2**20 // 32))
        process, found = start('prepare.py', '--source=long.txt', f'--name=m{megabytes}', '--num_workers=2', cwd=tmp_path), {}
        while process.poll() is None:
            for pid in (process.pid, *children_of(process.pid)):
                found[pid] = max(found.get(pid, 0), peak_memory(pid))
            time.sleep(0.01)
        process.communicate()
        assert process.returncode == 0
        peaks.append(max(found.values()))  # MB
    assert peaks[1] - peaks[0] < 60, peaks


def children_of(pid):
    try:
        return children(pid)
    except OSError:
        return []


def peak_memory(pid):
    """MB; 0 for a process that is gone."""
    try:
        with open(f'/proc/{pid}/status') as f:
            return next((int(line.split()[1]) // 1024 for line in f if line.startswith('VmHWM')), 0)
    except OSError:
        return 0


def test_one_long_text_is_shared_by_workers_without_changing_an_id(tmp_path, monkeypatch):
    """Spans of 10,000 bytes of one text, each encoded on its own, give the ids of the whole."""
    monkeypatch.setattr(sources, 'SPAN', 10_000)
    text = ''.join(f'{ODD[i % 12]} {i}\n' for i in range(5000)).replace('\r', '')
    (tmp_path / 'long.txt').write_text(text, encoding='utf-8', newline='')
    names = ['bytes', 'gpt2', mistral_model()] if os.environ.get('TIKTOKEN_CACHE_DIR') else ['bytes', mistral_model()]
    for tok in map(load_tokenizer, names):
        spans = sources.find_spans([(str(tmp_path / 'long.txt'), 'long.txt')], '', divisible=True)
        parts = [doc for span in spans for doc in sources.Reader(cut=tok.cut).documents(span)]
        assert len(parts) == len(spans) > 10 and [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        ids = [[i for _, ids in tok.encode_pieces(part.pieces, begins=part.part == 0) for i in ids.tolist()] for part in parts]
        assert sum(ids, []) == tok.encode(text) and all(ids)
    for kind, separator, texts in (('jsonl', '', TEXTS), ('txt', '<|doc|>', [text.strip('\n') for text in TEXTS])):
        lines = '\n'.join(json.dumps({'text': text}) for text in texts) if kind == 'jsonl' else '\n<|doc|>\n'.join(texts)
        (tmp_path / f'd.{kind}').write_text(lines, encoding='utf-8', newline='')
        spans = sources.find_spans([(str(tmp_path / f'd.{kind}'), 'd')], separator, divisible=True)
        docs = [doc for span in spans for doc in sources.Reader(separator=separator).documents(span)]
        assert len(spans) > 3 and [''.join(doc.pieces) for doc in docs] == texts
        assert [doc.position for doc in docs] == sorted({doc.position for doc in docs})


def test_documents_are_shuffled_by_the_seed_and_none_is_torn(tmp_path):
    tok = load_tokenizer('bytes')
    texts = [f'document {i} ' + 'x' * (i % 50) for i in range(3000)]
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    orders = {}
    for seed in (1, 2):
        run('prepare.py', '--source=d.jsonl', f'--name=s{seed}', f'--seed={seed}', '--val_fraction=0', '--shard_tokens=20_000',
            cwd=tmp_path)
        data = tmp_path / 'data' / f's{seed}'
        files = json.loads((data / 'meta.json').read_text())['files']
        assert [len(files), *files] == [6, *(f'train_{i:05d}.bin' for i in range(6))]
        assert all(15_000 < entry['tokens'] < 25_000 for entry in files.values())
        orders[seed] = [text for file in files for text in documents(data, file.removesuffix('.bin'), tok)]
        assert sorted(orders[seed]) == sorted(texts)
    assert orders[1] != orders[2] and texts not in orders.values()
    places = np.array([texts.index(text) for text in orders[1]])
    assert abs(np.corrcoef(places, np.arange(3000))[0, 1]) < 0.1  # nothing of the former order is left
    split = Split(str(data), 'train', 100)
    assert split.n_windows == sum((entry['tokens'] - 1 - 99) // 100 for entry in files.values())


def test_duplicates_and_texts_of_the_wrong_length_are_left_out(tmp_path):
    tok = load_tokenizer('bytes')
    long = 'z ' * 1_500_000  # of several pieces
    texts = [*(f'text {i % 40}' for i in range(100)), 'tiny', long, long, 'y' * 200]
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    (tmp_path / 'copy.txt').write_text(long)
    args = ('--source=.', '--include=d.jsonl copy.txt', '--val_fraction=0')
    out, _ = run('prepare.py', *args, '--name=once', '--deduplicate', '--min_bytes=5', cwd=tmp_path)
    found = documents(tmp_path / 'data' / 'once', 'train', tok)
    assert sorted(found) == sorted([*(f'text {i}' for i in range(40)), long, 'y' * 200])
    assert '62 documents were left out as duplicates' in out and '1 documents were left out as shorter' in out
    run('prepare.py', *args, '--name=short', '--max_bytes=100', cwd=tmp_path)
    found = documents(tmp_path / 'data' / 'short', 'train', tok)
    assert sorted(found) == sorted([*texts[:100], 'tiny'])
    assert any(a == b for a, b in zip(sorted(found), sorted(found)[1:])) and sum(a == b for a, b in zip(found, found[1:])) < 10


def test_begun_or_finished_otherwise_it_refuses_with_the_way_out(tmp_path):
    (tmp_path / 'a.txt').write_text('a text ' * 100)
    args = ('--source=a.txt', '--name=x')
    run('prepare.py', *args, cwd=tmp_path)
    before = (tmp_path / 'data' / 'x' / 'meta.json').stat().st_mtime_ns
    out, _ = run('prepare.py', *args, cwd=tmp_path)
    assert 'data/x is there already, made from the same source with the same settings' in out
    assert (tmp_path / 'data' / 'x' / 'meta.json').stat().st_mtime_ns == before
    _, err = run('prepare.py', *args, '--val_fraction=0.2', cwd=tmp_path, code=2)
    assert 'data/x exists already, but val_fraction was 0.1, is now 0.2; --overwrite replaces it' in err
    (tmp_path / 'a.txt').write_text('another text ' * 100)
    _, err = run('prepare.py', *args, cwd=tmp_path, code=2)
    assert 'the source has changed: 1 files of 700 bytes then, 1 files of 1,300 bytes now' in err
    run('prepare.py', *args, '--overwrite', cwd=tmp_path)
    os.rename(tmp_path / 'data' / 'x', tmp_path / 'data' / 'x.unfinished')  # as if it had been killed at the end
    _, err = run('prepare.py', *args, '--seed=5', cwd=tmp_path, code=2)
    assert 'data/x.unfinished was begun otherwise: seed was 1337, is now 5' in err
    run('prepare.py', *args, '--seed=5', '--overwrite', cwd=tmp_path)
    assert os.listdir(tmp_path / 'data') == ['x']


def test_a_tokenizer_is_trained_kept_beside_the_data_and_used_for_more(tmp_path):
    pytest.importorskip('tokenizers')
    out, _ = run('prepare.py', f'--source={ROOT}', '--include=*.py', '--exclude=.* venv', '--tokenizer=bpe:1000', '--name=code',
                 cwd=tmp_path)
    assert 'training the tokenizer bpe:1000' in out
    data = tmp_path / 'data' / 'code'
    tok = load_tokenizer(str(data / 'tokenizer.json'))
    assert tok.vocab_size == 1000 and tok.tiktoken is not None
    texts = documents(data, 'train', tok) + documents(data, 'val', tok)
    assert (ROOT / 'model.py').read_text() in texts
    meta = json.loads((data / 'meta.json').read_text())
    assert meta['tokenizer']['fingerprint'] == tok.fingerprint() and meta['vocab_size'] == 1000
    (tmp_path / 'more.txt').write_text('def more(text):\n    return text\n' * 50)
    run('prepare.py', '--source=more.txt', '--tokenizer=data/code', '--name=more', cwd=tmp_path)
    flags = '--n_layer=1 --n_embd=32 --block_size=16 --batch_size=4 --max_iters=2 --eval_interval=2 --eval_iters=1'.split()
    nowhere = {'TIKTOKEN_CACHE_DIR': str(tmp_path / 'nowhere')}
    out, _ = run('train.py', '--dataset=code:0.5 more:0.5', '--out_dir=out/x', *flags, cwd=tmp_path, env=nowhere)
    assert 'val_bpb/more' in out
    run('sample.py', '--out_dir=out/x', '--prompt=def', '--max_new_tokens=5', cwd=tmp_path, env=nowhere)
    _, err = run('prepare.py', '--source=more.txt', '--tokenizer=bpe:100', '--name=no', cwd=tmp_path, code=2)
    assert 'write bpe:SIZE with a size of at least 258' in err


def test_training_needs_no_tokenizer_file_from_the_network(tmp_path):
    if not os.environ.get('TIKTOKEN_CACHE_DIR'):
        pytest.skip('the BPE file of gpt2 is not at hand')
    (tmp_path / 'a.txt').write_text('The owl fed the jar and waited. ' * 200)
    run('prepare.py', '--source=a.txt', '--name=a', '--tokenizer=gpt2', cwd=tmp_path)
    flags = '--n_layer=1 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=1 --eval_iters=1 --sample_tokens=5'.split()
    run('train.py', '--dataset=a', '--out_dir=out/a', '--sample_interval=1', *flags, cwd=tmp_path,
        env={'TIKTOKEN_CACHE_DIR': str(tmp_path / 'nowhere')})


def test_a_large_vocabulary_is_written_as_uint32_and_trained_on(tmp_path):
    pytest.importorskip('tokenizers')
    spec = json.loads(train_bpe(['The owl fed the jar and waited.'], 300, ['<|endoftext|>']))
    many = [{**spec['added_tokens'][0], 'id': 70_000 + i, 'content': f'<|{i}|>'} for i in range(3)]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec | {'added_tokens': spec['added_tokens'] + many}))
    (tmp_path / 'a.txt').write_text('The owl fed the jar and waited. ' * 100)
    run('prepare.py', '--source=a.txt', '--name=a', '--tokenizer=tokenizer.json', '--eot_token=<|2|>', cwd=tmp_path)
    data = tmp_path / 'data' / 'a'
    meta = json.loads((data / 'meta.json').read_text())
    assert (meta['dtype'], meta['vocab_size'], meta['eot_id']) == ('uint32', 70_003, 70_002)
    assert np.fromfile(data / 'val.bin', '<u4')[-1] == 70_002 and meta['files']['val.bin']['max_id'] == 70_002
    flags = '--n_layer=1 --n_embd=16 --block_size=8 --batch_size=2 --max_iters=1 --eval_iters=1 --sample_interval=0'.split()
    run('train.py', '--dataset=a', '--out_dir=out/a', *flags, cwd=tmp_path)


def test_documents_begin_with_bos_where_the_tokenizer_has_it(tmp_path):
    model = mistral_model()
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps({'text': f'owl {i}'}) + '\n' for i in range(50)))
    run('prepare.py', '--source=d.jsonl', f'--tokenizer={model}', '--name=m', '--val_fraction=0', cwd=tmp_path)
    data, tok = tmp_path / 'data' / 'm', load_tokenizer(model)
    docs = [[]]
    for i in read(data, 'train'):
        docs[-1].append(i)
        if i == tok.eot_id:
            docs.append([])
    assert len(docs) == 51 and all((doc[0], doc[-1]) == (1, 2) for doc in docs[:-1]) and not docs[-1]
    assert sorted(tok.decode(doc) for doc in docs[:-1]) == sorted(f'owl {i}' for i in range(50))
    assert json.loads((data / 'meta.json').read_text())['bos_id'] == 1


def test_special_tokens_in_the_text_become_ids_only_if_asked(tmp_path):
    if not os.environ.get('TIKTOKEN_CACHE_DIR'):
        pytest.skip('the BPE file of gpt2 is not at hand')
    (tmp_path / 'a.txt').write_text('one<|endoftext|>two')
    for parse, count in (('False', 1), ('True', 2)):
        run('prepare.py', '--source=a.txt', '--tokenizer=gpt2', f'--name=p{parse}', f'--parse_special={parse}',
            '--val_fraction=0', cwd=tmp_path)
        assert read(tmp_path / 'data' / f'p{parse}', 'train').count(50256) == count


def test_nanogpts_files_are_adopted_and_inspected(tmp_path):
    tok = load_tokenizer('bytes')
    theirs = tmp_path / 'theirs'
    theirs.mkdir()
    ids = {'train': [*b'first', 256, *b'second', 256] * 50, 'val': [*b'third', 256] * 20}
    for side, numbers in ids.items():
        np.array(numbers, np.uint16).tofile(theirs / f'{side}.bin')
    out, _ = run('prepare.py', '--adopt=theirs', '--tokenizer=bytes', '--name=mine', cwd=tmp_path)
    assert 'data/mine/train.bin: 650 tokens, 100 documents, 550 bytes' in out
    assert documents(tmp_path / 'data' / 'mine', 'val', tok) == ['third'] * 20
    flags = '--n_layer=1 --n_embd=16 --block_size=8 --batch_size=2 --max_iters=1 --eval_iters=1 --sample_interval=0'.split()
    run('train.py', '--dataset=mine', '--out_dir=out/a', *flags, cwd=tmp_path)
    out, _ = run('prepare.py', '--inspect=data/mine', cwd=tmp_path)
    assert 'ok' in out and 'adopted from theirs' in out
    assert any(f'{word}[end of text]' in out for word in ('first', 'second', 'third'))
    run('prepare.py', '--adopt=theirs', '--tokenizer=bytes', cwd=tmp_path)  # by the folder's own name
    assert (tmp_path / 'data' / 'theirs' / 'meta.json').exists()

    (tmp_path / 'data' / 'mine' / 'val.bin').unlink()
    np.array(ids['val'][::-1], np.uint16).tofile(tmp_path / 'data' / 'mine' / 'val.bin')
    out, err = run('prepare.py', '--inspect=mine', cwd=tmp_path, code=2)
    assert 'another checksum' in out and '1 of 2 files of data/mine are not as the manifest says' in err
    np.array([300], np.uint16).tofile(theirs / 'train.bin')
    _, err = run('prepare.py', '--adopt=theirs', '--tokenizer=bytes', '--name=no', cwd=tmp_path, code=2)
    assert "id 300 is beyond the 257 of tokenizer='bytes'" in err and not (tmp_path / 'data' / 'no').exists()
    (theirs / 'meta.pkl').write_bytes(b'')
    _, err = run('prepare.py', '--adopt=theirs', '--tokenizer=bytes', '--name=no', cwd=tmp_path, code=2)
    assert 'its ids stand for single characters' in err


def test_broken_records_are_counted_and_the_first_is_shown(tmp_path):
    tok = load_tokenizer('bytes')
    good = ''.join(json.dumps({'text': f'text {i}'}) + '\n' for i in range(30))
    (tmp_path / 'd.jsonl').write_text(good + '{"text": "cut\n' + good + '\n{"body": "x"}\n[1]\n{"text": null}\n')
    _, err = run('prepare.py', '--source=d.jsonl', '--name=x', cwd=tmp_path, code=2)
    assert all(words in err for words in ('d.jsonl, line 31 is not JSON', '(and 3 more in the same part', '--skip_broken'))
    assert not (tmp_path / 'data' / 'x.unfinished').exists()
    out, _ = run('prepare.py', '--source=d.jsonl', '--name=x', '--skip_broken', '--val_fraction=0', cwd=tmp_path)
    assert '4 records that are not JSON or have no text were passed over' in out
    assert len(documents(tmp_path / 'data' / 'x', 'train', tok)) == 60


def test_half_a_character_in_json_is_replaced(tmp_path):
    (tmp_path / 'd.jsonl').write_text('{"text": "a\\ud83d b \\ud83c\\udf5e"}\n')
    out, _ = run('prepare.py', '--source=d.jsonl', '--name=x', '--val_fraction=0', cwd=tmp_path)
    assert load_tokenizer('bytes').decode(read(tmp_path / 'data' / 'x', 'train')) == 'a\ufffd b 🍞'
    assert '1 stretches of bytes' in out


@pytest.mark.parametrize('damage', ['cut short', 'overwritten', 'another kind'])
@pytest.mark.parametrize('suffix', ['jsonl.gz', 'jsonl.zst', 'parquet'])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    write_sources(tmp_path)
    path = tmp_path / f'd.{suffix}'
    data = path.read_bytes()
    path.write_bytes({'cut short': data[:len(data) * 2 // 3], 'another kind': b'hello' * 1000,
                      'overwritten': data[:len(data) // 3] + bytes(200) + data[len(data) // 3 + 200:]}[damage])
    _, err = run('prepare.py', f'--source=d.{suffix}', '--name=x', cwd=tmp_path, code=2)
    assert err.startswith(f'error: d.{suffix}') and len(err.splitlines()) == 1, err
    assert not (tmp_path / 'data' / 'x').exists()


def test_a_wrong_field_or_name_is_said_with_what_there_is(tmp_path):
    pytest.importorskip('datasets')
    home = {'HF_HOME': str(tmp_path / 'hf')}
    args = write_sources(tmp_path)
    for form, place in (('jsonl', 'd.jsonl, line 1 has'), ('parquet', 'd.parquet has'), ('hub', ', row 0 has')):
        _, err = run('prepare.py', *args[form].split(), '--text_field=body', '--name=x', cwd=tmp_path, code=2, env=home)
        assert place in err and "no field text_field='body'" in err.replace('text in the field', 'field') and 'id, text' in err
    for source, words in (('--source=hf:hub --subset=none', 'none'), ('--source=hf:hub --subset=most --split=dev', 'dev'),
                          ('--source=hf:nobody/nothing', 'cannot be read'), ('--source=hf:hub', 'most')):
        _, err = run('prepare.py', *source.split(), '--name=x', cwd=tmp_path, code=2, env=home)
        assert err.startswith("error: source='hf:") and words in err and len(err.splitlines()) == 1, err
    assert not any((tmp_path / 'data').iterdir())


def test_a_tokenizer_is_trained_on_a_text_that_several_workers_share(tmp_path):
    pytest.importorskip('tokenizers')
    (tmp_path / 'long.txt').write_text(''.join(f'The owl fed jar {i} and waited.\n' for i in range(300_000)))
    run('prepare.py', '--source=long.txt', '--tokenizer=bpe:400', '--bpe_bytes=1_000_000', '--name=x', cwd=tmp_path)
    data = tmp_path / 'data' / 'x'
    tok = load_tokenizer(str(data))
    assert tok.decode(read(data, 'train') + read(data, 'val')) == (tmp_path / 'long.txt').read_text()


def test_a_text_without_a_place_to_cut_is_not_cut_by_spans(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'SPAN', 10_000)
    (tmp_path / 'long.txt').write_text('日本語' * 20_000 + ' and an end', encoding='utf-8')
    tok = load_tokenizer(mistral_model())
    spans = sources.find_spans([(str(tmp_path / 'long.txt'), 'long.txt')], '', divisible=True)
    parts = [doc for span in spans for doc in sources.Reader(cut=tok.cut).documents(span)]
    assert len(spans) > 10 and [part.last for part in parts] == [False, True]
    assert ''.join(piece for part in parts for piece in part.pieces) == (tmp_path / 'long.txt').read_text(encoding='utf-8')


def test_killed_before_there_is_a_plan_it_begins_anew(tmp_path):
    (tmp_path / 'a.txt').write_text('a text ' * 100)
    (tmp_path / 'data' / 'x.unfinished' / 'parts').mkdir(parents=True)
    run('prepare.py', '--source=a.txt', '--name=x', cwd=tmp_path)
    assert os.listdir(tmp_path / 'data') == ['x']


def test_two_at_once_do_not_disturb_each_other(many, uninterrupted, tmp_path):
    first = start('prepare.py', f'--source={many}', *MANY, '--num_workers=1', cwd=tmp_path)
    while not list((tmp_path / 'data').glob('x.unfinished/parts')):
        assert first.poll() is None
    _, err = run('prepare.py', f'--source={many}', *MANY, '--num_workers=1', cwd=tmp_path, code=2)
    assert 'another process is preparing this data set' in err
    first.communicate()
    assert first.returncode == 0 and checksums(tmp_path) == uninterrupted


def test_a_local_folder_of_the_hubs_form_that_changed_is_noticed(tmp_path):
    pytest.importorskip('datasets')
    home = {'HF_HOME': str(tmp_path / 'hf')}
    args = (*write_sources(tmp_path)['hub'].split(), '--name=x')
    run('prepare.py', *args, cwd=tmp_path, env=home)
    with open(tmp_path / 'hub' / 'README.md', 'a') as f:
        f.write('changed')
    _, err = run('prepare.py', *args, cwd=tmp_path, code=2, env=home)
    assert 'the source has changed' in err


def test_names_and_links_that_are_odd(tmp_path):
    tok = load_tokenizer('bytes')
    (tmp_path / 'notes').mkdir()
    for name in (b'\xff.txt', 'naïve 🍞.txt'.encode(), b'a;b.txt'):
        with open(os.path.join(os.fsencode(tmp_path / 'notes'), name), 'w') as f:
            f.write(f'text of {name}')
    run('prepare.py', '--source=notes', '--name=x', '--val_fraction=0', cwd=tmp_path)
    assert len(documents(tmp_path / 'data' / 'x', 'train', tok)) == 3
    (tmp_path / 'a.txt').write_text('one\n\ntwo\n\n\nthree')
    run('prepare.py', '--source=a.txt', r'--separator=\n\n', '--name=y', '--val_fraction=0', cwd=tmp_path)
    assert sorted(documents(tmp_path / 'data' / 'y', 'train', tok)) == ['one', 'three', 'two']
    (tmp_path / 'notes' / 'gone.txt').symlink_to('nowhere')
    for args, words in (('--source=notes --name=z', 'gone.txt is a link to nothing'),
                        ('--source=a.txt --name=x.old', "name='x.old' ends as the work's own files do"),
                        ('--source=a.txt --name=z --eot_token=x', "eot_token='x' is for a tokenizer.json"),
                        ('--source=http://[x --name=z', 'could not be fetched'),
                        ('--source=a.txt --name=z --tokenizer=bpe:³00', 'write bpe:SIZE')):
        _, err = run('prepare.py', *args.split(), cwd=tmp_path, code=2)
        assert words in err and len(err.splitlines()) == 1, err
