"""
Input that is broken, or made to harm: one clear line, never a traceback, a hang, code that runs, or more memory than the file
can justify. Hypothesis makes up what nobody thought of, the same in every run.
"""

import base64
import collections
import copy
import dataclasses
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT, write_tokens

hypothesis = pytest.importorskip('hypothesis', reason='what it makes up is the test: pip install hypothesis')
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import checkpoint
import configurator
import logs
import torchfile
from configurator import UserError
from dataset import Split, read_meta, read_tokenizer
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer, tokenizer_from_state

settings.register_profile('same', derandomize=True, deadline=None, database=None, max_examples=80,
                          suppress_health_check=list(HealthCheck))
settings.register_profile('search', parent=settings.get_profile('same'), derandomize=False)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'same'))  # 'search' looks further each time

SHAPE = ModelConfig(block_size=4, vocab_size=257, n_layer=1, n_head=2, n_embd=4, norm='rmsnorm', mlp='swiglu', pos='rope',
                    bias=False, n_inner=8)
NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([2**31, 2**63, -2**63, 10**12, 10**18, 10**30]))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5), st.sampled_from(
    ['../x', '/etc/passwd', 'a\nb', '\x1b[2J', '\0'])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=5)


def contents():
    """A checkpoint's, of the smallest model."""
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    opt.step()
    entry = {'tokens': 9, 'documents': 1, 'bytes': 9, 'max_id': 3, 'sha256': 'x'}
    return {'model': model.state_dict(), 'model_config': dataclasses.asdict(SHAPE), 'optimizer': opt.state_dict(), 'scaler': {},
            'config': {'batch_size': 2, 'learning_rate': 0.1, 'dataset': 'x', 'bias': False},
            'tokenizer': {'kind': 'bytes', 'name': 'bytes'},
            'data': {'x': {'note': '', 'source': '', 'files': {'train.bin': entry}}},
            'hardware': 'x', 'loop': {}, 'iter': 3, 'tokens': 24, 'elapsed': 1.0, 'best_val_loss': 2.0}


GOOD = contents()


def saved(data):
    f = io.BytesIO()
    torch.save(data, f)
    return f.getvalue()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def refusal(do, *args):
    """The one line with which something is refused, '' if it is not. Any other error is the test's."""
    try:
        do(*args)
    except UserError as e:
        assert '\n' not in str(e) and '\x1b' not in str(e) and 0 < len(str(e)) < 2000
        return str(e)
    return ''


def places(tree, path=()):
    """The paths to all parts of a tree of dictionaries and lists."""
    yield path
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def put(tree, path, value):
    """A copy of the tree with another value in one place."""
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = put(tree[path[0]], path[1:], value)
    return tree


# ---- checkpoints as files

class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Record:
    """Pickles as a reference to a record of the file."""

    def __init__(self, *pid):
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Record) else None


def craft(path, value=None, records=None, pkl=None, compression=zipfile.ZIP_STORED):
    """A file as torch.save writes it, by hand."""
    if pkl is None:
        f = io.BytesIO()
        Pickler(f, 2).dump(value)
        pkl = f.getvalue()
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in [('data.pkl', pkl), *(records or {}).items()]:
            archive.writestr(f'x/{name}', data)
    return path


def tensor(size, stride, stored=16, says=None, offset=0, key='0'):
    """A pickled tensor; `stored`: bytes that there are, `says`: elements that the pickle says there are."""
    storage = Record('storage', torch.FloatStorage, key, 'cpu', stored // 4 if says is None else says)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False,
                Call(collections.OrderedDict))


def laughs(levels=60):
    """A list that holds the one before it ten times: a few bytes, 10**60 elements."""
    made = []
    for _ in range(levels):
        made = [made] * 10
    return made


def nested(levels, kind=list):
    made = kind()
    for _ in range(levels):
        made = [made] if kind is list else (made,) if kind is tuple else {'a': made}
    return made


def deep_pickle(opcode, levels=10**5):
    return b'\x80\x02' + {'list': b']' * levels + b'a' * (levels - 1), 'tuple': b')' + b'\x85' * levels}[opcode] + b'.'


