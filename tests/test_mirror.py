"""Claims about the copy of a run away from the machine, to a real S3 server on loopback, which goes away and comes back."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
from conftest import TINY, run

import checkpoint
import mirror
from configurator import UserError

SETTINGS = {'n_layer': 2, 'dataset': 'tiny'}


@pytest.fixture(scope='module')
def trained(tmp_path_factory, prepared):
    """The folder of a run of 20 steps."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'data').symlink_to(prepared / 'data')
    run('train.py', *TINY, cwd=folder)
    return folder / 'out' / 'tiny'


class Run:
    """What a trainer does, without the training: a checkpoint and a line of the log for each step, and the lines it prints."""

    def __init__(self, folder, trained, url, keep_last=2):
        self.folder, self.said, self.bytes = folder, [], {}
        shutil.copy(trained / 'log.jsonl', folder)
        self.loaded = checkpoint.load(trained / 'ckpt.pt')
        self.mirror = mirror.Mirror(url, keep_last, self.said.append)
        self.longest = 0.0  # seconds that a copy took of the run's time

    def save(self, step, **kinds):
        checkpoint.save(str(self.folder / 'ckpt.pt'), 1, **self.loaded | {'iter': step})
        with open(self.folder / 'log.jsonl', 'a') as f:
            f.write(json.dumps({'iter': step}) + '\n')
        self.bytes[step] = (self.folder / 'ckpt.pt').read_bytes(), (self.folder / 'log.jsonl').read_bytes()
        begun = time.perf_counter()
        self.mirror.copy(step, str(self.folder / 'ckpt.pt'), str(self.folder / 'log.jsonl'), SETTINGS, **kinds)
        self.longest = max(self.longest, time.perf_counter() - begun)

    def settle(self, seconds=20):
        """Waits until nothing is left to be copied."""
        wait_for(lambda: not self.mirror.jobs, seconds)

    def pins(self):
        return [name for name in os.listdir(self.folder) if '.mirror' in name]


def wait_for(condition, seconds=20):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)


def listing(url):
    """What the mirror holds: {name below it: bytes}."""
    there = mirror.Folder(url)
    fs, root = there.opened
    fs.invalidate_cache()
    return {name.removeprefix(root + '/'): fs.cat_file(name) for name in fs.find(root)}


def fetch(url, folder):
    """(step, the lines it said); what it fetched is in the folder."""
    said = []
    return mirror.fetch(url, str(folder), checkpoint.load, said.append), said


@pytest.fixture
def training(tmp_path, trained):
    """Starts runs that copy to a URL."""
    runs = []

    def start(url, name='out', **kwargs):
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name, trained, url, **kwargs))
        return runs[-1]

    yield start
    for r in runs:
        r.mirror.close(0)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(mirror, 'LIMIT', 1)
    monkeypatch.setattr(mirror, 'PATIENCE', 1)


@pytest.mark.parametrize('kind', ['s3', 'file', 'memory'])
def test_a_bare_folder_gets_the_run_byte_for_byte(kind, training, tmp_path, request):
    url = {'s3': 's3://runs/tiny', 'file': f'file://{tmp_path}/copy', 'memory': f'memory://{tmp_path.name}/copy'}[kind]
    if kind == 's3':
        request.getfixturevalue('s3')
    assert mirror.latest_step(url) is None and fetch(url, tmp_path / 'none') == (None, [])
    a_run = training(url)
    for step, kinds in ((5, {'best': True}), (10, {'best': True, 'kept': True}), (15, {})):
        a_run.save(step, **kinds)
        a_run.settle()
    a_run.save(20, kept=True)
    assert a_run.mirror.close(20) and a_run.said == [] and a_run.pins() == []

    there = listing(url)
    assert there.keys() == {'last/15.pt', 'last/15.jsonl', 'last/20.pt', 'last/20.jsonl', 'best/10.pt', 'kept/10.pt',
                            'kept/20.pt', 'settings.json'}
    for name, data in there.items():
        step = int(os.path.splitext(os.path.basename(name))[0]) if name != 'settings.json' else None
        assert step is None or data == a_run.bytes[step][name.endswith('jsonl')]
    assert json.loads(there['settings.json']) == SETTINGS
    assert mirror.latest_step(url) == 20

    assert fetch(url, tmp_path / 'bare') == (20, [])
    assert {p.name: p.read_bytes() for p in (tmp_path / 'bare').iterdir()} == {
        'ckpt.pt': a_run.bytes[20][0], 'log.jsonl': a_run.bytes[20][1], 'best.pt': a_run.bytes[10][0]}


