"""
Starts our scripts without importing torch anew, which takes longer than what most tests have to run.

This process imports it once. For each line of its standard input, a JSON object with `args` (the script and its arguments),
`cwd`, `env`, `out` and `err` (paths), it forks: the child becomes that script (or, after -m, that module), ends as any Python
process does, and its exit code (as subprocess has it) is printed.
"""

import gc
import json
import os
import runpy
import signal
import sys

import torch
import torch._dynamo  # which an optimizer imports, and which takes half of the time

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
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(wanted['cwd'])
os.environ.clear()
os.environ.update(wanted['env'])
if wanted['args'][0] == '-m':
    sys.argv, sys.path[0] = wanted['args'][1:], os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
else:
    sys.argv, sys.path[0] = wanted['args'], os.path.dirname(wanted['args'][0])
    runpy.run_path(sys.argv[0], run_name='__main__')