def itself():
    made = {}
    made['a'] = made
    return made


BARE = GOOD | {'model': {}, 'optimizer': {'state': {}}}  # which needs no records


def shaped(path, **changes):
    torch.save(GOOD | {'model_config': GOOD['model_config'] | changes}, path)


def one_tensor(path, *args, **kwargs):
    craft(path, BARE | {'scaler': {'a': tensor(*args, **kwargs)}}, {'data/0': bytes(16)})


def tokens_far_apart(path, i):
    torch.save(GOOD | {'tokenizer': {'kind': 'tiktoken', 'name': 'x', 'pattern': '.', 'ranks': f'YQ== {i}', 'special': {
        '<|endoftext|>': 1}}}, path)


HARMFUL = {
    'a command': (lambda p: craft(p, BARE | {'iter': Call(os.system, 'touch executed')}), "('posix system')"),
    'eval': (lambda p: craft(p, Call(eval, 'open("executed", "w")')), 'eval'),
    'another function of a known module': (lambda p: craft(p, Call(torch._utils._import_dotted_name, 'os.system')), '_dotted_'),
    'a name with a dot': (lambda p: craft(p, pkl=b'\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.'), '.__globals__'),
    'torch.load itself': (lambda p: craft(p, Call(torch.load, 'other.pt')), 'serialization load'),
    'an object': (lambda p: craft(p, pkl=b'\x80\x02ccollections\nOrderedDict\n)\x81.'), 'the opcode NEWOBJ'),
    'a bytearray': (lambda p: craft(p, BARE | {'scaler': Call(bytearray, 10**12)}), 'bytearray'),
    'a tensor by its size': (lambda p: craft(p, BARE | {'scaler': Call(torch.FloatTensor, 10**11)}), 'FloatTensor'),
    'a storage by its size': (lambda p: craft(p, BARE | {'scaler': Call(torch.FloatStorage, 10**11)}), 'no pickle'),
    'a dictionary of arguments': (lambda p: craft(p, Call(collections.OrderedDict, [(1, 2)])), 'no pickle of torch.save'),
    'a large tensor of few bytes': (lambda p: one_tensor(p, (2**36,), (1,)), 'larger than what is stored'),
    'a large storage of few bytes': (lambda p: one_tensor(p, (4,), (1,), says=2**36), 'content is not in the file'),
    'a stride of 0': (lambda p: one_tensor(p, (2**36,), (0,)), 'larger than what is stored'),
    'an offset beyond': (lambda p: one_tensor(p, (4,), (1,), offset=1), 'larger than what is stored'),
    'a negative stride': (lambda p: one_tensor(p, (4,), (-1,)), 'a tensor of no shape'),
    'sizes whose product overflows': (lambda p: one_tensor(p, (2**32, 2**32), (0, 0)), 'larger than what is stored'),
    'no record': (lambda p: craft(p, {'a': tensor((4,), (1,))}), 'content is not in the file'),
    'a record elsewhere': (lambda p: one_tensor(p, (4,), (1,), key='../../x'), 'content is not in the file'),
    'a record by a list': (lambda p: one_tensor(p, (4,), (1,), key=nested(90)), 'a reference to something else'),
    'an absolute name': (lambda p: craft(p, BARE, {'/etc/passwd': b'x'}), "a record 'x//etc/passwd'"),
    'a name that climbs': (lambda p: craft(p, BARE, {'../../x': b'x'}), "a record 'x/../../x'"),
    'one list ten times, sixty times over': (lambda p: craft(p, BARE | {'scaler': {'a': laughs()}}), 'in several places'),
    'a dictionary within itself': (lambda p: craft(p, BARE | {'scaler': itself()}), 'in several places'),
    'lists within lists': (lambda p: craft(p, pkl=deep_pickle('list')), 'more than 16 containers'),
    'tuples within tuples': (lambda p: craft(p, pkl=deep_pickle('tuple')), 'more than 16 containers'),
    'dictionaries within dictionaries': (lambda p: craft(p, BARE | {'scaler': nested(90, dict)}), 'more than 16 containers'),
    'a long number': (lambda p: craft(p, BARE | {'iter': 10**400}), 'more than 64 bits'),
    'a number of text': (lambda p: craft(p, pkl=b'\x80\x02I' + b'9' * 10**6 + b'\n.'), 'no pickle of torch.save'),
    'keys of one hash': (lambda p: craft(p, BARE | {'scaler': {(i,): 0 for i in range(5)}}), 'neither text nor whole numbers'),
    'text that claims to be long': (lambda p: craft(p, pkl=b'\x80\x02X\xff\xff\xff\x7fabc.'), 'no pickle of torch.save'),
    'bytes that claim to be long': (lambda p: craft(p, pkl=b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'a.'), 'no pickle'),
    'a memo far away': (lambda p: craft(p, pkl=b'\x80\x02}r\xff\xff\xff\x7f.'), 'it lacks'),
    'ten million dictionaries': (lambda p: craft(p, pkl=b'\x80\x02' + b'}' * 10**7 + b'.'), 'more than 1048576 opcodes'),
    'compressed zeros': (lambda p: craft(p, {'a': tensor((2**26,), (1,), 2**28)}, {'data/0': bytes(2**28)},
                                         compression=zipfile.ZIP_DEFLATED), 'is compressed'),
    'a billion layers': (lambda p: shaped(p, n_layer=10**9), 'n_layer 1000000000 is more than'),
    'thousands of layers': (lambda p: shaped(p, n_layer=4000), 'n_layer is 4000, and it has 9 tensors'),
    'a context of a billion': (lambda p: shaped(p, block_size=10**9), 'block_size 1000000000 is more than'),
    'wide heads and a long context': (lambda p: shaped(p, block_size=2**24, n_embd=2**16), 'a gigabyte of angles'),
    'a vocabulary of 10**12': (lambda p: shaped(p, vocab_size=10**12), 'vocab_size 1000000000000 is more than'),
    'a wide model': (lambda p: shaped(p, n_embd=2**16, n_inner=2**18), 'holds a model of another shape'),
    'weights that are whole numbers': (lambda p: torch.save(GOOD | {'model': {
        name: weight.long() for name, weight in GOOD['model'].items()}}, p), 'holds a model of another shape'),
    'no weights': (lambda p: torch.save(GOOD | {'model': {}}, p), 'n_layer is 1, and it has 0 tensors'),
    'a tokenizer whose ids are far apart': (lambda p: tokens_far_apart(p, 4 * 10**9), 'not all of their ids are'),
    'a tokenizer of other ids': (lambda p: tokens_far_apart(p, 4000), 'has ids up to 4000, but the model knows 257'),
}