def test_a_server_that_dies_and_comes_back_costs_two_lines_and_no_copy(s3, training):
    a_run = training(s3.url)
    a_run.save(1)
    a_run.settle()
    s3.kill()
    for step, kinds in ((2, {}), (3, {'best': True}), (4, {'kept': True}), (5, {'best': True}), (6, {})):
        a_run.save(step, **kinds)
        if step == 2:
            wait_for(lambda: a_run.said)
    assert a_run.longest < 0.5, f'a copy took {a_run.longest:.3f} s of the run'
    time.sleep(2)  # several tries
    assert len(a_run.said) == 1 and 'cannot be reached' in a_run.said[0] and 's3://runs/tiny' in a_run.said[0]
    assert len(a_run.pins()) == 3, 'the newest, the best and the one to keep'
    s3.start()
    assert a_run.mirror.close(30)
    assert len(a_run.said) == 2 and 'there again' in a_run.said[1]
    there = listing(s3.url)
    assert there.keys() == {'last/6.pt', 'last/6.jsonl', 'best/5.pt', 'kept/4.pt', 'settings.json'}
    assert all(data == a_run.bytes[int(name[5])][name.endswith('jsonl')] for name, data in there.items() if '/' in name)
    assert a_run.pins() == []


def test_a_server_that_does_not_answer_holds_nothing_up(s3, training, impatient, monkeypatch):
    a_run = training(s3.url)
    s3.process.send_signal(signal.SIGSTOP)  # it accepts, and says nothing
    for step in (1, 2, 3):
        a_run.save(step)
        time.sleep(1)
    assert a_run.longest < 0.5
    assert len(a_run.said) == 1 and 'no answer' in a_run.said[0]
    begun = time.monotonic()
    with pytest.raises(UserError, match='cannot be reached .*no answer.*--mirror'):
        mirror.latest_step(s3.url)
    assert time.monotonic() - begun < 15
    s3.process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(mirror, 'LIMIT', 20)
    assert a_run.mirror.close(20)
    assert sorted(listing(s3.url)) == ['last/3.jsonl', 'last/3.pt', 'settings.json']


def test_a_copy_cut_short_leaves_the_one_before(s3, training, tmp_path, monkeypatch):
    import torch
    call, sent = mirror.Folder.call, []

    def cut(self, method, *args, **kwargs):
        if method == 'put_file':
            s3.process.send_signal(signal.SIGSTOP)  # the first bytes go, the rest never does
            sent.append(args)
        return call(self, method, *args, **kwargs)

    a_run = training(s3.url)
    a_run.save(1)
    a_run.settle()
    a_run.loaded['model']['ballast'] = torch.zeros(2**23)  # 32 MB, more than a socket takes unread
    with monkeypatch.context() as m:
        m.setattr(mirror.Folder, 'call', cut)
        m.setattr(mirror, 'LIMIT', 2)
        m.setattr(mirror, 'SLOWEST', 2**40)
        a_run.save(2)
        wait_for(lambda: a_run.said)
        assert sent and 'no answer within 2 s' in a_run.said[0]
        assert not a_run.mirror.close(0)
    assert 'step 2 did not get to s3://runs/tiny' in a_run.said[-1] and a_run.pins() == []
    s3.process.send_signal(signal.SIGCONT)
    assert fetch(s3.url, tmp_path / 'bare')[0] == 1
    assert (tmp_path / 'bare' / 'ckpt.pt').read_bytes() == a_run.bytes[1][0]


def test_a_damaged_copy_is_said_and_the_one_before_is_taken(s3, training, tmp_path):
    a_run = training(s3.url)
    for step in (1, 2):
        a_run.save(step, best=True)
        a_run.settle()
    fs, root = mirror.Folder(s3.url).opened
    for name in ('last/2.pt', 'best/2.pt'):
        fs.pipe_file(f'{root}/{name}', a_run.bytes[2][0][:-1000])
    for name in ('last/../../escaped.pt', 'last/9.pt.part', 'last/٣.pt', 'last/-5.pt', 'last/1e3.pt'):  # none of ours
        fs.pipe_file(f'{root}/{name}', b'')
    step, said = fetch(s3.url, tmp_path / 'bare')
    assert step == 1 and [line.split()[1] for line in said] == ['last/2.pt', 'best/2.pt']
    assert {p.name: p.read_bytes() for p in (tmp_path / 'bare').iterdir()} == {
        'ckpt.pt': a_run.bytes[1][0], 'log.jsonl': a_run.bytes[1][1]}

    fs.pipe_file(f'{root}/last/1.pt', b'')
    with pytest.raises(UserError, match='no checkpoint of it is whole'):
        fetch(s3.url, tmp_path / 'barer')
    assert list((tmp_path / 'barer').iterdir()) == []


