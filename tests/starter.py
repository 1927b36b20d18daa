"""
Starts our scripts without importing torch anew, which takes longer than what most tests have to run.

This process imports it once. For each line of its standard input, a JSON object with `args` (the script and its arguments),
`cwd`, `env`, `out` and `err` (paths), it forks: the child becomes that script (or, after -m, that module), and its exit code
(as subprocess has it) is printed. What torchrun starts there is forked as well.
"""

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading

import torch
import torch._dynamo  # which an optimizer imports, and which takes half of the time
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Forked(multiprocessing.get_context('fork').Process):
    """
    `python ARGS` as a fork of this process, with its standard output and error or others (paths). It ends as Python does but
    for taking down all that is imported, which would take most of half a second.
    """

    def __init__(self, args, env, cwd='.', out=None, err=None):
        super().__init__()
        self.arguments, self.env, self.cwd, self.files = [*args], env, cwd, (os.devnull, out, err)
        self.start()

    def run(self):
        os.setsid()
        for number, path in enumerate(self.files):
            if path:
                os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.env)
        is_module = self.arguments[0] == '-m'
        sys.argv = self.arguments[is_module:]
        found_first = filter(None, self.env.get('PYTHONPATH', '').split(os.pathsep))
        sys.path[:1] = [ROOT if is_module else os.path.dirname(sys.argv[0]), *found_first]
        try:
            if is_module:
                runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name='__main__')
        except (Exception, KeyboardInterrupt):
            sys.excepthook(*sys.exc_info())
            sys.exit(1)
        finally:
            threading._shutdown()  # which waits for threads
            atexit._run_exitfuncs()

    # what torchrun uses of subprocess.Popen

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode


subprocess_handler.Popen = lambda args, env, **_: Forked(args[args.index('-u') + 1:], env)
assert torch  # that it is imported is all that is wanted of it
gc.freeze()  # what is not looked at is not copied
for line in sys.stdin:
    print(Forked(**json.loads(line)).wait(), flush=True)