def test_a_crafted_checkpoint_is_refused_within_the_memory_and_time_that_it_justifies(tmp_path):
    """All of them in one process that may have 200 MB more than importing and loading a good one took, and a minute."""
    for i, (make, _) in enumerate(HARMFUL.values()):
        make(str(tmp_path / f'{i}.pt'))
    (tmp_path / 'good.pt').write_bytes(saved(GOOD))
    code = """
import resource, sys, time
import checkpoint
from configurator import UserError
checkpoint.load_model('good.pt')
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() if sys.platform == 'linux' else 2**36
resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20,) * 2)
for i in range(int(sys.argv[1])):
    started = time.process_time()
    for what in checkpoint.load_model, checkpoint.verify:
        try:
            what(f'{i}.pt')
            answer = 'accepted'
        except UserError as e:
            answer = f'refused: {e}'
        except BaseException as e:
            answer = f'{type(e).__name__}: {e}'
        print(i, what.__name__, round(time.process_time() - started), answer)
    checkpoint.step_of(f'{i}.pt')
"""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code, str(len(HARMFUL))], cwd=tmp_path, env=env, text=True, timeout=120,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(HARMFUL)
    for line in lines:
        i, function, seconds, answer = line.split(' ', 3)
        what, (_, words) = list(HARMFUL.items())[int(i)]
        later = function == 'verify' and 'a tokenizer' in what  # which is made by load_model only
        assert answer.startswith('refused: ') and words in answer or later, (what, line)
        assert int(seconds) <= 10, (what, line)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('names', [['data.pkl', 'data.pkl'], ['data.pkl', 'DATA.PKL'], ['data.pkl', 'constants.pkl']])
