"""The README's table of faults, each of them done to a run: signals, kills, full disks, damaged files, wrong numbers."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SOURCE, TINY, losses, read_log, run, start

import checkpoint

LONG = [*TINY, '--max_iters=100000', '--schedule=constant', '--eval_interval=1000']


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def lines(out_dir):
    return len((out_dir / 'log.jsonl').read_text().splitlines()) if (out_dir / 'log.jsonl').exists() else 0


def saved(out_dir, name='ckpt.pt'):
    return torch.load(out_dir / name, weights_only=True)


# ---- interruptions

@pytest.mark.slow
@pytest.mark.parametrize('name, torchrun', [('SIGTERM', 0), ('SIGINT', 0), ('SIGTERM', 2)])
def test_a_signal_ends_the_step_and_saves_and_nothing_is_lost(place, name, torchrun):
    """Whatever was due at that step, an evaluation here, is left to the run that goes on."""
    args = [*LONG, '--eval_interval=1', '--init_from=auto', '--dropout=0.1']
    process = start('train.py', *args, '--out_dir=out/stopped', cwd=place, torchrun=torchrun)
    wait_for(lambda: lines(place / 'out' / 'stopped') > 20, process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert f'{name}: after this step the run saves and stops' in out and 'stopped at iter' in out
    assert process.returncode == (1 if torchrun else 128 + getattr(signal, name)), err  # torchrun has a code of its own
    at = saved(place / 'out' / 'stopped')['iter']
    for out_dir in ('out/stopped', 'out/whole'):
        run('train.py', *args, f'--out_dir={out_dir}', f'--max_iters={at + 5}', cwd=place, torchrun=torchrun)
    assert losses(place / 'out' / 'stopped') == losses(place / 'out' / 'whole')


def test_a_second_signal_stops_at_once(place):
    process = start('train.py', *LONG, '--gradient_accumulation_steps=100000', cwd=place)  # a step of minutes
    wait_for(lambda: lines(place / 'out' / 'tiny') > 0, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert any('a second one stops at once' in line for line in iter(process.stdout.readline, ''))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not (place / 'out' / 'tiny' / 'ckpt.pt').exists()


@pytest.mark.slow
def test_torchrun_starts_a_killed_worker_again_and_the_curve_is_the_same(place):
    args = [*TINY, '--max_iters=120', '--checkpoint_interval=10', '--init_from=auto', '--dropout=0.1']
    run('train.py', *args, '--out_dir=out/whole', cwd=place, torchrun=2)
    process = start('train.py', *args, '--out_dir=out/killed', cwd=place, torchrun=2, env={'PET_MAX_RESTARTS': '3'})
    out = place / 'out' / 'killed'
    wait_for(lambda: lines(out) > 35, process)
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    text, err = process.communicate(timeout=200)
    assert process.returncode == 0 and 'resumed at iter' in text, text + err
    assert losses(out) == losses(place / 'out' / 'whole')


# ---- checkpoints

SAVE = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import checkpoint
path, crash = sys.argv[1:]
state = checkpoint.load(path)
state['iter'] += 1
checkpoint.save(path + '.whole', 1, **state)
size = os.path.getsize(path + '.whole')
os.remove(path + '.whole')
# beyond its limit a process is killed, or, if it ignores that, its write fails, as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN if crash == 'full' else signal.SIG_DFL)
for size in [0, 1, 63, 64, 1000, *range(4000, size, size // 25), size - 1000, size - 22, size - 1]:
    if crash == 'full' or os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            checkpoint.save(path, 2, [path.replace('ckpt', 'best')], **state)
        except OSError as e:
            assert crash == 'full', e
        else:
            os._exit(3)
    else:
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGXFSZ
    assert checkpoint.load(path)['iter'] == state['iter'] - 1
"""


