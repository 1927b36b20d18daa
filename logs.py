"""
Where a run's figures go: log.jsonl in its folder, and Weights & Biases if wanted. Neither can stop the run or slow it: on a
full disk lines wait in memory, and what talks to wandb is a thread of its own.
"""

import atexit
import collections
import contextlib
import importlib.util
import json
import math
import os
import queue
import secrets
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
                    except ValueError as e:
                        raise UserError(f'{path} is damaged (line {number}: {e}); move it away to go on without it') from None
                    lines.append((line, record))
    return lines


def new_id():
    """An id for a run at Weights & Biases: 8 characters, as its own. A run that is resumed with its id goes on there."""
    return ''.join(secrets.choice('abcdefghijklmnopqrstuvwxyz0123456789') for _ in range(8))


class Wandb:
    """
    A run at Weights & Biases. All that wandb does, it does in a daemon thread: it may hang, fail or die there.

    Where it cannot be reached or logged in to, the run is logged into a folder in `dir`, for `wandb sync` later; where that
    fails too, not at all. Raises UserError if wandb is not installed.
    """

    def __init__(self, project, name, config, dir, id, say):
        found = importlib.util.find_spec('wandb')
        if not found or not found.origin:  # a folder of that name, as wandb makes them, looks like a package
            raise UserError('wandb_log=True needs wandb: pip install wandb')
        self.about = dict(project=project, name=name, config=dict(config), dir=dir, id=id, resume='allow')
        self.say, self.run, self.dropped, self.given_up = say, None, False, False
        self.records = queue.Queue(10_000)
        self.thread = threading.Thread(target=self._work, name='wandb', daemon=True)
        self.thread.start()

    def log(self, record, step):
        """Hands a record over. Never waits and never fails: what finds no room is dropped."""
        try:
            if self.thread.is_alive():
                self.records.put_nowait((record, step))
        except queue.Full:
            if not self.dropped:
                self.say(f'wandb: {self.records.maxsize:,} records wait for it; what finds no room is in log.jsonl only')
            self.dropped = True

    def finish(self, seconds=30):
        """Waits until everything is sent, at most so long and 10 s more to save the rest. True if nothing was left undone."""
        deadline = time.monotonic() + seconds
        if self.thread.is_alive():
            with contextlib.suppress(queue.Full):
                self.records.put(None, timeout=seconds)
            self.thread.join(max(deadline - time.monotonic(), 0))
        if not self.thread.is_alive():
            return True
        self.given_up = self.run is not None
        ending = threading.Thread(target=_end_service, daemon=True)  # it writes to its folder what it has not sent
        ending.start()
        ending.join(5)
        if not self.given_up:
            self.thread.join(5)  # a start that hung has failed now, and the run can be written offline
        if self.given_up or self.thread.is_alive():
            self.say(f'wandb: not finished after {seconds:g} s' + (self._rest() or '; it was never reached'))
            return False
        return True

    def _work(self):
        over = False  # every record is handed over
        for offline in (False, True):
            try:
                self.run = None
                self.run = self._start(offline)
                while item := self.records.get():
                    self.run.log(item[0], step=item[1])
                over = True
                self.run.finish()
                sys.modules['wandb'].teardown()
                return
            except Exception as e:  # whatever it is: nothing of wandb is worth a run
                if self.given_up:
                    return
                reason = f'{type(e).__name__}: {e}'.splitlines()[0][:100]
                gives_up = over or offline
                self.say('wandb: failed, ' + ('going on without it' if gives_up else 'logging offline into ' +
                                              self.about['dir']) + f' ({reason})' + self._rest())
                if gives_up:
                    return

    def _start(self, offline):
        """A run; the second one, offline, with a service of its own, as the first one's may be dead."""
        os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')  # else it waits at exit until its own failures are reported
        with _process_left_alone():
            import wandb
            if offline:
                _end_service()
            wandb.setup()
        # console: else print() goes through wandb, and waits for it; quiet: else it asks who we are, which takes its time
        settings = wandb.Settings(console='off', quiet=True)
        with _process_left_alone():
            if not offline:
                _know_key(wandb)
            return wandb.init(**self.about, settings=settings, **{'mode': 'offline'} if offline else {})

    def _rest(self):
        return f'; `wandb sync {os.path.dirname(self.run.dir)}` sends what it has' if self.run else ''


def _end_service():
    with contextlib.suppress(Exception, SystemExit):  # SystemExit: the service ended badly
        sys.modules['wandb'].teardown()


def _know_key(wandb):
    """Raises wandb.Error where there is no key: wandb would ask for one at the terminal, in the midst of the run."""
    if os.environ.get('WANDB_MODE', 'online') == 'online' and sys.stdin and sys.stdin.isatty():
        with contextlib.suppress(TypeError):  # an older wandb, which cannot but ask
            if not wandb.login(prompt=False, verify=False):
                raise wandb.Error('no API key: run `wandb login` once')


@contextlib.contextmanager
def _process_left_alone():
    """
    Takes back what wandb does to the process when it starts its service: a hook at exit, which waits for all to be sent
    however long that takes, and its own sys.exit and sys.excepthook, which prints every error a second time.
    """
    register, before = atexit.register, (sys.exit, sys.excepthook)

    def register_others(call, *args, **kwargs):
        return call if str(getattr(call, '__module__', '')).startswith('wandb.') else register(call, *args, **kwargs)
    atexit.register = register_others
    try:
        yield
    finally:
        atexit.register, (sys.exit, sys.excepthook) = register, before
