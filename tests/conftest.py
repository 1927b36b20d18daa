"""What the tests share: the repository's scripts run as a user runs them, each in a folder of its own."""

import email
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['HF_HUB_OFFLINE'] = '1'
CACHE = ROOT.parent / 'shared' / 'tiktoken_cache'
if CACHE.is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(CACHE))
os.environ['WANDB_MODE'] = 'offline'


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` means: a worker more than there are cores, since there are tests that wait for servers and timeouts."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()) + 1


# a model small enough that a run takes seconds, on text small enough to be prepared in one
TINY = ('--dataset=tiny --device=cpu --dtype=float32 --block_size=16 --batch_size=4 --n_layer=2 --n_head=4 --n_kv_head=2 '
        '--n_embd=32 --learning_rate=8e-3 --warmup_iters=2 --max_iters=20 --eval_interval=10 --eval_iters=2 --log_interval=1 '
        '--sample_interval=0 --picture=False --out_dir=out/tiny').split()
SOURCE = Path(email.__file__).parent  # text that does not change with this repository
PREPARE_TINY = [f'--source={SOURCE}', '--include=*.py', '--name=tiny', '--val_fraction=0.2']
GPT2 = '--norm=layernorm --mlp=gelu --pos=learned --bias=True --n_kv_head=0'.split()


def start(script, *args, cwd, torchrun=0, **kwargs):
    """Starts one of our scripts; under torchrun with so many processes, if given."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'} | kwargs.pop('env', {})
    def listen():  # to Ctrl-C, which what a shell runs in the background does not
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen([sys.executable, *launcher(torchrun), str(ROOT / script), *args], cwd=cwd, env=env, text=True,
                            preexec_fn=listen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def launcher(torchrun):
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={torchrun}'] if torchrun else []


def run(script, *args, cwd, code=0, torchrun=0, env=None):
    """Runs one of our scripts to its end, expects that exit code, and returns what it printed (stdout, stderr)."""
    returned, out, err = starter().run([*launcher(torchrun), str(ROOT / script), *args], cwd, env or {})
    assert returned == code, f'exit code {returned}\n{out}\n{err}'
    return out, err


class Starter:
    """The process of starter.py."""

    def __init__(self):
        command = [sys.executable, str(ROOT / 'tests' / 'starter.py')]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def run(self, args, cwd, env):
        """Runs a script to its end; its exit code, stdout and stderr. Raises TimeoutError after 300 seconds."""
        with tempfile.NamedTemporaryFile('r') as out, tempfile.NamedTemporaryFile('r') as err:
            env = {**os.environ, 'OMP_NUM_THREADS': '1'} | env
            print(json.dumps({'args': args, 'cwd': str(cwd), 'env': env, 'out': out.name, 'err': err.name}),
                  file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], 300)[0]:
                subprocess.run(['pkill', '-KILL', '-P', str(self.process.pid)])
                self.process.stdout.readline()
                raise TimeoutError(f'{args} took more than 300 seconds\n{out.read()}\n{err.read()}')
            return int(self.process.stdout.readline()), out.read(), err.read()


@functools.cache
def starter():
    return Starter()


def read_log(out_dir):
    with open(out_dir / 'log.jsonl') as f:
        return [json.loads(line) for line in f]


def losses(out_dir):
    """{(iter, kind): loss} of a run's log, to the last digit; an iteration that stands there twice is an error."""
    found = {}
    for record in read_log(out_dir):
        for kind in ('loss', 'val_loss'):
            if kind in record:
                assert (record['iter'], kind) not in found
                found[record['iter'], kind] = record[kind]
    return found


def write_tokens(folder, train, val=None, mask=None, vocab_size=257):
    """A data set of given ids, with the manifest that prepare.py would write."""
    import hashlib

    import numpy as np

    from tokenizer import load_tokenizer
    tok = load_tokenizer('bytes')
    files = {}
    folder.mkdir(parents=True)
    for split, ids in (('train', train), ('val', val)):
        if ids is not None:
            data = np.asarray(ids, '<u2').tobytes()
            (folder / f'{split}.bin').write_bytes(data)
            files[f'{split}.bin'] = {'tokens': len(ids), 'documents': 1, 'bytes': len(ids), 'max_id': int(max(ids)),
                                     'sha256': hashlib.sha256(data).hexdigest()}
    if mask is not None:
        (folder / 'train.mask').write_bytes(np.asarray(mask, np.uint8).tobytes())
        files['train.bin']['mask'] = 'train.mask'
    meta = {'dtype': 'uint16', 'vocab_size': vocab_size, 'eot_id': 256, 'files': files,
            'tokenizer': {'name': 'bytes', 'fingerprint': tok.fingerprint()}}
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    """A folder in which data/tiny (the source of a package of Python's) and data/owl are prepared; tests do not write to it."""
    folder = tmp_path_factory.mktemp('prepared')
    run('prepare.py', *PREPARE_TINY, cwd=folder)
    run('prepare.py', str(ROOT / 'data' / 'owl.py'), cwd=folder)
    return folder


@pytest.fixture
def place(tmp_path, prepared):
    """An empty folder to run in, with the prepared data in reach."""
    (tmp_path / 'data').symlink_to(prepared / 'data')
    return tmp_path


class S3:
    """A real S3 server on loopback, with a bucket for `url`. It keeps all in memory: what is started again is empty."""

    def __init__(self):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.url, self.process = 's3://runs/tiny', None
        self.env = {'AWS_ENDPOINT_URL': f'http://127.0.0.1:{self.port}', 'AWS_ACCESS_KEY_ID': 'key',
                    'AWS_SECRET_ACCESS_KEY': 'secret', 'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_CONFIG_FILE': os.devnull,
                    'AWS_SHARED_CREDENTIALS_FILE': os.devnull, 'AWS_MAX_ATTEMPTS': '1', 'NO_PROXY': '127.0.0.1'}

    def start(self):
        self.process = subprocess.Popen([sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', str(self.port)],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                socket.create_connection(('127.0.0.1', self.port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        request = urllib.request.Request(f'http://127.0.0.1:{self.port}/runs', method='PUT')
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def s3(monkeypatch):
    """An S3 server that runs; its `env` is in the environment, `url` is a mirror."""
    pytest.importorskip('s3fs')
    pytest.importorskip('moto.server', reason='needs moto[server]')
    server = S3()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield server
    server.kill()
