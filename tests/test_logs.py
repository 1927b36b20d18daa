"""The records of a run: a full disk loses no line of them, and wandb down, slow, dead or full never matters to the run."""

import contextlib
import http.server
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

import logs
from configurator import UserError

# a run in a process of its own, a second long; MEANWHILE happens after half of it
RUN = """
import os, signal, subprocess, sys, time
sys.path.insert(0, ROOT)
import logs
logs.__file__ = SERVE
run, slowest = logs.Wandb('project', 'name', {'setting': 1}, FOLDER, 'abcd1234', lambda *words: print(*words, flush=True)), 0
print('process', run.process.pid, flush=True)
for step in range(40):
    if step == 20:
        MEANWHILE
    started = time.perf_counter()
    run.log({'iter': step, 'text': f'step-{step}.', 'loss': float('nan')}, step)
    slowest = max(slowest, time.perf_counter() - started)
    time.sleep(0.02)
finished = run.finish(SECONDS)
print('slowest', slowest, 'finished', finished, flush=True)
sys.exit(3)
"""

# wandb's process as it is, but for the time it has after the run
SERVE = """
import sys, threading
sys.path.insert(0, ROOT)
import logs
logs.GRACE, timer = GRACE, threading.Timer
threading.Timer = lambda seconds, *rest: timer(seconds / 5, *rest)
logs._serve()
"""

# sends its service a signal, once there is one and it has begun the run
SIGNAL_SERVICE = """
        while not os.path.exists(FOLDER + '/wandb/latest-run'):
            time.sleep(0.05)
        time.sleep(0.5)
        service = int(subprocess.run(['pgrep', '-P', str(run.process.pid)], capture_output=True, check=True).stdout)
        print('service', service, flush=True)
        os.kill(service, signal.%s)
"""


def is_over(pid):
    return subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True).stdout[:1] in ('', 'Z')


def wandb_run(folder, url='http://127.0.0.1:9', mode='online', seconds=15, grace=300, meanwhile='pass', patience=2, code=3,
              key='x' * 40, scripts=None, **kwargs):
    """What a run beside that wandb server printed. It must end in time, and each call of log; wandb's process must end, too."""
    pytest.importorskip('wandb')
    serve = (scripts or folder.parent) / 'serve.py'
    serve.write_text(f'ROOT, GRACE = {str(ROOT)!r}, {grace}' + SERVE)
    about = f'ROOT, SERVE, FOLDER, SECONDS = {str(ROOT)!r}, {str(serve)!r}, {str(folder)!r}, {seconds}'
    env = {**os.environ, 'WANDB_MODE': mode, 'WANDB_BASE_URL': url, 'WANDB_API_KEY': key, 'HOME': str(folder.parent),
           'WANDB_INIT_TIMEOUT': str(patience), 'WANDB_HTTP_TIMEOUT': '1'}
    started = time.monotonic()
    run = subprocess.Popen([sys.executable, '-c', about + RUN.replace('MEANWHILE', meanwhile), '--flag'], text=True, env=env,
                           cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                           **kwargs)
    text = ''
    try:
        text = run.communicate(timeout=60)[0]  # as `| tee` does, it waits for all that hold its output
        assert run.returncode == code and 'Traceback' not in text and '\x1b' not in text, text
        assert time.monotonic() - started < seconds + 5
        assert code < 0 or float(re.search(r'slowest (\S+)', text)[1]) < 0.5
        process = int(re.search(r'process (\d+)', text)[1])
        assert 'not finished' not in text or not is_over(process)
        ended = time.monotonic()
        while not is_over(process):
            assert time.monotonic() - ended < 10, text
            time.sleep(0.1)
    finally:
        for pid in [run.pid, *re.findall(r'^(?:process|service) (\d+)', text, re.MULTILINE)]:
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        run.wait()
    return text


