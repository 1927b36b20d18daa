"""The order of the training data: every window once an epoch, the same for any number of processes, and mixtures held."""

import itertools
import json

import numpy as np
import pytest
from conftest import write_tokens

import dataset
from configurator import UserError
from dataset import Split, TrainingOrder, parse_mix, permute, read_ahead, val_batches


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """A data set whose token i is i, so that a window says where it lies."""
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / 'data' / 'counting', range(2005), range(5000, 5205), vocab_size=65536)
    return 'counting'


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 100, 1000, 4097])
def test_permute_is_a_permutation(n):
    orders = [[permute(k, n, key) for k in range(n)] for key in (1, 2)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 5 or orders[0] != orders[1] != list(range(n))


def test_permute_is_fair():
    firsts = np.bincount([permute(0, 10, key) for key in range(5000)], minlength=10)
    assert firsts.min() > 400 and firsts.max() < 600  # 500 each, give or take 4.7 standard deviations


def test_permute_needs_no_list():
    assert len({permute(k, 10**15, 7) for k in range(100)}) == 100


def starts(order, steps, positions):
    """The first token of every window read, in order; and inputs and targets are neighbours."""
    found = []
    for step in steps:
        x, y = order.batch(step, positions)
        assert (y == x + 1).all() and (x[:, 1:] == x[:, :-1] + 1).all()
        found += x[:, 0].tolist()
    return found


def test_an_epoch_reads_every_window_once_and_the_next_in_another_order(counting):
    split = Split(counting, 'train', block_size=20)
    n = split.n_windows
    assert n == 99
    order = TrainingOrder([split], [1.0], 9, seed=1)  # 11 steps are an epoch
    first = starts(order, range(11), range(9))
    assert sorted(first) == list(range(0, 20 * n, 20)) != first
    second = starts(order, range(11, 22), range(9))
    offset = min(second)
    assert sorted(second) == list(range(offset, offset + 20 * n, 20)) and 0 < offset < 20  # the grid has moved
    assert [s - offset for s in second] != first
    assert order.epochs(22) == [2.0]
    assert starts(order, range(22), range(9)) == first + second  # and all of it is a function of the step
    assert starts(TrainingOrder([split], [1.0], 9, seed=2), range(11), range(9)) != first


def test_windows_of_a_stride_go_around_and_meet_every_token_equally_often(counting):
    split = Split(counting, 'train', block_size=128, stride=5)
    order = TrainingOrder([split], [1.0], split.n_windows, seed=1)
    for epoch in (0, 1):
        x, y = order.batch(epoch, range(split.n_windows))
        assert sorted(x[:, 0].tolist()) == list(range(0, 2005, 5))
        assert (y == (x + 1) % 2005).all() and (y[:, :-1] == x[:, 1:]).all()
        assert set(np.bincount(y.flatten()).tolist()) == {25, 26}  # 128 / 5


@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_processes_cut_the_same_batch(counting, world_size):
    order = TrainingOrder([Split(counting, 'train', 20)], [1.0], 8, seed=1)
    share = 8 // world_size
    parts = [starts(order, [3], range(rank * share, (rank + 1) * share)) for rank in range(world_size)]
    assert list(itertools.chain(*parts)) == starts(order, [3], range(8))


@pytest.mark.parametrize('weights', [[0.7, 0.3], [0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [1 / 3, 1 / 3, 1 / 3]])
def test_a_mixture_is_held_in_every_batch_and_reads_each_source_without_replacement(counting, weights):
    split = Split(counting, 'train', 20)
    order = TrainingOrder([split] * len(weights), weights, 10, seed=1)
    used = np.zeros(len(weights))
    seen = [[] for _ in weights]
    for step in range(5000):
        places = [order.locate(step, position) for position in range(10)]
        counts = np.bincount([source for source, _, _ in places], minlength=len(weights))
        assert (np.abs(counts - 10 * np.array(weights)) < 1).all()
        used += counts
        for source, k, _ in places:
            seen[source].append(k)
    assert np.allclose(used, order.epochs(5000) * np.array(split.n_windows))
    assert np.allclose(used / 50_000, weights, atol=1e-3)
    for windows in seen:
        for i in range(0, len(windows) - 99, 99):
            assert sorted(windows[i:i + 99]) == list(range(99))


def test_mixtures_are_written_with_weights():
    assert parse_mix('a') == (['a'], [1.0])
    assert parse_mix('a:0.7 b:0.3') == (['a', 'b'], [0.7, 0.3])
    assert parse_mix('a b:3') == (['a', 'b'], [0.25, 0.75])
    for wrong in ('', 'a:', 'a:x', 'a:0', 'a:-1', 'a:nan', ':1'):
        with pytest.raises(UserError):
            parse_mix(wrong)


def test_validation_windows_are_fixed_and_shared_out(counting):
    split = Split(counting, 'val', 20, stride=20)
    assert split.n_windows == 10

    def starts_of(rank, world_size, n=100):
        batches = list(val_batches(split, n, 4, rank, world_size))
        assert all(x.shape == (4, 20) for x, _ in batches)
        return [int(s) for x, y in batches for s, t in zip(x[:, 0], y[:, 0]) if t != -1]

    everything = list(range(5000, 5200, 20))
    assert starts_of(0, 1) == everything
    assert sorted(starts_of(0, 3) + starts_of(1, 3) + starts_of(2, 3)) == everything
    assert starts_of(0, 1, n=5) == everything[::2]  # evenly spaced


def test_a_mask_turns_targets_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.arange(100) % 3 != 0
    write_tokens(tmp_path / 'data' / 'masked', range(100), mask=mask)
    for stride in (0, 4):  # side by side, and around
        split = Split('masked', 'train', 9, stride)
        x, y = TrainingOrder([split], [1.0], split.n_windows, seed=1).batch(0, range(split.n_windows))
        following = (x + 1) % 100
        assert np.array_equal(y, np.where(following % 3 != 0, following, -1))


def test_several_files_are_one_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / 'data' / 'two', range(0, 105), range(500, 600), vocab_size=65536)
    folder = tmp_path / 'data' / 'two'
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'val.bin').rename(folder / 'train_1.bin')
    meta['files']['train_1.bin'] = meta['files'].pop('val.bin')
    (folder / 'meta.json').write_text(json.dumps(meta))
    split = Split('two', 'train', block_size=10, stride=10)
    assert sorted(int(split.window(k)[0][0]) for k in range(split.n_windows)) == \
        [*range(0, 100, 10), *range(500, 590, 10)]


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(read_ahead(lambda step: step * 2, range(7))) == [0, 2, 4, 6, 8, 10, 12]
    steps = read_ahead(lambda step: 1 / (2 - step), range(7))
    assert [next(steps), next(steps)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(steps)


def damage(folder, what):
    path = folder / 'meta.json'
    meta = json.loads(path.read_text())
    entry = meta['files']['train.bin']
    if what == 'no manifest':
        path.unlink()
    elif what == 'no file':
        (folder / 'train.bin').unlink()
    elif what == 'truncated':
        with open(folder / 'train.bin', 'r+b') as f:
            f.truncate(1001)
    elif what == 'another byte':
        data = bytearray((folder / 'train.bin').read_bytes())
        data[100] ^= 1
        (folder / 'train.bin').write_bytes(data)
    elif what == 'not JSON':
        path.write_text('{"dtype": ')
    else:
        {'ids beyond': lambda: entry.update(max_id=70000), 'no counts': lambda: entry.pop('tokens'),
         'text for a count': lambda: entry.update(tokens='many'), 'no files': lambda: meta.pop('files'),
         'odd dtype': lambda: meta.update(dtype='int3'), 'a list': lambda: meta.update(files=[1])}[what]()
        path.write_text(json.dumps(meta))


@pytest.mark.parametrize('what, words', [
    ('no manifest', 'meta.json is missing.*prepare.py'), ('no file', 'train.bin is missing'),
    ('truncated', '1001 bytes.*2005 tokens.*4010 bytes'), ('another byte', 'checksum'),
    ('ids beyond', 'id 70000.*vocab_size 65536'), ('not JSON', 'not a manifest'), ('no counts', "not a manifest.*'tokens'"),
    ('text for a count', 'not a manifest'), ('no files', "not a manifest.*'files'"), ('odd dtype', "'int3'"),
    ('a list', 'not a manifest')])
def test_a_manifest_that_does_not_match_is_refused(counting, tmp_path, what, words):
    damage(tmp_path / 'data' / counting, what)
    with pytest.raises(UserError, match=words):
        Split(counting, 'train', 20)


def test_ids_beyond_the_vocabulary_are_found_when_read(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, 'CHECKSUM_LIMIT', 0)  # as if the file were too large for a checksum at the start
    path = tmp_path / 'data' / counting / 'meta.json'
    meta = json.loads(path.read_text())
    meta['vocab_size'] = 1000
    meta['files']['train.bin']['max_id'] = 999
    path.write_text(json.dumps(meta))
    split = Split(counting, 'train', 20)
    split.window(0)
    with pytest.raises(UserError, match='id 1020 is beyond vocab_size 1000'):
        split.window(50)


def test_a_split_shorter_than_the_context_is_refused(counting):
    with pytest.raises(UserError, match="'val' split has 205 tokens, but block_size 500 needs at least 501"):
        Split(counting, 'val', 500)
