"""
What the hardware is: the device, the precision it computes in, its memory, and its peak rate.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import sys
import time

import torch

from configurator import UserError

# By a part of the device's name, of which the first match counts, from the makers' data sheets: peak dense FLOP/s, bytes of
# memory (of the smallest that is sold), and the precision of that peak, in which training computes there.
DEVICES = {
    'B200': (2250e12, 180e9, 'bfloat16'), 'H200': (989e12, 141e9, 'bfloat16'), 'H100 PCIe': (756e12, 80e9, 'bfloat16'),
    'H100': (989e12, 80e9, 'bfloat16'), 'A100': (312e12, 40e9, 'bfloat16'), 'A10G': (70e12, 24e9, 'bfloat16'),
    'A10': (125e12, 24e9, 'bfloat16'), 'L40S': (362e12, 48e9, 'bfloat16'), 'L40': (181e12, 48e9, 'bfloat16'),
    'L4': (121e12, 24e9, 'bfloat16'), 'RTX 4090': (165e12, 24e9, 'bfloat16'), 'RTX 3090': (71e12, 24e9, 'bfloat16'),
    'T4': (65e12, 16e9, 'float16'), 'V100': (125e12, 16e9, 'float16'),
    'M1 Ultra': (21e12, 64e9, 'float32'), 'M1 Max': (10.4e12, 32e9, 'float32'), 'M1 Pro': (5.2e12, 16e9, 'float32'),
    'M1': (2.6e12, 8e9, 'float32'), 'M2': (3.6e12, 8e9, 'float32'),
}

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def pick_device(name, local_rank=0, world_size=1):
    """
    'auto' → cuda, else mps, else cpu; 'cuda' → this process's card, such as 'cuda:0'; any other name as it is.

    Raises UserError for a device that is not there, or that several processes cannot share.
    """
    here = {'cpu': 1, 'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available())}
    kind, _, index = name.partition(':')
    if name == 'auto':
        kind = 'cuda' if here['cuda'] else 'mps' if here['mps'] and world_size == 1 else 'cpu'
    if kind not in here:
        raise UserError(f"device='{name}': choose auto, cpu, cuda, cuda:N or mps")
    if world_size > 1 and (index or kind == 'mps'):
        raise UserError(f"device='{name}' cannot serve {world_size} processes; use --device=cuda, a card each, or cpu")
    if kind == 'cuda':
        index = index or str(local_rank)
    if index and not index.isdigit() or int(index or 0) >= here[kind]:
        raise UserError(f"device='{name}', but torch {torch.__version__} sees {here[kind]} {kind} device(s) here, and this "
                        f'process needs number {index or 0}; use --device=auto, or fewer processes')
    return f'{kind}:{index}' if index and kind != 'cpu' else kind


def pick_dtype(name, device):
    """'auto' → 'bfloat16' where `device` computes it natively, 'float16' on older GPUs, else 'float32'."""
    if name != 'auto':
        return name
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    return 'bfloat16' if device == 'cpu' and cpu_computes_bfloat16() else 'float32'


def cpu_computes_bfloat16():
    """Whether matrix products in bfloat16 run in this CPU's own instructions (AMX or AVX512-BF16)."""
    return any(getattr(torch.cpu, check, bool)() for check in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'))


def set_up(device):
    """
    To be called before the first tensor on `device`. On CUDA it makes this process's card the current one and lets float32
    products use TF32. On CPUs (Linux with glibc; elsewhere it changes nothing) it has the process keep the memory that it
    frees: large tensors would else come from the system each time, page by page and zeroed, a fifth of a training step.
    """
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    elif device == 'cpu' and sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)


def not_compiled(error):
    """The line that says why torch.compile is done without: a missing C++ compiler, Python too new for it, ..."""
    reason = str(error).strip().splitlines() or ['']
    return f'compile: does not work here, going on without it ({type(error).__name__}: {reason[0][:100]})'


def autocast(device, dtype):
    """A context in which matrix products run in `dtype` ('float32' changes nothing); weights stay float32."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.split(':')[0], dtype=getattr(torch, dtype))


def synchronize(device):
    """Waits until all work queued on `device` is done (on CPUs it always is)."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device.startswith('mps'):
        torch.mps.synchronize()


def peak_memory(device, reset=False):
    """The most bytes in use so far: on CUDA by tensors, else by the process. `reset`: from now on (CPUs: on Linux only)."""
    if device.startswith('cuda'):
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == 'linux':
        if reset:
            with open('/proc/self/clear_refs', 'w') as f:
                f.write('5')
        with open('/proc/self/status') as f:
            return 1024 * int(re.search(r'VmHWM:\s+(\d+)', f.read())[1])
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def memory_limit(device):
    """
    Bytes that this process may use, what it uses already included; processes that torchrun starts share what a CPU has.
    Raises UserError where that is not known.
    """
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    if device != 'cpu' or sys.platform != 'linux':
        raise UserError(f'batch_size=auto reads how much memory there is on CUDA and on Linux only, and this is {device} on '
                        f'{sys.platform}; give it a number')
    with open('/proc/meminfo') as f:
        available = 1024 * int(re.search(r'MemAvailable:\s+(\d+)', f.read())[1])
    return available // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) + peak_memory(device, reset=True)


def memory_there(device):
    """Bytes that a process may use on `device`; where that is not known, all that the machine has."""
    try:
        return memory_limit(device)
    except UserError:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def most_that_fit(sizes, run, device, reserve):
    """
    The largest of `sizes` (ascending, from 1) whose `run(size)` leaves `reserve` bytes free: by what sizes 1 and 2 take,
    and tried, since a card may have less than it says. 0 if not even 1 fits.
    """
    def used(size):
        peak_memory(device, reset=True)
        try:
            run(size)
        except torch.OutOfMemoryError:
            return math.inf
        return peak_memory(device)

    there = 0.9 * memory_limit(device) - reserve
    first = used(1)
    if first == math.inf or len(sizes) == 1:
        return int(first < math.inf)
    each = max(used(2) - first, 1)  # bytes
    fitting = [1] + [n for n in sizes[1:] if first + (n - 1) * each <= there]
    while len(fitting) > 1 and used(fitting[-1]) == math.inf:
        fitting.pop()
    return fitting[-1]


def device_name(device):
    """The device's name as its maker gives it."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    if device == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):
        return torch.cpu.get_capabilities().get('cpu_name') or platform.machine()
    return platform.processor() or platform.machine()


def peak_flops(device):
    """Peak FLOP/s of `device` (see DEVICES), or None where it is not known."""
    if device == 'cpu':
        return None
    name = device_name(device)
    return next((flops for part, (flops, *_) in DEVICES.items() if re.search(rf'\b{part}\b', name)), None)


def product_rate(device, dtype):
    """FLOP/s of the best of some large matrix products in `dtype`, measured."""
    best = 0.0
    for n in (1024, 2048) if device == 'cpu' else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in 'ab')
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            a @ b
            synchronize(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best