def test_records_of_which_two_readers_could_see_two_are_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
        for name in names:
            archive.writestr(f'x/{name}', pickle.dumps({}, 2))
    assert 'more than plain data' in refusal(checkpoint.load, str(tmp_path / 'x.pt'))


def test_records_that_lie_over_each_other_are_refused(tmp_path):
    data = bytes(2**20)
    craft(tmp_path / 'x.pt', GOOD, {f'data/{i}': data if i == 0 else b'' for i in range(50)})
    with zipfile.ZipFile(tmp_path / 'x.pt', 'a') as archive:
        first = archive.getinfo('x/data/0')
        for info in archive.infolist():
            if info.filename.startswith('x/data/'):
                info.header_offset, info.file_size, info.compress_size = first.header_offset, len(data), len(data)
        archive._didModify = True  # so that the directory is written anew
    assert 'its records are larger than the file' in refusal(checkpoint.load, str(tmp_path / 'x.pt'))


def test_what_is_read_is_what_torch_load_reads(tmp_path):
    """Every type, shared and scattered tensors, and the state of each optimizer."""
    grid = torch.arange(24.0).view(2, 3, 4)
    parts = {str(dtype): torch.arange(3).to(dtype) for dtype in torchfile.DTYPES.values()}
    parts |= {'whole': grid, 'columns': grid[:, :, 1], 'turned': grid.permute(2, 0, 1), 'again': grid,
              'none': torch.empty(0, 3), 'one': torch.tensor(7), 'every other': torch.arange(9)[1::2]}
    values = {'a': [1, -2**40, 2**63 - 1, 2**64 - 1, True, None, 0.5, float('inf'), 'ü\ud800', (), (1, (2, [3]))], 7: {}}
    from optim import make_optimizer
    model = Transformer(SHAPE)
    for name in ('adamw', 'adam', 'sgd', 'muon'):
        opt = make_optimizer(name, model, 0.1, 0.9, 0.9, 0.9, 0.1, 'cpu')
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
        opt.step()
        values[name] = opt.state_dict()
    torch.save(GOOD | parts | values, tmp_path / 'x.pt')
    ours, theirs = torchfile.read(tmp_path / 'x.pt'), torch.load(tmp_path / 'x.pt', weights_only=True)
    assert same(dict(theirs), ours)
    assert ours['columns'].untyped_storage().data_ptr() == ours['whole'].untyped_storage().data_ptr()
    assert ours['columns'].stride() == (12, 4)


def test_every_truncated_checkpoint_is_refused(tmp_path):
    whole, path = saved(GOOD), str(tmp_path / 'x.pt')
    with open(path, 'wb') as f:
        f.write(whole)
    for size in reversed(range(len(whole))):
        os.truncate(path, size)
        assert refusal(checkpoint.load, path), size


@settings(max_examples=200)
@given(st.data())
def test_a_flipped_bit_is_noticed_or_does_not_matter(tmp_path_factory, data):
    whole, path = bytearray(saved(GOOD)), str(tmp_path_factory.mktemp('x') / 'x.pt')
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with open(path, 'wb') as f:
        f.write(whole)
    error = refusal(lambda: same(checkpoint.load(path), GOOD) or pytest.fail('another checkpoint'))
    assert bool(error) == bool(refusal(checkpoint.verify, path))


