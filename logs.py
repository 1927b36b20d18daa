"""
Where a run's figures go: log.jsonl in its folder, and Weights & Biases if wanted. Neither can stop the run or slow it: on a
full disk lines wait in memory, and what talks to wandb is a process of its own.
"""

import collections
import contextlib
import importlib.util
import json
import math
import os
import queue
import secrets
import subprocess
import sys
import threading
import time

import files
from configurator import UserError


class Log:
    """
    A run's log.jsonl, one record a line, each handed to the system as it is logged: a killed process loses none.

    A new run (`first_iter` None) begins an empty one. A run that goes on at step `first_iter` keeps the records of steps
    before it, and the evaluation at it if the run had `evaluated` there before it stopped. Raises UserError where the log
    is damaged or cannot be made.
    """

    def __init__(self, path, say, first_iter=None, evaluated=False):
        self.path, self.say = path, say
        self.file, self.waiting, self.full = None, collections.deque(), False
        try:
            lines = [] if first_iter is None else _read_lines(path)
            kept = b''.join(line for line, record in lines
                            if record['iter'] < first_iter + ('val_loss' in record and evaluated))
            self.size = len(kept)  # bytes of whole lines
            files.write_whole(path, kept)
        except OSError as e:
            raise UserError(f'{path} cannot be written ({e.strerror}); make room there, or choose another folder') from None

    def write(self, record):
        """Appends a record. JSON has no word for infinity, which a gradient's norm is where float16 overflows: it is null."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.waiting.append(json.dumps(record).encode() + b'\n')
        self.flush()

    def flush(self):
        """Writes what waits, and says when that begins to fail and when it works again. True if nothing waits any more."""
        try:
            if self.file is None:
                self.file = open(self.path, 'ab', buffering=0)
                if self.file.tell() > self.size:  # part of a line, where the disk became full
                    self.file.truncate(self.size)
            while self.waiting:
                rest = self.waiting[0]
                while rest:
                    rest = rest[self.file.write(rest):]
                self.size += len(self.waiting.popleft())
        except OSError as e:
            self._let_go()
            if not self.full:
                self.say(f'{self.path}: cannot be written ({e.strerror}); its lines wait in memory, the run goes on')
            self.full = True
            return False
        if self.full:
            self.say(f'{self.path}: can be written again, no line is lost')
        self.full = False
        return True

    def close(self):
        """The last try. True if every record is in the file."""
        done = self.flush()
        self._let_go()
        return done

    def _let_go(self):
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        self.file = None


def _read_lines(path):
    """The whole lines of a log, each with its record; a last one without an end was cut off by a crash."""
    lines = []
    if os.path.exists(path):
        with open(path, 'rb') as f:
            for number, line in enumerate(f, 1):
                if line.endswith(b'\n'):
                    try:
                        record = json.loads(line)
                        if not isinstance(record, dict) or type(record.get('iter')) is not int:
                            raise ValueError('no record of a step')
                    except (ValueError, RecursionError) as e:
                        raise UserError(f'{path} is damaged (line {number}: {e}); move it away to go on without it') from None
                    lines.append((line, record))
    return lines


def read_log(out_dir, last_iter):
    """The records of a run's log.jsonl up to a step, what is a number in them; none where there is no log."""
    path = os.path.join(out_dir, 'log.jsonl')
    try:
        records = [record for _, record in _read_lines(path) if record['iter'] <= last_iter]
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror})') from None
    return [{key: value for key, value in record.items() if type(value) in (int, float)} for record in records]


def new_id():
    """An id for a run at Weights & Biases: 8 characters, as its own. A run that is resumed with its id goes on there."""
    return ''.join(secrets.choice('abcdefghijklmnopqrstuvwxyz0123456789') for _ in range(8))


GRACE = 300  # seconds that wandb has after the run's end


