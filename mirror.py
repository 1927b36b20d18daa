"""
A copy of a run away from the machine: `mirror='s3://bucket/run'`, or any other URL of a folder that fsspec can write to.

    last/<iter>.pt       the newest checkpoints; older ones go when a newer one is there
    last/<iter>.jsonl    the log up to that step, which is there before the checkpoint
    best/<iter>.pt       the best by validation loss; the former goes when the new one is there
    kept/<iter>.pt       those of keep_every
    settings.json        the settings, for people to read

No checkpoint is ever written over that of another step: a copy that was cut short, which many a file system shows under its
full name, costs nothing but itself.

Credentials and endpoint come from where the file system's package looks for them, not from here. For s3:// (s3fs) these are
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, and for a server that is not Amazon's AWS_ENDPOINT_URL (or
AWS_ENDPOINT_URL_S3, FSSPEC_S3_ENDPOINT_URL); ~/.aws and ~/.config/fsspec serve as well.
"""

import contextlib
import errno
import functools
import glob
import itertools
import json
import os
import re
import threading
import time
from dataclasses import dataclass

import fsspec
from fsspec.asyn import sync
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError

import files
from configurator import UserError

KINDS = ('last', 'best', 'kept')
LIMIT = 20  # seconds that a server may take to answer
SLOWEST = 2**18  # bytes per second; a copy that is slower counts as stuck
LONGEST_PAUSE = 60  # seconds between two tries
PATIENCE = 20  # seconds until `latest_step` and `fetch` give up


class Folder:
    """The folder that a URL names. It is opened when it is first used, since some file systems connect at once."""

    def __init__(self, url):
        """Raises UserError for what is no URL, or one of a kind that is unknown or not installed."""
        secrets = re.findall(r'//([^/\s]*)@', url)
        self.secrets = [s for s in (*secrets, *(s.partition(':')[2] for s in secrets), *re.findall(r'\?(\S+)', url)) if s]
        self.url, self.name, self.until = url, self.hide(url), 0.0
        for protocol in [part.partition('://')[0] for part in url.split('::')] if '://' in url else ['']:
            try:
                if not protocol:
                    raise ValueError
                fsspec.get_filesystem_class(protocol)
            except ValueError:
                raise UserError(f"mirror='{self.name}' is no URL that fsspec knows; write s3://bucket/folder, or for a disk "
                                'file:///folder') from None
            except ImportError as e:
                raise UserError(f"mirror='{self.name}' needs a package that is not installed: {e}") from None

    @functools.cached_property
    def opened(self):
        fs, root = url_to_fs(self.url, skip_instance_cache=True)
        return fs, root.rstrip('/')

    def path(self, name):
        return f'{self.opened[1]}/{name}'

    def hide(self, text):
        """Text without the credentials that the URL may hold."""
        return functools.reduce(lambda text, secret: text.replace(secret, '***'), self.secrets, text)

    def reason(self, error):
        """An error in one line."""
        return self.hide(f'{type(error).__name__}: ' + ' '.join(str(error).split()))[:200]

    def call(self, method, *args, size=0, **kwargs):
        """One of fsspec's methods, within the time that `size` bytes may take, where the file system can be interrupted."""
        limit = LIMIT + size / SLOWEST
        self.until = time.monotonic() + 2 * limit
        try:
            fs = self.opened[0]
            if fs.async_impl:
                return sync(fs.loop, getattr(fs, f'_{method}'), *args, timeout=limit, **kwargs)
            return getattr(fs, method)(*args, **kwargs)
        except (FileNotFoundError, FileExistsError, NotImplementedError):
            raise
        except FSTimeoutError:
            raise TimeoutError(f'no answer within {limit:.0f} s') from None
        except Exception:
            self.__dict__.pop('opened', None)  # a connection that broke may stay so: the next call makes another
            raise

    def list(self, kind):
        """[(step, 'pt' or 'jsonl')] of the files in last, best or kept, by step; names of any other form are not ours."""
        self.opened[0].invalidate_cache()
        names = (os.path.basename(path) for path in self.call('find', self.path(kind)))
        found = (re.fullmatch(r'(0|[1-9][0-9]{0,14})\.(pt|jsonl)', name) for name in names)
        return sorted((int(name[1]), name[2]) for name in found if name)

    def size(self, name):
        self.opened[0].invalidate_cache()
        return self.call('info', self.path(name))['size']

    def write(self, name, size, method, *args):
        """Has a method write a file there, and makes sure that all of its bytes arrived."""
        try:
            self.call(method, *args, size=size)
        except FileNotFoundError:  # the folder is made, but no bucket and no parent: that would be a mistyped or absent one
            for folder in (self.opened[1], os.path.dirname(self.path(name))):
                if '/' in folder.strip('/'):
                    with contextlib.suppress(FileExistsError):
                        self.call('mkdir', folder, create_parents=False)
            self.call(method, *args, size=size)
        if (there := self.size(name)) != size:
            raise OSError(f'{name} has {there} bytes there and {size} here')

    def get(self, name, path):
        """Copies a file from there to the disk, all of it. Raises UserError if the disk is full."""
        size = self.size(name)
        try:
            self.call('get_file', self.path(name), path, size=size)
            with open(path, 'rb+') as f:
                os.fsync(f.fileno())
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"no room for the {size:,} bytes of {name} from mirror='{self.name}' in "
                                f'{os.path.dirname(path)}; free some, or choose another --out_dir') from None
            raise
        if os.path.getsize(path) != size:
            raise OSError(f'{os.path.getsize(path)} of the {size} bytes of {name} arrived')

    def patiently(self, method, *args):
        """Calls a method until it succeeds or PATIENCE is over. Raises UserError then."""
        begun = time.monotonic()
        for tries in itertools.count(1):
            try:
                return method(*args)
            except UserError:
                raise
            except Exception as e:  # whatever a file system raises
                if isinstance(e, (FileNotFoundError, PermissionError)) or tries > 2 and time.monotonic() - begun > PATIENCE:
                    raise UserError(f"mirror='{self.name}' cannot be reached ({self.reason(e)}), and it may hold this run; "
                                    "mend it and try again, or do without: --mirror=''") from None
                time.sleep(1)