def test_a_flipped_bit_of_a_weight(tmp_path):
    path, whole = str(tmp_path / 'x.pt'), bytearray(saved(GOOD))
    whole[whole.index(GOOD['model']['wte.weight'].numpy().tobytes()) + 5] ^= 1
    with open(path, 'wb') as f:
        f.write(whole)
    torch.load(path, weights_only=True)  # which does not notice
    for function in (checkpoint.load, checkpoint.verify):
        assert refusal(function, path) == f'{path} is damaged: its checksum does not fit; go back to an earlier checkpoint'
    assert checkpoint.step_of(path) == 3  # which does not look


@pytest.mark.filterwarnings('ignore:invalid escape sequence')
@settings(max_examples=250)
@given(st.data())
def test_a_pickle_with_other_opcodes(tmp_path_factory, data):
    """With checksums that fit: bytes of the pickle are replaced, put in and taken out."""
    with zipfile.ZipFile(io.BytesIO(saved(GOOD))) as archive:
        records = {info.filename.split('/', 1)[1]: archive.read(info) for info in archive.infolist()}
    pkl = bytearray(records.pop('data.pkl'))
    opcodes = st.sampled_from([opcode.code.encode('latin1') for opcode in torchfile.pickletools.opcodes])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(pkl) - 1))
        pkl[at:at + data.draw(st.integers(0, 2))] = data.draw(st.one_of(opcodes, st.binary(max_size=3)))
    path = craft(str(tmp_path_factory.mktemp('x') / 'x.pt'), pkl=bytes(pkl), records=records)
    refusal(checkpoint.load_model, path)
    refusal(checkpoint.verify, path)


@settings(max_examples=200)
@given(st.sampled_from(list(places(GOOD))), VALUES)
def test_a_checkpoint_with_another_value(tmp_path_factory, where, value):
    path = str(tmp_path_factory.mktemp('x') / 'x.pt')
    torch.save(put(GOOD, where, value), path)
    refusal(checkpoint.load_model, path)
    refusal(checkpoint.verify, path)


@pytest.mark.parametrize('where, value, words', [
    (('config', 'batch_size'), [2], 'its config is not what'), (('config', 'dataset'), None, 'its config is not what'),
    (('data', 'x', 'files'), [], 'its data is not what'), (('data', 'x', 'source'), 1, 'its data is not what'),
    (('data', 'x', 'files', 'train.bin', 'tokens'), 'many', 'its data is not what'), (('iter',), -1, 'its iter is not what'),
    (('iter',), True, 'it lacks iter'), (('tokens',), -1, 'its tokens is not what'), (('elapsed',), 'x', 'it lacks elapsed'),
    (('optimizer',), {}, 'its optimizer is not what')])
def test_what_scripts_read_of_a_checkpoint_has_its_type(tmp_path, where, value, words):
    torch.save(put(GOOD, where, value), tmp_path / 'x.pt')
    assert words in refusal(checkpoint.load, str(tmp_path / 'x.pt'))


@pytest.mark.parametrize('pkl', [b'}X\x01\x00\x00\x00actorch\nFloatStorage\ns.', b']ccollections\nOrderedDict\na.'])
def test_a_function_is_no_value(tmp_path, pkl):
    craft(tmp_path / 'x.pt', pkl=b'\x80\x02' + pkl)
    assert 'parts of a tensor' in refusal(checkpoint.load, str(tmp_path / 'x.pt'))


@given(st.sampled_from(sorted(dataclasses.asdict(SHAPE))), VALUES)
@example('n_embd', 4.0)
@example('n_layer', True)
@example('norm_eps', float('nan'))
@example('rope_scaling', 'linear:inf')
@example('n_kv_head', -1)
def test_a_shape_with_another_value(name, value):
    changed = GOOD | {'model_config': GOOD['model_config'] | {name: value}}
    started = time.process_time()
    error = refusal(checkpoint.model_config, changed, 'x.pt')
    assert time.process_time() - started < 2
    kind = type(GOOD['model_config'][name])
    assert error or type(value) is kind or kind is float and type(value) is int


# ---- token files

