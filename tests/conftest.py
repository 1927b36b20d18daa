"""What the tests share: the repository's scripts run as a user runs them, each in a folder of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['HF_HUB_OFFLINE'] = '1'
CACHE = ROOT.parent / 'shared' / 'tiktoken_cache'
if CACHE.is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(CACHE))
os.environ['WANDB_MODE'] = 'offline'

# a model small enough that a run takes seconds, on text small enough to be prepared in one
TINY = ('--dataset=tiny --device=cpu --dtype=float32 --block_size=16 --batch_size=4 --n_layer=2 --n_head=4 --n_kv_head=2 '
        '--n_embd=32 --max_iters=20 --eval_interval=10 --eval_iters=2 --log_interval=1 --sample_interval=0 '
        '--warmup_iters=2 --out_dir=out/tiny').split()
GPT2 = '--norm=layernorm --mlp=gelu --pos=learned --bias=True --n_kv_head=0'.split()


def start(script, *args, cwd, torchrun=0, **kwargs):
    """Starts one of our scripts; under torchrun with so many processes, if given."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={torchrun}']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'} | kwargs.pop('env', {})
    def listen():  # to Ctrl-C, which what a shell runs in the background does not
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen([*launcher, str(ROOT / script), *args], cwd=cwd, env=env, text=True, preexec_fn=listen,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run(script, *args, cwd, code=0, **kwargs):
    """Runs one of our scripts to its end, expects that exit code, and returns what it printed (stdout, stderr)."""
    process = start(script, *args, cwd=cwd, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f'exit code {process.returncode}\n{out}\n{err}'
    return out, err


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
    """A folder in which data/tiny (this repository's own source) and data/owl are prepared; tests do not write to it."""
    folder = tmp_path_factory.mktemp('prepared')
    run('prepare.py', f'--source={ROOT}', '--include=*.py', '--name=tiny', '--val_fraction=0.2', '--exclude=.* out venv data',
        cwd=folder)
    run('prepare.py', str(ROOT / 'data' / 'owl.py'), cwd=folder)
    return folder


@pytest.fixture
def place(tmp_path, prepared):
    """An empty folder to run in, with the prepared data in reach."""
    (tmp_path / 'data').symlink_to(prepared / 'data')
    return tmp_path