@contextlib.contextmanager
def server(answer):
    """A server of wandb, which for a request's path and body answers with a status and an object, or with None and nothing."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            found = answer(self.path, self.rfile.read(int(self.headers.get('Content-Length') or 0)))
            if found is None:
                over.wait()
                return
            self.send_response(found[0])
            self.end_headers()
            self.wfile.write(json.dumps(found[1]).encode())

        do_GET = do_PUT = do_POST

        def log_message(self, *args):
            pass

    over = threading.Event()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        s.daemon_threads = True
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}'
        over.set()
        s.shutdown()


def graphql(body):
    """What wandb's service needs to hear before it begins a run."""
    owner = {'id': 'e', 'name': 'e'}
    if b'upsertBucket' in body:
        return {'upsertBucket': {'inserted': True, 'bucket': {
            'id': 'r', 'name': 'abcd1234', 'displayName': 'name', 'config': '{}', 'historyLineCount': 0,
            'project': {'id': 'p', 'name': 'project', 'entity': owner}}}}
    if b'RunResumeStatus' in body:
        return {'model': {'id': 'p', 'name': 'project', 'entity': owner, 'bucket': None}}
    if b'createRunFiles' in body:
        return {'createRunFiles': {'runID': 'r', 'uploadHeaders': [], 'files': []}}
    if b'organization' in body:
        return {'entity': {'organization': {'coreWeaveOrganizationId': ''}}}
    return {'viewer': {'id': 'e', 'entity': 'e', 'username': 'e', 'teams': {'edges': []}, 'flags': '{}'},
            'serverInfo': {'cliVersionInfo': {}, 'features': []}}


def runs(folder):
    return sorted(re.sub(r'\d{8}_\d{6}', 'DATE', p.name) for p in (folder / 'wandb').glob('*run-*'))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out'


def steps_in(path):
    """The steps whose records are in a .wandb file."""
    return {int(n) for n in re.findall(rb'step-(\d+)\.', path.read_bytes())}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / 'disk'
    place.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', place]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('only root may mount a small file system, and not everywhere')
    try:
        yield place
    finally:
        subprocess.run(['umount', '-l', place], check=True)


def fill(place):
    with open(place / 'filler', 'wb', buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(100))


def test_wandb_that_works_gets_every_record(folder):
    sent = []

    def answer(path, body):
        sent.append(body)
        return 200, {} if 'file_stream' in path else {'data': graphql(body)}
    with server(answer) as url:
        text = wandb_run(folder, url)
    assert 'finished True' in text and 'failed' not in text and f'wandb: {url}/e/project/runs/abcd1234' in text
    steps = {int(n) for body in sent for n in re.findall(rb'\\"iter\\":(\d+)', body)}
    assert steps == set(range(40)) and runs(folder) == ['run-DATE-abcd1234']
    assert b'--flag' in next(folder.glob('wandb/run-*/*.wandb')).read_bytes()  # our command line, not its own
    assert url in (folder / 'wandb.txt').read_text()


@pytest.mark.parametrize('how', ['down', 'silent', 'broken'])
def test_wandb_out_of_reach_is_logged_offline_for_later(folder, how):
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(('127.0.0.1', 0)))  # the system accepts, nobody answers
        url = {'down': 'http://127.0.0.1:9', 'silent': f'http://127.0.0.1:{silent.getsockname()[1]}',
               'broken': stack.enter_context(server(lambda path, body: (500, {})))}[how]
        text = wandb_run(folder, url, seconds=10)
    assert text.count('wandb: failed') == text.count('wandb: offline; `wandb sync') == 1 and 'finished True' in text
    assert steps_in(next(folder.glob('wandb/offline-run-*-abcd1234/*.wandb'))) == set(range(40))


def test_nobody_is_asked_for_a_key(folder):
    master, terminal = os.openpty()
    try:
        text = wandb_run(folder, key='', stdin=terminal)
    finally:
        os.close(master)
        os.close(terminal)
    assert 'wandb: failed (UsageError: No API key' in text and 'finished True' in text


def test_wandb_that_falls_silent_is_waited_for_only_so_long(folder):
    with server(lambda path, body: None if 'file_stream' in path else (200, {'data': graphql(body)})) as url:
        text = wandb_run(folder, url, seconds=1, grace=2)
    assert 'wandb: not finished after 1 s' in text and 'finished False' in text
    assert steps_in(next(folder.glob('wandb/run-*/*.wandb'))) == set(range(40))
    assert runs(folder) == ['run-DATE-abcd1234']  # and no other, of nothing


def test_a_wandb_that_never_ends_is_ended(folder):
    (folder.parent / 'wandb.py').write_text("import time\ndef init(**about): time.sleep(1000)\nteardown = init")
    assert 'not finished after 0.5 s' in wandb_run(folder, seconds=0.5, grace=1)


def test_a_run_that_ends_before_wandb_was_reached_is_written_offline(folder):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        text = wandb_run(folder, f'http://127.0.0.1:{silent.getsockname()[1]}', seconds=0.5, patience=3)
    assert 'wandb: not finished after 0.5 s' in text and 'finished False' in text
    assert steps_in(next(folder.glob('wandb/offline-run-*/*.wandb'))) == set(range(40))