@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'x'
    write_tokens(folder, [i % 256 for i in range(100)], range(50), mask=[1] * 100)
    (folder / 'tokenizer.state.json').write_text(json.dumps(load_tokenizer('bytes').state()))
    meta = json.loads((folder / 'meta.json').read_text())
    meta['tokenizer']['file'] = 'tokenizer.state.json'
    meta |= {'note': 'x', 'left_out': {'broken': 0}, 'plan': {'settings': {'source': 'x'}}}
    return folder, meta


def read_all(folder):
    meta = read_meta(str(folder))
    read_tokenizer(str(folder), meta)
    for split in ('train', 'val'):
        windows = Split(str(folder), split, 8)
        windows.window(windows.n_windows - 1)
        assert windows.n_windows < 20 and windows.n_bytes > 0


@settings(max_examples=500)
@given(st.data())
def test_a_manifest_with_another_value(tokens, data):
    folder, meta = tokens
    where = data.draw(st.sampled_from(list(places(meta))))
    (folder / 'meta.json').write_text(json.dumps(put(meta, where, data.draw(VALUES))))
    refusal(read_all, folder)


@pytest.mark.parametrize('text', ['[' * 10**5, '{"a":' * 10**5, '9' * 10**5, '{"vocab_size": 1e999}', '\xff', ''])
def test_a_manifest_that_is_none(tokens, text):
    folder, _ = tokens
    (folder / 'meta.json').write_bytes(text.encode('latin1'))
    assert refusal(read_all, folder)


@pytest.mark.parametrize('name', ['../secret', '/etc/passwd', '..', '.', '', 'a/b', 'a\\b', '.hidden', 'a\0b'])
@pytest.mark.parametrize('what', ['files', 'mask', 'tokenizer'])
def test_names_that_lead_out_of_the_folder(tokens, what, name):
    folder, meta = tokens
    meta = copy.deepcopy(meta)
    if what == 'tokenizer':
        meta['tokenizer']['file'] = name
    elif what == 'mask':
        meta['files']['train.bin']['mask'] = name
    else:
        meta['files'][name] = meta['files']['val.bin']
    (folder / 'meta.json').write_text(json.dumps(meta))
    assert 'names no file of its folder' in refusal(read_meta, str(folder))


def test_a_manifest_whose_vocabulary_is_not_the_tokenizers(tokens):
    folder, meta = tokens
    (folder / 'meta.json').write_text(json.dumps(meta | {'vocab_size': 65536}))  # of which a model would make as many rows
    assert 'the tokenizer bytes has 257 ids, but meta.json says vocab_size 65536' in refusal(read_all, folder)


@pytest.mark.parametrize('file', ['train.bin', 'train.mask'])
@pytest.mark.parametrize('change', ['cut off', 'rewritten', 'replaced', 'removed'])
def test_a_token_file_that_changes_while_it_is_read(tmp_path, file, change):
    """Cut off, a file that is mapped into memory would kill the process."""
    write_tokens(tmp_path / 'x', [i % 256 for i in range(100_000)], mask=[1] * 100_000)
    split, path = Split(str(tmp_path / 'x'), 'train', 8), tmp_path / 'x' / file
    begun = change != 'replaced'  # what is open already goes on to be the file that it was
    before = split.window(9000)[0] if begun else None
    if change == 'cut off':
        os.truncate(path, 1000)
    elif change == 'rewritten':
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(1, 1))
    elif change == 'replaced':
        (tmp_path / 'new').write_bytes(bytes(path.stat().st_size))
        os.utime(tmp_path / 'new', ns=(1, 1))
        os.replace(tmp_path / 'new', path)
    else:
        os.remove(path)
        assert (split.window(9000)[0] == before).all()
        return
    assert f'{file} was changed while it is in use; prepare the data again' in refusal(split.window, 9000)


def test_a_mask_that_is_too_short(tmp_path):
    write_tokens(tmp_path / 'x', range(100), mask=[1] * 99)
    assert 'train.mask has 99 bytes, but meta.json says 100 tokens' in refusal(Split, str(tmp_path / 'x'), 'train', 8)


# ---- tokenizers and logs

