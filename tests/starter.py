"""
Starts our scripts without importing torch anew, which takes longer than what most tests have to run.

This process imports it once. For each line of its standard input, a JSON object with `args` (the script and its arguments),
`cwd`, `env`, `out` and `err` (paths), it forks: the child becomes that script (or, after -m, that module), ends as any Python
process does, and its exit code (as subprocess has it) is printed. What torchrun starts there is forked as well.
"""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys

import torch
import torch._dynamo  # which an optimizer imports, and which takes half of the time
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def become(args, env):
    """Does what `python ARGS` does."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    is_module = args[0] == '-m'
    sys.argv = args[is_module:]
    found_first = filter(None, env.get('PYTHONPATH', '').split(os.pathsep))
    sys.path[:1] = [ROOT if is_module else os.path.dirname(args[0]), *found_first]
    if is_module:
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name='__main__')


class Worker(multiprocessing.get_context('fork').Process):
    """What torchrun starts with subprocess.Popen."""

    def __init__(self, args, env, **kwargs):
        super().__init__(target=self.work, args=(args[args.index('-u') + 1:], os.environ | env))
        self.start()

    @staticmethod
    def work(args, env):
        os.setsid()
        try:
            become([*args], env)
        except (Exception, KeyboardInterrupt):
            sys.excepthook(*sys.exc_info())
            sys.exit(1)

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode


subprocess_handler.Popen = Worker
assert torch  # that it is imported is all that is wanted of it
gc.freeze()  # what is not looked at is not copied
for line in sys.stdin:
    wanted = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()

for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, wanted['out'], os.O_WRONLY), (2, wanted['err'], os.O_WRONLY)):
    os.dup2(os.open(path, flags), number)
sys.stdin = open(0)  # the former has read ahead
os.chdir(wanted['cwd'])
become(wanted['args'], wanted['env'])