class Wandb:
    """
    A run at Weights & Biases. All that wandb does, it does in a process of its own (`_serve`), which reads the records from a
    pipe: it may hang, fail or die there. It outlives a run that ends or is killed, but by no more than GRACE seconds.

    Where wandb cannot be reached or logged in to, the run is logged into a folder in `dir`, for `wandb sync` later; where that
    fails too, not at all. What wandb prints is in `dir`/wandb.txt. Raises UserError if wandb is not installed.
    """

    def __init__(self, project, name, config, dir, id, say):
        found = importlib.util.find_spec('wandb')
        if not found or not found.origin:  # a folder of that name, as wandb makes them, looks like a package
            raise UserError('wandb_log=True needs wandb: pip install wandb')
        self.say, self.dropped = say, False
        env = {**os.environ, 'WANDB_PROGRAM': sys.argv[0], 'WANDB_X_STATS_PID': str(os.getpid()),  # it shows us, not itself
               'WANDB_CONSOLE': 'off', 'WANDB_QUIET': 'true', 'WANDB_ERROR_REPORTING': 'false'}  # nor waits for its own sake
        # a session of its own, which Ctrl-C at the terminal does not reach, and no stream of ours, for which `| tee` would wait
        arguments = [arg for arg in sys.argv[1:] if not arg.startswith('--mirror')]  # which may hold credentials
        self.process = subprocess.Popen([sys.executable, __file__, *arguments], env=env, bufsize=0, start_new_session=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._hand_over(dict(project=project, name=name, config=config, dir=dir, id=id))
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def log(self, record, step):
        """Hands a record over. Never waits and never fails: what finds no room in the pipe is dropped."""
        if not self._hand_over([record, step]) and not self.dropped:
            self.dropped = True
            self.say('wandb: its process takes no more records; what it does not take is in log.jsonl only')
        self._pass_on()

    def finish(self, seconds=30):
        """Waits until everything is sent, but at most so long; then wandb goes on by itself. True if nothing is left to do."""
        self._hand_over(0)
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self._pass_on()
        if self.process.returncode is None:
            self.say(f'wandb: not finished after {seconds:g} s; it goes on by itself for {GRACE // 60} minutes at most')
        return self.process.returncode == 0 and not self.dropped

    def _hand_over(self, item):
        """Writes a line. False if not all of it found room: the next one's first byte ends what did, and `_serve` skips it."""
        line = f'\n{json.dumps(item, default=str)}\n'.encode()
        try:
            return self.process.stdin.write(line) == len(line)
        except (OSError, ValueError):  # the process is dead, or was told to finish
            return False

    def _pass_on(self):
        """Says what `_serve` tells."""
        for line in (self.process.stdout.read(4096) or b'').decode(errors='replace').splitlines():
            self.say(f'wandb: {line}')


def _serve():
    """Wandb's process. It reads lines of JSON: what the run is, then a [record, step] each, and 0 if it came to its end."""
    def read():
        for line in sys.stdin:
            with contextlib.suppress(ValueError):
                items.put(json.loads(line))
        items.put(1)  # the exit code of a run that was killed
        time.sleep(GRACE)
        threading.Timer(10, os._exit, [1]).start()
        wandb.teardown()  # it writes to its folder what it has not sent, and what waits for it below fails

    def tell(text):
        with contextlib.suppress(OSError):  # the run is over
            print(text, file=out, flush=True)

    items, item = queue.Queue(), None
    threading.Thread(target=read, daemon=True).start()  # so that the pipe has room, however long wandb takes
    about = items.get()
    with contextlib.suppress(OSError), open(os.path.join(about['dir'], 'wandb.txt'), 'ab') as f:  # OSError: a full disk
        os.dup2(f.fileno(), 2)
    out = open(os.dup(1), 'w')  # to the run
    os.dup2(2, 1)  # what wandb prints, and what its service does
    import wandb
    for mode in (None, 'offline'):  # None: as the user set it, or online
        try:
            run = wandb.init(**about, resume='allow', mode=mode)
            tell(run.url or f'offline; `wandb sync {os.path.dirname(run.dir)}` sends it')
            item = item or items.get()
            while isinstance(item, list):
                run.log(item[0], step=item[1])
                item = items.get()
            run.finish(exit_code=item)
            return
        except Exception as e:
            tell(f'failed ({type(e).__name__}: {e}'.splitlines()[0][:100] + ')')
        if item in (0, 1):  # it has every record
            break
        with contextlib.suppress(Exception, SystemExit):  # SystemExit: its service, which may be dead, ended badly
            wandb.teardown()
    while item not in (0, 1):
        item = items.get()
    sys.exit(1)


if __name__ == '__main__':
    _serve()
