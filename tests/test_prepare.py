"""Text becomes token files: nothing lost, nothing half-written, and the same document always on the same side."""

import json
import os

import numpy as np
import pytest
from conftest import CACHE, ROOT, run

from configurator import UserError
from tokenizer import load_tokenizer, tokenizer_from_state

ODD = ['', 'plain words', 'naïve café — 日本語のテキスト 🍞👩‍🍳', '\x00\x01 control\r\nlines\r', '<|endoftext|> is text here',
       '1234567890' * 5, ' ' * 50 + '\n\n\n\t x', "it's we'll  they'd", 'e\u0301 combining']


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


def test_text_survives_a_round_trip(tokenizer):
    for text in ODD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot_id not in ids
        assert max(ids, default=0) < tokenizer.vocab_size
        stream = tokenizer.stream()
        assert ''.join(stream(i) for i in ids) == text


def test_a_stream_never_shows_half_a_character():
    tok = load_tokenizer('bytes')
    stream = tok.stream()
    assert [stream(i) for i in '🍞é'.encode()] == ['', '', '', '🍞', '', 'é']


def test_a_tokenizer_survives_in_a_checkpoint(tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))
    again = tokenizer_from_state(state)
    assert all(again.encode(text) == tokenizer.encode(text) for text in ODD)
    assert again.fingerprint() == tokenizer.fingerprint() and again.vocab_size == tokenizer.vocab_size


def test_an_unknown_tokenizer_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match='gpt3.*bytes.*gpt2'):
        load_tokenizer('gpt3')


def test_a_long_text_is_cut_where_it_changes_no_id(tokenizer, tmp_path):
    """Three million characters, read in pieces, give the ids of the whole."""
    gaps = (' ', '  ', '\n\n ', '\n', '', ' \t', ' ')
    text = ''.join(f'{word}{gap}' for i in range(30_000) for word, gap in
                   zip((f'word{i}', '日本語', '...', "it's", '🍞' * 3, str(i * 7919), 'Ende'), gaps))
    assert len(text) > 2**20
    (tmp_path / 'long.txt').write_text(text, newline='')
    run('prepare.py', '--source=long.txt', f'--tokenizer={tokenizer.name}', '--name=long', '--val_fraction=0', cwd=tmp_path)
    assert read(tmp_path / 'data' / 'long', 'train') == tokenizer.encode(text) + [tokenizer.eot_id]


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
