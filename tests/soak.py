"""
Kills training runs at random moments, a hundred times, and compares every loss and the final weights with a run that nobody
disturbed: nothing may be lost, and nothing different. tests/test_soak.py does a few of these.

    python tests/soak.py                            # 100 kills of one process, then 100 under torchrun --nproc_per_node=2
    python tests/soak.py --kills=10 --seed=1

A kill is kill -9 of all processes, of a single worker (torchrun starts both again), or SIGTERM. One in five takes the machine
along: its folder is gone, and the run goes on from the mirror, on an S3 server on this machine. Others damage the latest
checkpoint, or have the server away for a while. Needs what requirements-dev.txt names.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from conftest import PREPARE_TINY, ROOT, S3, TINY, losses, run

STEPS = 3000  # of a run; it is killed long before


def soak(folder, kills, processes, seed, say=print, pause=None):
    """
    Raises AssertionError where the killed run differs; returns how often what happened. `pause`: seconds between two kills, at
    most.
    """
    pause = pause or 6 * processes  # it takes as long to start
    chance, happened = random.Random(seed), {}
    args = [arg for arg in TINY if not arg.startswith('--log_interval')] + [
        f'--max_iters={STEPS}', '--schedule=constant', '--dropout=0.1', '--checkpoint_interval=20', '--eval_interval=50',
        '--log_interval=1', '--init_from=auto']
    server = S3()
    os.environ |= server.env
    server.start()
    killed = folder / 'out' / 'killed'
    command = [*args, '--out_dir=out/killed', f'--mirror={server.url}']
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', '--max_restarts=100']

    def count(what):
        happened[what] = happened.get(what, 0) + 1

    def launch(*more):
        return subprocess.Popen([*launcher, str(ROOT / 'train.py'), *command, *more], cwd=folder, start_new_session=True,
                                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def find_workers():
        found = subprocess.run(['pgrep', '-P', str(process.pid), '-f', 'train.py'], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill_all():
        workers = find_workers()  # which have sessions of their own under torchrun
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for worker in workers:
            while os.path.exists(f'/proc/{worker}') and Path(f'/proc/{worker}/stat').read_text().split()[2] != 'Z':
                os.kill(worker, signal.SIGKILL)
                time.sleep(0.01)

    try:
        with open(folder / f'printed_{processes}.txt', 'wb') as log:
            process, done = launch(), 0
            while done < kills:
                time.sleep(chance.uniform(0, pause))
                if process.poll() is not None:
                    assert process.returncode in (0, 1, 128 + signal.SIGTERM), f'exit code {process.returncode}, see {log.name}'
                    process = launch()
                    continue
                how = chance.choice(['kill -9', 'SIGTERM', 'kill -9 of a worker' if processes > 1 else 'kill -9'])
                workers = find_workers()
                count(how)
                done += 1
                if how == 'SIGTERM':
                    process.terminate()
                    try:
                        process.wait(timeout=60)
                    except subprocess.TimeoutExpired:
                        kill_all()
                elif how == 'kill -9 of a worker' and workers:
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    continue  # torchrun sees to it
                else:
                    kill_all()
                after = chance.random()
                if after < 0.2 and (killed / 'ckpt.pt').exists():
                    count('the folder is gone')
                    shutil.rmtree(killed)
                elif after < 0.3 and (killed / 'ckpt.1.pt').exists():
                    count('the latest checkpoint is damaged')
                    data = bytearray((killed / 'ckpt.pt').read_bytes())
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                    (killed / 'ckpt.pt').write_bytes(data)
                elif after < 0.35:
                    count('the mirror is gone, and comes back empty')
                    server.kill()
                    server.start()
                say(f'{done}/{kills} {how}')
                process = launch()
            kill_all()
        last = torch.load(killed / 'ckpt.pt', weights_only=True)['iter'] if (killed / 'ckpt.pt').exists() else 0
        end = max(last, 100) + 20
        for out_dir in ('killed', 'whole'):
            run('train.py', *args, f'--max_iters={end}', f'--out_dir=out/{out_dir}', cwd=folder,
                torchrun=processes if processes > 1 else 0, env=os.environ)
    finally:
        if process.poll() is None:
            kill_all()
        server.kill()
    a, b = losses(killed), losses(folder / 'out' / 'whole')
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    different = [key for key in a if a[key] != b[key]]
    assert not different, f'{len(different)} of {len(a)} losses differ, the first at {different[0]}'
    weights = [torch.load(folder / 'out' / name / 'ckpt.pt', weights_only=True)['model'] for name in ('killed', 'whole')]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return happened | {'steps': end, 'losses compared': len(a)}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=1337)
    arguments = parser.parse_args()
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run('prepare.py', *PREPARE_TINY, cwd=folder)
            happened = soak(folder, arguments.kills, processes, arguments.seed, lambda line: print(line, flush=True))
        print(f'{processes} process{"es" * (processes > 1)}: ' + ', '.join(f'{n} {what}' for what, n in happened.items()) +
              ': every loss and all weights are the same', flush=True)