def test_a_service_that_dies_is_replaced_by_one_offline(folder):
    with server(lambda path, body: (200, {} if 'file_stream' in path else {'data': graphql(body)})) as url:
        text = wandb_run(folder, url, meanwhile=SIGNAL_SERVICE % 'SIGKILL')
    assert text.count('wandb: failed') == text.count('wandb: offline; `wandb sync') == 1 and 'finished True' in text
    assert runs(folder) == ['offline-run-DATE-abcd1234', 'run-DATE-abcd1234']
    assert steps_in(next(folder.glob('wandb/offline-run-*/*.wandb'))) >= set(range(22, 40))


def test_a_service_that_hangs_is_left_behind(folder):
    text = wandb_run(folder, mode='offline', meanwhile=SIGNAL_SERVICE % 'SIGSTOP', seconds=1, grace=1)
    assert 'wandb: not finished after 1 s' in text and 'finished False' in text


def test_a_run_that_is_killed_is_finished_by_wandb(folder):
    text = wandb_run(folder, mode='offline', meanwhile='os.kill(os.getpid(), signal.SIGKILL)', code=-signal.SIGKILL)
    assert 'finished' not in text
    assert steps_in(next(folder.glob('wandb/offline-run-*/*.wandb'))) == set(range(20))


def test_ctrl_c_reaches_only_the_run(folder):
    meanwhile = """
        try:
            time.sleep(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell runs in the background ignores
            os.killpg(0, signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            print('interrupted', flush=True)
"""
    text = wandb_run(folder, mode='offline', meanwhile=meanwhile)
    assert 'interrupted' in text and 'finished True' in text
    assert steps_in(next(folder.glob('wandb/offline-run-*/*.wandb'))) == set(range(40))


def test_wandb_on_a_full_disk(small_disk):
    out = small_disk / 'out'
    out.mkdir()
    fill(small_disk)
    wandb_run(out, mode='offline', seconds=4, scripts=out.parent.parent)


def test_a_resumed_run_is_the_same_run_there(folder):
    for number in (1, 2):
        assert 'finished True' in wandb_run(folder, mode='offline')  # longer than the second by which its folder is named
        assert runs(folder) == ['offline-run-DATE-abcd1234'] * number
    ids = {logs.new_id() for _ in range(100)}
    assert len(ids) == 100 and all(re.fullmatch('[a-z0-9]{8}', id) for id in ids)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A run beside a wandb that writes what it gets to the file got; it, what it said, and the file."""
    (tmp_path / 'wandb.py').write_text(f"""
class Run:
    url, got = 'https://pretended', open({str(tmp_path / 'got')!r}, 'w')
    def log(self, record, step):
        assert record['iter'] == step
        if self.mode != 'offline' and 'fails' in record:
            raise OSError('lost')
        print(step, file=self.got, flush=True)
    def finish(self, exit_code):
        print('finished', exit_code, file=self.got, flush=True)
def init(mode, **about):
    Run.mode = mode
    return Run()
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    said = []
    run = logs.Wandb('project', 'name', {}, str(tmp_path), logs.new_id(), said.append)
    try:
        yield run, said, tmp_path / 'got'
    finally:
        run.process.kill()
        run.process.wait()


def test_what_finds_no_room_is_dropped_and_said_once(pretended):
    run, said, got = pretended
    os.kill(run.process.pid, signal.SIGSTOP)
    started = time.perf_counter()
    for step in range(100):
        run.log({'iter': step, 'text': 'x' * 5000}, step)  # more than is written whole or not at all
    assert time.perf_counter() - started < 1
    assert said == ['wandb: its process takes no more records; what it does not take is in log.jsonl only']
    os.kill(run.process.pid, signal.SIGCONT)
    time.sleep(0.5)
    run.log({'iter': 100}, 100)  # after a line that was cut
    assert not run.finish(10) and said[1:] == ['wandb: https://pretended']
    taken = got.read_text().split('\n')
    assert taken[-3:] == ['100', 'finished 0', ''] and 5 < len(taken) < 30
    assert taken[:-3] == [str(step) for step in range(len(taken) - 3)]
    run.log({'iter': 101}, 101)  # neither does that fail


def test_the_record_that_fails_is_logged_again(pretended):
    run, said, got = pretended
    for step in range(4):
        run.log({'iter': step, **({'fails': 1} if step == 1 else {})}, step)
    assert run.finish(10) and got.read_text() == '0\n1\n2\n3\nfinished 0\n'
    assert said == ['wandb: https://pretended', 'wandb: failed (OSError: lost)', 'wandb: https://pretended']