def tokenizer_states():
    states = [load_tokenizer('bytes').state(), {'kind': 'tiktoken', 'name': 'x', 'pattern': r'\S+|\s+', 'special': {
        '<|endoftext|>': 256}, 'ranks': '\n'.join(f'{base64.b64encode(bytes([b])).decode()} {b}' for b in range(256))}]
    try:
        from tokenizer import train_bpe
        spec = train_bpe(['some words of text'] * 9, 300, ['<|endoftext|>'])
        states.append({'kind': 'huggingface', 'name': 'x', 'json': spec, 'eot_id': 0, 'bos_id': None, 'beside': {
            'eos_token_id': [0], 'chat_template': 'x'}})
    except UserError:
        pass  # the package is not there
    return states


STATES = tokenizer_states()


@settings(max_examples=200)
@given(st.data())
@example(None)
def test_a_tokenizer_with_another_value(data):
    if data is None:
        return [tokenizer_from_state(state).encode('text') for state in STATES]
    state = data.draw(st.sampled_from(STATES))
    spec = json.loads(state.get('json', '{}'))
    if spec and data.draw(st.booleans()):
        spec = put(spec, data.draw(st.sampled_from(list(places(spec)))), data.draw(VALUES))
        state = state | {'json': json.dumps(spec)}
    else:
        where = data.draw(st.sampled_from([path for path in places(state) if path]))
        value = data.draw(st.one_of(VALUES, st.sampled_from(['[' * 10**5, 'YQ== x', '%%% 1', '(', '(a+)+$', 'YQ== 1 2'])))
        state = put(state, where, value)
    refusal(lambda: tokenizer_from_state(state).encode('some text'))


