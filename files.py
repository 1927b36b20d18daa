"""
Files that are there whole or not at all, and folders that one process at a time writes.

What is replaced by a rename is at any moment the old file or the new one, through a crash, a full disk and a power cut: the new
one is on the disk before it gets the name, and the name before the next step is taken.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import sys

from configurator import UserError


@contextlib.contextmanager
def whole(path):
    """A file opened to write bytes, which appears as `path` when all of it is on the disk; nothing is left if that fails."""
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_whole(path, data):
    with whole(path) as f:
        f.write(data)


def another_name(path, other):
    """Gives a file a second name, which replaces what had it; the bytes are shared, where the file system knows links."""
    temporary = f'{other}.tmp'
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(path, temporary)
        os.replace(temporary, other)
        if os.path.exists(temporary):  # both were names of one file already, and then a rename does nothing
            os.remove(temporary)
    except OSError:  # no hard links here
        with whole(other) as to, open(path, 'rb') as f:
            shutil.copyfileobj(f, to, 2**20)
    sync_folder(other)


def sync_folder(path):
    """Makes a rename to `path` survive a power cut."""
    if os.name == 'posix':
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system that knows no such thing
                os.fsync(folder)
        finally:
            os.close(folder)


def read_json(path):
    with open(path, encoding='utf-8') as f:
        return json.load(f)


@contextlib.contextmanager
def alone(path, busy):
    """
    Holds the lock file `path`, which ends with the process, however it ends. Raises UserError, with the words `busy` and who
    has it, if another process does.
    """
    with open(path, 'a+', encoding='utf-8') as f:
        try:
            if os.name == 'nt':
                import msvcrt
                msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.exists(path) or not os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                raise BlockingIOError  # it was removed by the process that had it, and perhaps made again by a third
        except (BlockingIOError, PermissionError):
            f.seek(0)
            raise UserError(f'{busy} ({f.read(200).strip() or "unknown"} holds {path})') from None
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f'{path}: this file system knows no locks; see to it that nobody else writes there', file=sys.stderr)
        f.truncate(0)
        f.write(f'process {os.getpid()} on {socket.gethostname()}')
        f.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not remove what is open
                os.remove(path)
