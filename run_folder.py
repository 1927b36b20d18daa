"""
A run's folder: one trainer at a time writes it, and what it holds, or its mirror, says where the run begins.
"""

import atexit
import contextlib
import os

import checkpoint
import huggingface
from configurator import UserError
from files import alone
from mirror import Folder, fetch, latest_step

held = contextlib.ExitStack()
atexit.register(held.close)
let_go = held.close


def begin(out_dir, init_from, mirror, say):
    """
    Holds `out_dir` until this process ends. Returns what `init_from` comes to, the path of the checkpoint to begin from, '' for
    none, and whether it was fetched. A run is resumed from its latest checkpoint that is whole, be it here or in the mirror.

    Raises UserError where another process holds the folder, and where a run cannot begin, or cannot go on, as `init_from` says.
    """
    latest, fetched = os.path.join(out_dir, 'ckpt.pt'), None
    init_from, _, otherwise = init_from.partition(':') if init_from.startswith('auto:') else (init_from, '', 'scratch')
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise UserError(f"out_dir='{out_dir}' is a file; choose another --out_dir")
    if init_from not in ('resume', 'auto'):
        check_model(init_from)
    hold(out_dir)
    found = checkpoint.has_run(out_dir)
    if init_from not in ('resume', 'auto'):
        if found or mirror and latest_step(mirror) is not None:
            where, other = (f"out_dir='{out_dir}'", 'out_dir') if found else (f"mirror='{Folder(mirror).name}'", 'mirror')
            raise UserError(f'{where} holds a run already; continue it with --init_from=resume, or choose another --{other}')
        return init_from, init_from if init_from != 'scratch' else '', False
    path = checkpoint.latest(out_dir, say, needed=not mirror) if found else None
    if mirror:
        try:
            fetched = fetch(mirror, out_dir, checkpoint.verify, say, checkpoint.step_of(path) if path else -1)
        except UserError as e:
            if not path:
                raise
            say(f'{e}; going on from {path}')
    if fetched is not None:
        say(f'{latest}: fetched from the mirror, step {fetched}')
    elif path and path != latest:
        if os.path.exists(latest):
            os.replace(latest, os.path.join(out_dir, 'ckpt.damaged.pt'))
        os.replace(path, latest)
    elif found and not path:
        raise UserError(f"out_dir='{out_dir}' holds a run, but no checkpoint of it is whole; choose another --out_dir")
    elif not found and init_from == 'resume':
        raise UserError(f"init_from='resume', but out_dir='{out_dir}' holds no ckpt.pt; start with --init_from=scratch")
    if found or fetched is not None:
        return 'resume', latest, fetched is not None
    check_model(otherwise)
    return otherwise, otherwise if otherwise != 'scratch' else '', False


def check_model(name):
    """Raises UserError for what a new run cannot begin with."""
    if name != 'scratch' and not os.path.exists(name) and not huggingface.hub_id(name):
        raise UserError(f"init_from='{name}' is neither scratch, nor resume, nor auto, nor a checkpoint or folder that is "
                        'there, nor an id on the Hugging Face hub such as HuggingFaceTB/SmolLM2-135M')


def hold(out_dir):
    """Makes `out_dir`; until this process ends, however it ends, no other trainer writes there."""
    def remove_if_empty():  # where nothing has come of it
        with contextlib.suppress(OSError):
            os.removedirs(out_dir)

    busy = f"out_dir='{out_dir}': another trainer writes there; wait for it, or choose another --out_dir"
    if not os.path.isdir(out_dir):
        held.callback(remove_if_empty)
    try:
        os.makedirs(out_dir, exist_ok=True)
        held.enter_context(alone(os.path.join(out_dir, 'lock'), busy))
    except OSError as e:
        raise UserError(f"out_dir='{out_dir}' cannot be written ({e.strerror}); make room, or choose another "
                        '--out_dir') from None