@settings(max_examples=100)
@given(st.one_of(VALUES.map(json.dumps), st.text(max_size=20)))
@example('{"iter": true}')
@example('{"iter": 1, "loss": null}')
@example('[' * 10**5)
def test_a_log_that_is_none(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp('x')
    (folder / 'log.jsonl').write_text('{"iter": 1, "loss": 2.0}\n' + text + '\n', encoding='utf-8', errors='replace')
    error = refusal(logs.read_log, str(folder), 5)
    assert error or all(type(value) in (int, float) for record in logs.read_log(str(folder), 5)
                        for value in record.values())


# ---- models in Hugging Face's form

@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    pytest.importorskip('safetensors')
    pytest.importorskip('tokenizers')
    import huggingface
    folder = tmp_path_factory.mktemp('hf')
    huggingface.write(str(folder), Transformer(SHAPE), load_tokenizer('bytes'))
    return folder, json.loads((folder / 'config.json').read_text()), (folder / 'model.safetensors').read_bytes()


@settings(max_examples=200)
@given(st.data())
def test_a_config_json_with_another_value(theirs, data):
    folder, config, weights = theirs
    (folder / 'model.safetensors').write_bytes(weights)
    key = data.draw(st.sampled_from([*config, 'rope_parameters', 'rope_theta', 'sliding_window', 'partial_rotary_factor']))
    (folder / 'config.json').write_text(json.dumps(config | {key: data.draw(st.one_of(VALUES, st.just(10**7), st.just(
        {'rope_type': 'linear', 'factor': float('inf')})))}))
    refusal(checkpoint.load_model, str(folder))
    (folder / 'config.json').write_text(json.dumps(config))


def header(weights):
    n, = struct.unpack('<Q', weights[:8])
    return json.loads(weights[8:8 + n]), weights[8 + n:]


def with_header(head, data, size=None):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack('<Q', len(text) if size is None else size) + text + data


@settings(max_examples=200)
@given(st.data())
def test_a_safetensors_header_with_another_value(theirs, data):
    folder, _, weights = theirs
    head, content = header(weights)
    where = data.draw(st.sampled_from([path for path in places(head) if path]))
    value = data.draw(st.one_of(VALUES, st.sampled_from(['F16', 'BF16', 'F8_E4M3', 'F4', 'I64', 'BOOL', 'C64'])))
    changed = put(head, where, value)
    (folder / 'model.safetensors').write_bytes(with_header(changed, content))
    assert refusal(checkpoint.load_model, str(folder)) or changed == head or where[0] == '__metadata__'


@pytest.mark.parametrize('size', [2**63, 2**40, 99_000_000, 0])
def test_a_safetensors_header_of_an_absurd_size(theirs, size):
    folder, _, weights = theirs
    (folder / 'model.safetensors').write_bytes(with_header(*header(weights), size=size))
    assert 'is not a safetensors file, or is damaged' in refusal(checkpoint.load_model, str(folder))


def test_more_layers_than_the_files_hold_are_not_made(theirs, monkeypatch):
    folder, config, weights = theirs
    (folder / 'model.safetensors').write_bytes(weights)
    (folder / 'config.json').write_text(json.dumps(config | {'num_hidden_layers': 4000}))
    monkeypatch.setattr(Transformer, 'without_weights', lambda config: pytest.fail('made'))
    assert 'config.json says 4000 layers, but the files hold 11 tensors' in refusal(checkpoint.load_model, str(folder))
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('shard', ['../model.safetensors', '/etc/passwd', 'a/../../x.safetensors', 'x.bin', '..', 3, ['x']])
def test_shards_that_lead_out_of_the_folder(theirs, tmp_path, shard):
    folder, config, weights = theirs
    for file in os.listdir(folder):
        if file != 'model.safetensors':
            (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': shard}}))
    assert 'names no safetensors file of its folder' in refusal(checkpoint.load_model, str(tmp_path))


@pytest.mark.parametrize('text', ['[' * 10**5, '{"a":' * 10**5, '{"vocab_size": ' + '9' * 10**5 + '}', '\xff'])
@pytest.mark.parametrize('file', ['config.json', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'])
def test_a_json_file_that_is_none(theirs, tmp_path, file, text):
    folder, config, weights = theirs
    for other in os.listdir(folder):
        (tmp_path / other).write_bytes((folder / other).read_bytes())
    (tmp_path / 'model.safetensors').write_bytes(weights)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / file).write_bytes(text.encode('latin1'))
    assert refusal(checkpoint.load_model, str(tmp_path))


# ---- settings

DEFAULTS = {'block_size': 256, 'learning_rate': 8e-3, 'norm': 'rmsnorm', 'bias': False, 'dataset': 'stdlib', 'compile': 'auto',
            'batch_size': 16}
SOURCE = """
block_size = 256  # context, tokens
learning_rate = 8e-3  # the highest
norm = 'rmsnorm'  # layernorm | rmsnorm
bias = False  # biases
dataset = 'stdlib'  # data/<name>
compile = 'auto'  # auto | True | False: torch.compile
batch_size = 16  # auto, or windows in a micro-batch
config = configure(globals())
"""
WORDS = st.one_of(st.text(max_size=20), VALUES.map(repr), st.sampled_from(
    ['9' * 5000, '1e999', '-1e999', 'nan', '1e400', '10**9', '(' * 500, '[' * 10**5, '-' * 10**4 + '1', '{}', '[1]', 'True',
     '1_0', '0x10', '1j', "b''", "'a'", '...', 'None', '١', '\ud800', '"' * 3, '1' + '0' * 400, '-0', '1.', '{[]}', '{{}: 1}']))


@settings(max_examples=250)
@given(st.sampled_from([*DEFAULTS, 'norn', '']), WORDS)
@example('learning_rate', '1e999')
@example('learning_rate', '1' + '0' * 400)
@example('block_size', '1' + '0' * 400)
@example('block_size', 'True')
def test_a_setting_with_another_value(tmp_path_factory, name, words):
    script = tmp_path_factory.mktemp('x') / 'script.py'
    script.write_text(SOURCE)
    given_settings = DEFAULTS | {'__file__': str(script), '__doc__': ''}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['script.py', f'--{name}={words}'])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO()))
        error = refusal(configurator.configure, given_settings)
    value = given_settings.get(name)
    assert error or type(value) is type(DEFAULTS[name]) or name == 'compile'
    assert isinstance(value, (str, type(None))) or abs(value) < 2**64