@pytest.mark.parametrize('how', ['crash', 'full'])
def test_a_write_that_ends_at_any_byte_leaves_the_checkpoint_before(place, how):
    run('train.py', *TINY, '--max_iters=1', cwd=place)
    path = place / 'out' / 'tiny' / 'ckpt.pt'
    before, best = path.read_bytes(), (path.parent / 'best.pt').stat()
    done = subprocess.run([sys.executable, '-c', SAVE, str(path), how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before and os.path.samestat(best, (path.parent / 'best.pt').stat())
    left = sorted(os.listdir(path.parent))
    assert left == ['best.pt', 'ckpt.pt', *['ckpt.pt.new.tmp'] * (how == 'crash'), 'log.jsonl']


def fill(disk):
    with open(disk / 'filling', 'wb', buffering=0) as f, pytest.raises(OSError):
        while True:
            f.write(bytes(1024))


@pytest.mark.slow
def test_a_full_disk_stops_no_run(place, tmp_path_factory):
    """A file system of its own, filled up while the run goes on, and emptied again."""
    disk = tmp_path_factory.mktemp('disk')
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)], capture_output=True).returncode:
        pytest.skip('mounting a small file system needs root')
    try:
        args = [*TINY, '--max_iters=300', '--schedule=constant', '--eval_interval=30']
        run('train.py', *args, '--out_dir=out/whole', cwd=place)
        process = start('train.py', *args, f'--out_dir={disk}/run', cwd=place)
        said = []

        def wait_for_words(words):
            for line in iter(process.stdout.readline, ''):
                said.append(line)
                if words in line:
                    return
            raise AssertionError(''.join(said))

        wait_for_words('iter 60:')
        fill(disk)
        wait_for_words('could not be written (No space left on device); the run goes on')
        assert checkpoint.load(str(disk / 'run' / 'ckpt.pt'))['iter'] >= 30
        os.remove(disk / 'filling')
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, ''.join(said) + out + err
        assert checkpoint.load(str(disk / 'run' / 'ckpt.pt'))['iter'] == 300
        assert losses(disk / 'run') == losses(place / 'out' / 'whole')

        process = start('train.py', *args, '--max_iters=100000', f'--out_dir={disk}/run', '--init_from=resume', cwd=place)
        wait_for_words('iter 310/')
        fill(disk)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and 'could not be written (No space left on device); make room and go on with' in err
        at = checkpoint.load(str(disk / 'run' / 'ckpt.pt'))['iter']
        assert at >= 300
        _, err = run('train.py', *args, '--max_iters=100000', f'--out_dir={disk}/run', '--init_from=auto', cwd=place, code=2)
        assert 'cannot be written (No space left on device); make room' in err
        os.remove(disk / 'filling')
        run('train.py', f'--max_iters={at + 5}', f'--out_dir={disk}/run', '--init_from=resume', cwd=place)
        run('train.py', *args, f'--max_iters={at + 5}', '--out_dir=out/whole', '--init_from=resume', cwd=place)
        once_more = {key: loss for key, loss in losses(disk / 'run').items() if key != (300, 'val_loss')}
        assert losses(place / 'out' / 'whole').items() >= once_more.items()
    finally:
        process.kill()
        process.wait()
        subprocess.run(['umount', str(disk)], check=True)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(place):
    args = [*TINY, '--max_iters=40']
    run('train.py', *args, '--out_dir=out/whole', cwd=place)
    run('train.py', *args, '--max_iters=20', '--lr_decay_iters=40', cwd=place)
    out = place / 'out' / 'tiny'
    data = bytearray((out / 'ckpt.pt').read_bytes())
    data[len(data) // 2] ^= 1
    (out / 'ckpt.pt').write_bytes(data)
    text, _ = run('train.py', '--out_dir=out/tiny', '--init_from=resume', '--max_iters=40', cwd=place)
    assert 'ckpt.pt is damaged' in text and 'looking for the one before' in text and 'resumed at iter 10' in text
    assert losses(out) == losses(place / 'out' / 'whole')
    assert (out / 'ckpt.damaged.pt').exists() and saved(out, 'ckpt.1.pt')['iter'] == 30


def test_which_checkpoints_are_kept(place):
    out = place / 'out' / 'tiny'
    run('train.py', *TINY, '--eval_interval=5', '--checkpoint_interval=2', '--keep_last=3', '--keep_every=8', cwd=place)
    assert [saved(out, name)['iter'] for name in ('ckpt.pt', 'ckpt.1.pt', 'ckpt.2.pt')] == [20, 18, 16]
    assert sorted(p.name for p in out.glob('ckpt_*')) == ['ckpt_16.pt', 'ckpt_8.pt']
    run('train.py', *TINY, '--checkpoint_minutes=1e-6', '--keep_last=4', '--out_dir=out/timed', cwd=place)
    assert [saved(place / 'out' / 'timed', f'ckpt{i}.pt')['iter'] for i in ('', '.1', '.2', '.3')] == [20, 19, 18, 17]


def test_the_best_is_never_replaced_by_a_worse_one(place):
    """Neither when the run gets worse, nor when it goes on from a checkpoint that knows nothing of the best."""
    out = place / 'out' / 'tiny'
    run('train.py', *TINY, '--keep_every=10', cwd=place)
    best = saved(out, 'best.pt')
    assert best['iter'] == 20
    run('train.py', *TINY, '--init_from=resume', '--max_iters=40', '--learning_rate=1', '--schedule=constant', cwd=place)
    assert saved(out, 'best.pt')['iter'] == 20 and saved(out)['best_val_loss'] == best['best_val_loss']
    for name in ('ckpt.pt', 'ckpt.1.pt'):
        (out / name).write_bytes((out / 'ckpt_10.pt').read_bytes())
    run('train.py', *TINY, '--init_from=resume', '--max_iters=30', '--learning_rate=0.5', '--schedule=constant', cwd=place)
    assert read_log(out)[-1]['val_loss'] > best['best_val_loss']
    assert saved(out, 'best.pt')['iter'] == 20 and saved(out)['best_val_loss'] == best['best_val_loss']


def test_a_lost_best_is_told_until_another_is_written(monkeypatch):
    outcomes = iter([OSError('full'), None, OSError('full'), OSError('full'), None])

    def save(*args, **kwargs):
        outcome = next(outcomes)
        if outcome:
            raise outcome

    monkeypatch.setattr(checkpoint, 'save', save)
    saver = checkpoint.Saver('ckpt.pt', 2, lambda line: None, lambda iter, also: None)
    for also in (['best.pt'], ['best.pt']):
        saver.save(also, iter=1)
    saver.wait()
    assert saver.news(0) == (False, False)
    for also in (['best.pt'], [], []):
        saver.save(also, iter=1)
    saver.wait()
    assert saver.news(0) == (False, True) and saver.news(0) == (False, False)


# ---- away from the machine

@pytest.mark.slow
def test_a_bare_machine_goes_on_from_the_mirror(place, s3):
    """The best comes along too; a local checkpoint that is damaged altogether is replaced by the mirror's."""
    args = [*TINY, '--max_iters=40', '--checkpoint_interval=5', '--init_from=auto']
    run('train.py', *args, '--out_dir=out/whole', cwd=place)
    process = start('train.py', *args, '--max_iters=100000', '--lr_decay_iters=40', f'--mirror={s3.url}', cwd=place)
    wait_for(lambda: lines(place / 'out' / 'tiny') > 30, process)
    process.send_signal(signal.SIGTERM)  # which leaves it a minute to copy
    out, err = process.communicate(timeout=100)
    at = saved(place / 'out' / 'tiny')['iter']
    (place / 'out' / 'tiny').rename(place / 'out' / 'gone')
    _, err = run('train.py', *TINY, f'--mirror={s3.url}', cwd=place, code=2)
    assert f"mirror='{s3.url}' holds a run already; continue it with --init_from=resume, or choose another --mirror" in err
    assert not (place / 'out' / 'tiny').exists()
    text, _ = run('train.py', *args, '--max_iters=40', '--lr_decay_iters=40', f'--mirror={s3.url}', cwd=place)
    assert f'out/tiny/ckpt.pt: fetched from the mirror, step {at}' in text and f'resumed at iter {at}' in text
    assert losses(place / 'out' / 'tiny') == losses(place / 'out' / 'whole')
    assert saved(place / 'out' / 'tiny', 'best.pt')['iter'] == saved(place / 'out' / 'whole', 'best.pt')['iter']
    for path in (place / 'out' / 'tiny').glob('ckpt*.pt'):
        path.write_bytes(path.read_bytes()[:-1000])
    text, _ = run('train.py', *args, '--max_iters=42', '--lr_decay_iters=40', f'--mirror={s3.url}', cwd=place)
    assert 'fetched from the mirror, step 40' in text and 'resumed at iter 40' in text


@pytest.mark.slow
def test_a_mirror_that_is_away_stops_nothing_and_gets_all_when_it_is_back(place, s3):
    args = [*TINY, '--max_iters=60', '--checkpoint_interval=5', f'--mirror={s3.url}']
    process = start('train.py', *args, cwd=place)
    wait_for(lambda: lines(place / 'out' / 'tiny') > 2, process)
    s3.kill()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and out.count('cannot be reached') == 1 and '60 did not get to' in out, out + err
    run('train.py', *TINY, '--max_iters=60', '--out_dir=out/whole', cwd=place)
    whole, tiny = losses(place / 'out' / 'whole'), losses(place / 'out' / 'tiny')
    assert whole == tiny
    process = start('train.py', *args, '--init_from=auto', '--max_iters=62', cwd=place)
    _, err = run('train.py', *args, '--out_dir=out/bare', '--init_from=auto', cwd=place, code=2)
    assert 'cannot be reached' in err and 'it may hold this run' in err and not (place / 'out' / 'bare').exists()
    said = [process.stdout.readline()]
    while not said[-1].startswith('iter 61/'):
        said.append(process.stdout.readline())
        assert process.poll() is None, said
    process.kill()
    assert 'going on from out/tiny/ckpt.pt' in said[0] and any('resumed at iter 60' in line for line in said)
    s3.start()
    run('train.py', *args, '--init_from=auto', '--max_iters=62', cwd=place)
    text, _ = run('train.py', *args, '--out_dir=out/bare', '--init_from=auto', '--max_iters=63', cwd=place)
    assert 'fetched from the mirror, step 62' in text
    assert tiny.items() <= losses(place / 'out' / 'bare').items()


# ---- one run, one folder

def test_two_trainers_cannot_write_one_folder(place):
    process = start('train.py', *LONG, cwd=place)
    wait_for(lambda: lines(place / 'out' / 'tiny') > 0, process)
    for how in ('auto', 'resume', 'scratch'):
        _, err = run('train.py', *LONG, f'--init_from={how}', cwd=place, code=2)
        assert "out_dir='out/tiny': another trainer writes there; wait for it, or choose another --out_dir" in err
        assert f'(process {process.pid} on ' in err
    process.kill()
    process.communicate()
    run('train.py', *TINY, '--init_from=auto', cwd=place)  # the lock has died with its owner


def test_a_folder_of_another_configuration_is_refused_with_the_difference(place):
    args = [*TINY, '--max_iters=2']
    run('train.py', *args, cwd=place)
    before = sorted(os.listdir(place / 'out' / 'tiny'))
    _, err = run('train.py', *args, '--init_from=auto', '--learning_rate=1e-3', '--seed=1', cwd=place, code=2)
    assert ("out_dir='out/tiny' holds a run with other settings: learning_rate was 0.008, is now 0.001 (command line); seed "
            'was 1337, is now 1 (command line); --init_from=resume goes on with the new ones') in err
    _, err = run('train.py', *args, '--init_from=auto', '--n_layer=3', '--n_embd=64', cwd=place, code=2)
    assert 'n_layer is 3 (command line), but the model in out/tiny/ckpt.pt has 2; n_embd is 64' in err
    text, _ = run('train.py', *args, '--init_from=auto', '--log_interval=2', '--max_iters=4', cwd=place)
    assert 'changed: log_interval was 1, is now 2' in text
    assert sorted(os.listdir(place / 'out' / 'tiny')) == sorted([*before, 'ckpt.1.pt'])


# ---- numbers that go wrong

def faulty(place, code):
    """A train.py in which the loss of the training step `n` of this process is what `code` makes of it."""
    (place / 'faulty.py').write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import model
plain, n, rank = model.Transformer.forward, -1, int(os.environ.get('RANK', 0))

def forward(self, idx, targets=None, *args, **kwargs):
    global n
    loss = plain(self, idx, targets, *args, **kwargs)
    if self.training:
        n += 1
        {code}
    return loss

model.Transformer.forward = forward
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
""")
    return place / 'faulty.py'


@pytest.mark.parametrize('torchrun', [0, 2])
def test_a_step_without_finite_numbers_is_left_out_by_all_processes(place, torchrun):
    script = faulty(place, f"loss = loss * float('nan') if n == 7 and rank == {max(torchrun - 1, 0)} else loss")
    text, _ = run(script, *TINY, cwd=place, torchrun=torchrun)
    out = place / 'out' / 'tiny'
    assert 'iter 7: step left out, loss nan; its batch is in out/tiny/bad_batches/step_7/process_0.txt' in text
    (bad,) = [record for record in read_log(out) if 'bad_steps' in record]
    assert (bad['iter'], bad['bad_steps'], bad['wrong']) == (7, 1, 'loss nan')
    steps = [record for record in read_log(out) if 'loss' in record]
    assert len(steps) == 19 and all(record['loss'] < 6 for record in steps)
    assert saved(out)['loop']['bad_steps'] == 1
    files = sorted((out / 'bad_batches' / 'step_7').iterdir())
    assert [f.name for f in files] == [f'process_{rank}.txt' for rank in range(max(torchrun, 1))]
    windows = [text for f in files for text in f.read_text().split('-------- tiny, window ')[1:]]
    assert len(windows) == 4
    sources = b''.join(path.read_bytes() for path in SOURCE.rglob('*.py')).decode()
    assert all(window.partition('\n')[2].strip() in sources for window in windows)  # 16 bytes each, as they stood there


def test_a_spike_is_left_out_if_wanted(place):
    script = faulty(place, 'loss = loss * 40 if n == 25 else loss')
    run(script, *TINY, '--max_iters=30', '--out_dir=out/taken', cwd=place)
    text, _ = run(script, *TINY, '--max_iters=30', '--max_spike=10', cwd=place)
    assert 'iter 25: step left out, loss' in text and 'is more than 10 times its mean of' in text
    taken, skipped = losses(place / 'out' / 'taken'), losses(place / 'out' / 'tiny')
    assert taken.keys() - skipped.keys() == {(25, 'loss')}
    assert all(taken[key] == skipped[key] for key in skipped if key[0] < 25) and taken[26, 'loss'] != skipped[26, 'loss']


@pytest.mark.parametrize('torchrun', [0, 2])
def test_a_run_of_bad_steps_goes_back_once_and_on_with_other_data(place, torchrun):
    args = [*TINY, '--max_iters=40', '--max_bad_steps=5']
    script = faulty(place, "loss = loss * float('nan') if 23 <= n < 28 else loss")
    text, _ = run(script, *args, cwd=place, torchrun=torchrun)
    assert 'iter 27: loss nan; back to the checkpoint of step 20, and on with other data' in text
    out = place / 'out' / 'tiny'
    run('train.py', *args, '--out_dir=out/whole', cwd=place, torchrun=torchrun)
    whole, back = losses(place / 'out' / 'whole'), losses(out)
    assert whole.keys() == back.keys()
    assert [key for key in whole if whole[key] == back[key]] == [key for key in whole if key[0] < 20 or key == (20, 'val_loss')]
    loop = saved(out)['loop']
    assert (loop['data_shift'], loop['went_back'], loop['bad_steps'], loop['bad_in_row']) == (8, True, 5, 0)

    if torchrun:
        return

    # killed right after it went back, it goes on with the other data as well
    script = faulty(place, "os.kill(os.getpid(), 9) if n == 30 else None; loss = loss * float('nan') if 23 <= n < 28 else loss")
    process = start(script, *args, '--out_dir=out/killed', cwd=place)
    process.communicate(timeout=100)
    assert process.returncode == -9
    run('train.py', '--out_dir=out/killed', '--init_from=resume', cwd=place)
    assert losses(place / 'out' / 'killed') == back

    script = faulty(place, "loss = loss * float('nan') if n >= 23 else loss")
    _, err = run(script, *args, '--out_dir=out/lost', cwd=place, code=2)
    assert 'error: iter 24: loss nan (10 steps were left out), and the run went back to a checkpoint once already; look' in err
    assert checkpoint.load(str(place / 'out' / 'lost' / 'ckpt.pt'))['iter'] == 20


def test_weights_that_are_no_numbers_are_never_saved(place):
    """An optimizer that destroys the model with the sixth step, whose loss and gradient were fine."""
    script = faulty(place, """if n == 5:
            sys.modules['torch'].optim.AdamW.step = lambda opt, *_: [
                p.data.fill_(float('inf')) for group in opt.param_groups for p in group['params']]""")
    _, err = run(script, *TINY, '--checkpoint_interval=1', '--keep_every=1', cwd=place, code=2)
    assert 'error: iter 6: the weights are no finite numbers any more (0 steps were left out), and the run went back' in err
    out = place / 'out' / 'tiny'
    assert sorted(path.name for path in out.glob('ckpt_*')) == [f'ckpt_{i}.pt' for i in range(1, 6)]
    for path in out.glob('*.pt'):
        assert all(p.isfinite().all() for p in checkpoint.load(str(path))['model'].values())
    _, err = run(script, *TINY, '--out_dir=out/none', cwd=place, code=2)
    assert 'there is no checkpoint to go back to' in err and not list((place / 'out' / 'none').glob('*.pt'))


def test_overflow_in_float16_is_no_error(place):
    """The scaler begins too bold on purpose; it leaves steps out until it is not."""
    script = faulty(place, 'loss = loss * 2**12 if n < 40 else loss')
    text, _ = run(script, *TINY, '--dtype=float16', '--max_bad_steps=1', cwd=place)
    log = read_log(place / 'out' / 'tiny')
    assert any(record.get('grad_norm', 0) is None for record in log) and not any('bad_steps' in record for record in log)
    assert 'left out' not in text and 'loss' in log[-2]