def test_a_run_that_breaks_off_counts_as_failed(pretended):
    run, said, got = pretended
    run.log({'iter': 0}, 0)
    run.process.stdin.close()
    assert run.process.wait(10) == 0 and got.read_text() == '0\nfinished 1\n'


def test_a_process_that_dies_is_said_once(pretended):
    run, said, got = pretended
    run.process.kill()
    time.sleep(0.2)
    for step in range(10):
        run.log({'iter': step}, step)
    assert said == ['wandb: its process takes no more records; what it does not take is in log.jsonl only']
    assert not run.finish(10) and len(said) == 1


def test_wandb_not_installed_is_said_at_once(monkeypatch, tmp_path):
    (tmp_path / 'wandb').mkdir()  # what wandb itself leaves behind is no package
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    with pytest.raises(UserError, match='needs wandb: pip install wandb'):
        logs.Wandb('project', 'name', {}, '.', logs.new_id(), print)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill_and_free(path, make_full, make_room):
    """A log through a disk that is full twice; what it said."""
    said = []
    log = logs.Log(str(path), said.append)
    for step in range(500):
        if step in (100, 300):
            make_full()
        if step == 250:
            assert path.read_bytes().count(b'\n') < 250 and not log.flush()
            make_room()
        log.write({'iter': step, 'text': 'x' * (step % 90)})
    assert not log.close() and len(said) == 3
    make_room()
    assert log.close() and len(said) == 4
    assert [r['iter'] for r in records(path)] == list(range(500))
    assert all('its lines wait in memory' in line for line in said[::2])
    assert all('no line is lost' in line for line in said[1::2])


def test_a_full_disk_loses_no_line(small_disk):
    fill_and_free(small_disk / 'log.jsonl', lambda: fill(small_disk), lambda: os.remove(small_disk / 'filler'))


def test_a_file_that_may_not_grow_loses_no_line(tmp_path):
    path, (soft, hard) = tmp_path / 'log.jsonl', resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the fourth line from there is cut in its midst
        fill_and_free(path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 140, hard)),
                      lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_log_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / 'log.jsonl'
    before = [{'iter': 0, 'val_loss': 2.0}, {'iter': 0, 'loss': 1.0}, {'iter': 5, 'loss': 1.0}, {'iter': 10, 'val_loss': 1.0},
              {'iter': 10, 'loss': 1.0}]
    for evaluated, kept in ((True, 4), (False, 3)):
        path.write_text(''.join(json.dumps(r) + '\n' for r in before) + '{"iter": 11, "lo')  # a crash
        log = logs.Log(str(path), print, first_iter=10, evaluated=evaluated)
        assert records(path) == before[:kept]
        log.write({'iter': 10, 'loss': 3.0})
        assert records(path) == [*before[:kept], {'iter': 10, 'loss': 3.0}]  # at once, not when it is closed
        assert log.close()
    logs.Log(str(path), print, first_iter=4).close()
    assert records(path) == before[:2]
    logs.Log(str(path), print).close()
    assert path.read_bytes() == b''
    path.unlink()
    assert logs.Log(str(path), print, first_iter=10).close() and path.read_bytes() == b''


@pytest.mark.parametrize('line', [b'{"iter": 1, "lo', b'[1]', b'{"loss": 1}', b'{"iter": "1"}', b'\xff\xfe', b'\0\0', b''])
def test_a_damaged_log_is_said_and_kept(tmp_path, line):
    path = tmp_path / 'log.jsonl'
    content = b'{"iter": 0}\n' + line + b'\n{"iter": 2}\n'
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'is damaged \(line 2: .*\); move it away to go on without it') as e:
        logs.Log(str(path), print, first_iter=3)
    assert '\n' not in str(e.value) and path.read_bytes() == content
    with pytest.raises(UserError, match='cannot be written'):
        logs.Log(str(tmp_path / 'none' / 'log.jsonl'), print)


def test_no_infinity_reaches_the_file(tmp_path):
    path = tmp_path / 'log.jsonl'
    logs.Log(str(path), print).write({'iter': 1, 'a': float('inf'), 'b': float('nan'), 'c': -float('inf'), 'd': None, 'e': 0.1})
    assert path.read_text() == '{"iter": 1, "a": null, "b": null, "c": null, "d": null, "e": 0.1}\n'