def latest_step(url):
    """The newest step in the mirror, None where it holds no run. Raises UserError if it cannot be reached."""
    there = Folder(url)
    return max((step for step, ending in there.patiently(there.list, 'last') if ending == 'pt'), default=None)


def fetch(url, out_dir, whole, say=print, newer_than=-1):
    """
    Brings the newest checkpoint that is whole to out_dir/ckpt.pt, its log, and the best as best.pt. Returns its step, or None
    where the mirror holds no run, or none that is `newer_than` a step. `whole(path)` raises UserError for a file that is not
    all of a checkpoint.

    Raises UserError if the mirror cannot be reached, if none of its checkpoints is whole, and if the disk is full.
    """
    there = Folder(url)
    listed = [(step, kind, ending) for kind in KINDS for step, ending in there.patiently(there.list, kind)]
    found = sorted(((step, kind) for step, kind, ending in listed if ending == 'pt'), key=lambda f: (-f[0], KINDS.index(f[1])))
    logs = sorted(step for step, _, ending in listed if ending == 'jsonl')
    newer = [(step, kind) for step, kind in found if step > newer_than]
    if not newer:
        return None
    os.makedirs(out_dir, exist_ok=True)
    latest, log, best = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'log.jsonl', 'best.pt'))

    def bring(candidates, path):
        """Downloads the first that is whole, and returns its step."""
        for step, kind in candidates:
            there.patiently(there.get, f'{kind}/{step}.pt', path)
            try:
                whole(path)
                return step
            except UserError as e:
                say(f'mirror: {kind}/{step}.pt in {there.name} is not whole, looking for the one before ({e})')

    try:
        step = bring(newer, f'{latest}.tmp')
        if step is None and newer_than >= 0:
            return None
        if step is None:
            raise UserError(f"mirror='{there.name}' holds a run, but no checkpoint of it is whole; to begin from scratch, name "
                            'another --mirror')
        # a later log holds all of an earlier one; an earlier one is better than none
        for of_step in [s for s in logs if s >= step][:1] or logs[-1:]:
            there.patiently(there.get, f'last/{of_step}.jsonl', f'{log}.tmp')
        if (step, 'best') in found:
            files.another_name(f'{latest}.tmp', best)
        elif bring([(s, kind) for s, kind in found if s < step and kind == 'best'], f'{best}.tmp') is not None:
            os.replace(f'{best}.tmp', best)
        if logs:
            os.replace(f'{log}.tmp', log)
        if os.path.exists(latest):
            os.replace(latest, os.path.join(out_dir, 'ckpt.1.pt'))
        os.replace(f'{latest}.tmp', latest)  # at the very end
        files.sync_folder(latest)
        return step
    finally:
        for path in (latest, log, best):
            with contextlib.suppress(FileNotFoundError):
                os.remove(f'{path}.tmp')


@dataclass(eq=False)
class Job:
    """A checkpoint to copy. `pin` is a second name of the file, since the next save takes the name ckpt.pt away from it."""
    iter: int
    pin: str
    log: str
    log_bytes: int
    settings: bytes
    wants: set  # of KINDS: where it is still to go
    is_there: bool = False  # in last/