def test_no_checkpoint_goes_before_the_one_that_replaces_it_is_there(training, tmp_path, monkeypatch):
    calls, call = [], mirror.Folder.call

    def recorded(self, method, *args, **kwargs):
        result = call(self, method, *args, **kwargs)
        if method in ('put_file', 'cp_file', 'pipe_file', 'rm_file'):
            path = args[0] if method in ('pipe_file', 'rm_file') else args[1]
            calls.append((method, path.partition('/copy/')[2]))
        return result

    monkeypatch.setattr(mirror.Folder, 'call', recorded)
    a_run = training(f'file://{tmp_path}/copy', keep_last=1)
    for step in (1, 2):
        a_run.save(step, best=True)
        a_run.settle()
    assert calls[-7:] == [
        ('pipe_file', 'settings.json'), ('pipe_file', 'last/2.jsonl'), ('put_file', 'last/2.pt'),
        ('rm_file', 'last/1.jsonl'), ('rm_file', 'last/1.pt'),
        ('cp_file', 'best/2.pt'), ('rm_file', 'best/1.pt')]  # what is there already does not travel again


@pytest.mark.parametrize('error', [NotImplementedError, OSError('a copy within the server fails')])
def test_a_server_that_cannot_copy_within_itself_gets_the_file_again(training, tmp_path, monkeypatch, error):
    call = mirror.Folder.call

    def cannot(self, method, *args, **kwargs):
        if method == 'cp_file':
            raise error
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(mirror.Folder, 'call', cannot)
    a_run = training(f'file://{tmp_path}/copy')
    a_run.save(1, best=True)
    assert a_run.mirror.close(20)
    assert listing(f'file://{tmp_path}/copy')['best/1.pt'] == a_run.bytes[1][0]


def test_a_short_copy_is_made_again_and_so_is_a_connection_that_broke(training, tmp_path):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem
    faults = ['short', 'breaks']

    class Fragile(MemoryFileSystem):
        protocol, broken = 'fragile', False

        def put_file(self, lpath, rpath, **kwargs):
            fault = faults.pop(0) if faults else ''
            self.broken |= fault == 'breaks'
            if self.broken:
                raise ConnectionError('broken pipe')
            super().put_file(lpath, rpath, **kwargs)
            if fault == 'short':
                self.pipe_file(rpath, self.cat_file(rpath)[:-1])

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.replace('fragile://', 'memory://'))

    fsspec.register_implementation('fragile', Fragile, clobber=True)
    a_run = training(f'fragile://{tmp_path.name}')
    a_run.save(1)
    a_run.settle()
    assert faults == [] and len(a_run.said) == 2
    assert 'cannot be reached (OSError: last/1.pt has' in a_run.said[0] and 'there again' in a_run.said[1]
    assert listing(f'fragile://{tmp_path.name}')['last/1.pt'] == a_run.bytes[1][0]


def test_a_disk_that_is_mounted_later_gets_the_checkpoint_with_its_log_of_then(training, tmp_path):
    a_run = training(f'file://{tmp_path}/mount/copy')
    a_run.save(1)
    wait_for(lambda: a_run.said)
    with open(a_run.folder / 'log.jsonl', 'a') as f:
        f.write('the run goes on\n')
    assert not (tmp_path / 'mount').exists(), 'a folder in place of the disk would fill the wrong one'
    (tmp_path / 'mount').mkdir()
    assert a_run.mirror.close(20)
    there = listing(f'file://{tmp_path}/mount/copy')
    assert (there['last/1.pt'], there['last/1.jsonl']) == a_run.bytes[1]


def test_the_file_is_copied_as_it_was_though_the_run_goes_on(training, tmp_path, monkeypatch):
    begun, go_on, call = threading.Event(), threading.Event(), mirror.Folder.call

    def slow(self, method, *args, **kwargs):
        if method == 'pipe_file':
            begun.set()
            assert go_on.wait(20)
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(mirror.Folder, 'call', slow)
    a_run = training(f'file://{tmp_path}/copy', keep_last=9)
    (a_run.folder / 'ckpt.pt.mirror7').write_text('left over by a process that was killed')
    a_run.save(1)
    assert begun.wait(20) and a_run.pins() == ['ckpt.pt.mirror0']
    a_run.save(2)  # waits, until 3 takes its place
    a_run.save(3)
    assert len(a_run.pins()) == 2
    go_on.set()
    assert a_run.mirror.close(20)
    there = listing(f'file://{tmp_path}/copy')
    assert sorted(there) == ['last/1.jsonl', 'last/1.pt', 'last/3.jsonl', 'last/3.pt', 'settings.json']
    assert (there['last/1.pt'], there['last/1.jsonl']) == a_run.bytes[1]