class Mirror:
    """
    Copies checkpoints in a thread of its own. Nothing that happens to the mirror stops the run or makes it wait: what fails is
    said once and tried again, after 1, 2, 4 ... 60 seconds, until a newer checkpoint takes its place.
    """

    def __init__(self, url, keep_last, say):
        """`keep_last` checkpoints stay in last/, at least 1. `say` prints a line. Raises UserError for a wrong URL only."""
        self.there, self.keep_last, self.say = Folder(url), keep_last, say
        self.jobs, self.job = [], None  # those that wait, oldest first; the one of them that is under way
        self.outage, self.untidy = '', False  # why the mirror cannot be reached; whether old files cannot be removed
        self.closing = False
        self.pins = itertools.count()
        self.changed = threading.Condition()
        threading.Thread(target=self._work, name='mirror', daemon=True).start()

    def copy(self, iter, checkpoint, log, settings, best=False, kept=False):
        """
        Takes note of the checkpoint file of step `iter`, of the log as long as it is now, and of the settings (a dict). Returns
        at once: the file may be replaced, and the log go on. Never raises.
        """
        try:
            pin = f'{checkpoint}.mirror{next(self.pins)}'
            if pin.endswith('.mirror0'):
                for left_over in glob.glob(f'{glob.escape(checkpoint)}.mirror*'):  # by a process that was killed
                    os.remove(left_over)
            files.another_name(checkpoint, pin)
            wants = {kind for kind, wanted in zip(KINDS, (True, best, kept)) if wanted}
            job = Job(iter, pin, log, os.path.getsize(log), json.dumps(settings, indent=1, default=str).encode(), wants)
            with self.changed:
                for older in self.jobs:
                    older.wants -= wants - {'kept'}
                self.jobs.append(job)
                self._drop_done()
                self.changed.notify_all()
                if self.job and time.monotonic() > self.there.until:  # a file system that cannot be interrupted
                    self._fails(TimeoutError('no answer'))
        except Exception as e:  # a copy is not worth a run
            self.say(f'mirror: step {iter} will not be copied to {self.there.name} ({self.there.reason(e)})')

    def close(self, seconds, if_away=10):
        """
        Waits up to so many seconds for what is still to be copied, or `if_away` while the mirror cannot be reached. Returns
        whether all is there, and says it if not.
        """
        begun = time.monotonic()
        with self.changed:
            self.closing = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.jobs or self.outage and time.monotonic() - begun > if_away, seconds)
            done = not self.jobs
            if not done:
                self.say(f'mirror: step {", ".join(str(job.iter) for job in self.jobs)} did not get to {self.there.name} '
                         f'({self.outage or f"not within {seconds:g} s"})')
            self.say, self.job = lambda line: None, None  # whatever is under way is of no interest any more
            for job in self.jobs:
                job.wants.clear()
            self._drop_done()
        return done

    def _drop_done(self):
        for job in [job for job in self.jobs if not job.wants and job is not self.job]:
            self.jobs.remove(job)
            with contextlib.suppress(OSError):
                os.remove(job.pin)

    def _work(self):
        pause = 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self.closing)
                if not self.jobs:
                    return
                job = self.job = self.jobs[-1]  # the newest first
                kind = next(kind for kind in KINDS if kind in job.wants)
            try:
                self._send(job, kind)
                done, pause = {kind}, 0
            except Exception as e:  # of any file system, for any reason: all are tried again
                done, pause = set(), min(2 * pause or 1, LONGEST_PAUSE)
                self._fails(e)
            with self.changed:
                self.job = None
                job.wants -= done
                self._drop_done()
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.closing, pause)
            if pause and self.closing:  # in a hurry now
                time.sleep(1)

    def _fails(self, error):
        reason = self.there.reason(error)
        if not self.outage:
            self.say(f'mirror: {self.there.name} cannot be reached ({reason}); the run goes on and tries again')
        self.outage = reason

    def _send(self, job, kind):
        """Copies one checkpoint to one place; the log, which it is of no use without, before it."""
        there, name, size = self.there, f'{kind}/{job.iter}.pt', os.path.getsize(job.pin)
        if kind == 'last':
            with open(job.log, 'rb') as f:
                log = f.read(job.log_bytes)
            for text_name, text in (('settings.json', job.settings), (f'last/{job.iter}.jsonl', log)):
                there.write(text_name, len(text), 'pipe_file', there.path(text_name), text)
        was_there, job.is_there = job.is_there, False  # should the short way fail, the next try sends the file
        if was_there:
            with contextlib.suppress(NotImplementedError):  # a copy from there to there, which some file systems cannot do
                there.write(name, size, 'cp_file', there.path(f'last/{job.iter}.pt'), there.path(name))
                job.is_there = True
        if not job.is_there:
            there.write(name, size, 'put_file', job.pin, there.path(name))
            job.is_there = kind == 'last'
        if self.outage:
            self.say(f'mirror: {there.name} is there again, and has step {job.iter}')
        self.outage = ''
        if kind != 'kept':
            self._tidy(job, kind)

    def _tidy(self, job, kind):
        """Removes what the checkpoint that was just copied stands in for."""
        try:
            listed = self.there.list(kind)
            # steps beyond this one are another run's, or this one's before it went back: not ours to judge
            steps = [step for step, ending in listed if ending == 'pt' and step <= job.iter]
            oldest = steps[-(self.keep_last if kind == 'last' else 1):][0]
            for step, ending in listed:
                if step < oldest:
                    self.there.call('rm_file', self.there.path(f'{kind}/{step}.{ending}'))
            self.untidy = False
        except Exception as e:  # credentials that may write need not be allowed to remove
            if not self.untidy:
                self.say(f'mirror: older checkpoints in {self.there.name} cannot be removed ({self.there.reason(e)})')
            self.untidy = True