def test_a_file_system_that_hangs_for_good_is_said(training, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem
    go_on = threading.Event()
    monkeypatch.setattr(mirror, 'LIMIT', 0.05)
    monkeypatch.setattr(LocalFileSystem, 'pipe_file', lambda *args, **kwargs: go_on.wait(20))  # cannot be interrupted
    a_run = training(f'file://{tmp_path}/copy')
    a_run.save(1)
    time.sleep(0.5)
    assert a_run.said == []
    a_run.save(2)
    assert len(a_run.said) == 1 and 'no answer' in a_run.said[0] and a_run.longest < 0.5
    assert not a_run.mirror.close(0.2)
    assert len(a_run.said) == 2 and 'step 1, 2 did not get' in a_run.said[1]
    go_on.set()


def test_credentials_that_may_not_remove_are_enough_to_copy(training, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def refused(self, path):
        raise PermissionError('Access Denied')

    monkeypatch.setattr(LocalFileSystem, 'rm_file', refused)
    a_run = training(f'file://{tmp_path}/copy', keep_last=1)
    for step in (1, 2, 3):
        a_run.save(step)
        a_run.settle()
    assert len(a_run.said) == 1 and 'cannot be removed (PermissionError: Access Denied)' in a_run.said[0]
    assert {'last/1.pt', 'last/2.pt', 'last/3.pt'} < listing(f'file://{tmp_path}/copy').keys()


def test_a_run_that_goes_back_leaves_later_steps_alone(training, tmp_path):
    a_run = training(f'file://{tmp_path}/copy', keep_last=1)
    for step in (1, 9, 2, 3):
        a_run.save(step)
        a_run.settle()
    assert {name for name in listing(f'file://{tmp_path}/copy') if name.endswith('.pt')} == {'last/3.pt', 'last/9.pt'}


def test_a_mirror_out_of_reach_is_one_line_within_seconds(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, 'PATIENCE', 1)
    url = 's3://absent/tiny'
    for ask in (lambda: mirror.latest_step(url), lambda: fetch(url, tmp_path / 'bare')):
        with pytest.raises(UserError, match='absent/tiny.*bucket does not exist'):
            ask()
    s3.kill()
    begun = time.monotonic()
    for ask in (lambda: mirror.latest_step(s3.url), lambda: fetch(s3.url, tmp_path / 'bare')):
        with pytest.raises(UserError, match="mirror='s3://runs/tiny' cannot be reached .*--mirror=''") as e:
            ask()
        assert '\n' not in str(e.value)
    assert time.monotonic() - begun < 20
    assert not (tmp_path / 'bare').exists()


@pytest.mark.parametrize('url', ['s3://rnus/tiny', 's3://rnus'])
def test_no_bucket_is_made_for_a_mistyped_name(s3, training, url):
    a_run = training(url)
    a_run.save(1)
    wait_for(lambda: a_run.said)
    assert 'bucket does not exist' in a_run.said[0]
    assert [name for name in mirror.Folder(s3.url).opened[0].ls('')] == ['runs']


def test_a_wrong_url_is_one_line(monkeypatch):
    for url, words in (('/mnt/backup', 'is no URL'), ('s4://bucket/run', 'is no URL that fsspec knows'),
                       ('s4://me:pass@word@bucket/run', r"mirror='s4://\*\*\*@bucket/run'"),
                       ('s4://host/run?token=abc', r"'s4://host/run\?\*\*\*'")):
        with pytest.raises(UserError, match=words):
            mirror.Mirror(url, 1, print)
    from fsspec.registry import known_implementations
    monkeypatch.setitem(known_implementations, 'far', {'class': 'no_such_package.FarFileSystem',
                                                       'err': 'Install no_such_package to go far'})
    with pytest.raises(UserError, match=r"mirror='far://run' needs a package that is not installed: Install no_such_package"):
        mirror.latest_step('far://run')


def test_credentials_in_the_url_are_never_said(training):
    a_run = training('ftp://me:hunter2@127.0.0.1:1/run')  # where nobody listens
    a_run.save(1)
    wait_for(lambda: a_run.said)
    a_run.mirror.close(0)
    assert len(a_run.said) == 2 and '127.0.0.1:1/run' in a_run.said[0] and 'hunter2' not in ''.join(a_run.said)


def test_a_full_disk_is_one_line_and_leaves_nothing(training, tmp_path, monkeypatch):
    import errno

    from fsspec.implementations.local import LocalFileSystem
    a_run = training(f'file://{tmp_path}/copy')
    a_run.save(1)
    assert a_run.mirror.close(20)

    def full(self, there, here, **kwargs):
        with open(here, 'wb') as f:
            f.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(LocalFileSystem, 'get_file', full)
    with pytest.raises(UserError, match='no room for the .* bytes of last/1.pt .*--out_dir'):
        fetch(f'file://{tmp_path}/copy', tmp_path / 'bare')
    assert list((tmp_path / 'bare').iterdir()) == []
