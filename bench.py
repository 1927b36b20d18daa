"""
Measures how fast a model is here.

    python bench.py --task=sample --init_from=out/stdlib --max_new_tokens=128
    python bench.py --task=sample --init_from=hf/gpt2 --prompt_tokens=700 --vs='transformers ../nanoGPT'

The first line is the figure: tokens written per second, once the prompt is read. Below it stand the prompt's reading,
and what of the memory's speed is used: to write a token, all weights must be read once. (nanoGPT's figure, and transformers'
for several prompts at once, count the prompt's reading too.) Measure when nothing else runs.
"""

from configurator import UserError, configure

# ---- what
task = 'sample'  # sample (writing; training is still to come)
init_from = 'out/stdlib'  # a run's folder, a checkpoint, a folder in Hugging Face's form, or a model's id on its hub
vs = ''  # what to measure beside it, in turns: transformers, or the path of a clone of nanoGPT, or both with a blank between
# ---- how
prompt_tokens = 16  # length of the prompt
max_new_tokens = 128  # tokens written after it; no end of text ends them
batch_size = 1  # prompts at once; above 1 a CPU is not measured compiled
rounds = 3  # each is measured so often, in turns; the median counts
# ---- machine
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto | float32 | bfloat16 | float16 | int8: of weights; auto = bfloat16 if native; int8 is for CPUs
compile = 'auto'  # auto | True | False: torch.compile, whose own time is not counted; auto = both ways, the faster counts
seed = 1337  # of the prompt and what is drawn
# ----
config = configure(globals())

import contextlib
import copy
import importlib.util
import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # large pages, before torch asks: CPUs read weights some 10% faster

import torch

import checkpoint
import huggingface
from device import device_name, pick_device, pick_dtype, synchronize
from generation import Sampling, Writer

BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}


class Ours:
    """This repository's own generation, with the settings of sample.py."""

    def __init__(self, model, tokenizer, compile):
        self.name = f'sourdough, {dtype}' + ', compiled' * compile
        self.writer = Writer(model, tokenizer, device, dtype, compile)

    def times(self, prompts):
        """Seconds at which each further token of the batch was there, from the beginning."""
        sampling, seeds = Sampling(max_new_tokens=max_new_tokens), range(seed, seed + batch_size)
        started, times = time.perf_counter(), []
        for row, _, _ in self.writer.write(prompts, sampling, seeds, stop_ids=set()):
            if row == batch_size - 1:
                times.append(time.perf_counter() - started)
        return times


class Transformers:
    """The same weights in transformers, greedy, through its `generate`."""

    def __init__(self, model, tokenizer, precision):
        try:
            import transformers
        except ImportError:
            raise UserError("vs='transformers' needs a package: pip install transformers") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name = f'transformers {transformers.__version__}, {precision}'
        with tempfile.TemporaryDirectory() as folder:
            huggingface.write(os.path.join(folder, 'hf'), model, tokenizer)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, 'hf'))
        self.model = self.model.to(device, getattr(torch, precision)).eval()

    def times(self, prompts):
        class Clock:  # what `generate` hands each token to
            def put(self, _):
                times.append(time.perf_counter() - started)

            def end(self):
                pass

        idx, times = torch.tensor(prompts, device=device), []
        started = time.perf_counter()
        ids = self.model.generate(idx, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False,
                                  pad_token_id=0, attention_mask=torch.ones_like(idx),
                                  streamer=Clock() if batch_size == 1 else None)
        synchronize(device)
        assert ids.size(1) == prompt_tokens + max_new_tokens
        return times[1:] or [time.perf_counter() - started]  # the prompt itself comes first


class NanoGPT:
    """nanoGPT's own model.py and `generate`, as it ships: a GPT-2 of the same layers, heads and width, random weights."""

    def __init__(self, path, c):
        file = os.path.join(path, 'model.py')
        if not os.path.isfile(file):
            raise UserError(f"vs='{vs}': there is no {file}; name transformers, or the path of a clone of nanoGPT")
        spec = importlib.util.spec_from_file_location('nanogpt_model', file)
        module = importlib.util.module_from_spec(spec)
        sys.modules['nanogpt_model'] = module
        spec.loader.exec_module(module)
        self.name = 'nanoGPT, float32'
        shape = module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                                 n_embd=c.n_embd, dropout=0.0)
        with contextlib.redirect_stdout(sys.stderr):  # it tells its size
            self.model = module.GPT(shape).to(device).eval()

    def times(self, prompts):
        idx, started = torch.tensor(prompts, device=device), time.perf_counter()
        self.model.generate(idx, max_new_tokens)
        synchronize(device)
        return [time.perf_counter() - started]


def read_speed(n_bytes):
    """Bytes per second at which the device reads so many bytes: the sum of a tensor."""
    data = torch.ones(n_bytes // 4, device=device)
    data.sum()
    seconds = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        data.sum().item()
        seconds.append(time.perf_counter() - started)
    return n_bytes / statistics.median(seconds)


def rate(times):
    """Tokens per second of the batch after the first token; of the whole, where the single times are not known."""
    if len(times) > 1:
        return batch_size * (len(times) - 1) / (times[-1] - times[0])
    return batch_size * max_new_tokens / times[0]


for name, least in (('prompt_tokens', 1), ('max_new_tokens', 2), ('batch_size', 1), ('rounds', 1)):
    if config[name] < least:
        raise UserError(f'{name}={config[name]} is less than {least}')
device = pick_device(device)
dtype = pick_dtype(dtype, device)
model, tokenizer = checkpoint.load_model(init_from)[:2]
c = model.config
if prompt_tokens + max_new_tokens > c.block_size:
    raise UserError(f'prompt_tokens {prompt_tokens} + max_new_tokens {max_new_tokens} are more than the block_size '
                    f'{c.block_size} of the model; make them fewer')
# on a CPU only single texts are written faster when compiled
ways = [compile] if compile != 'auto' else [False] if dtype == 'int8' or device == 'cpu' and batch_size > 1 else [True, False]
peers = []
for peer in vs.split():
    if peer == 'transformers':
        peers += [Transformers(model, tokenizer, precision) for precision in ('float32', 'bfloat16')]
    else:
        peers.append(NanoGPT(peer, c))
# what a token reads: every matrix, of the embeddings only the output layer's
n_weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(('positions', 'wte')))
n_weights += c.vocab_size * c.n_embd if c.tie_weights else 0
n_bytes = n_weights * BYTES[dtype]
n_parameters = model.count_parameters()
peers = [Ours(model if way is ways[-1] else copy.deepcopy(model), tokenizer, way) for way in ways] + peers
generator = torch.Generator().manual_seed(seed % 2**63)
prompts = torch.randint(min(c.vocab_size, tokenizer.vocab_size), (batch_size, prompt_tokens), generator=generator).tolist()

for peer in peers:
    peer.times(prompts)  # warms up; compiles
rates, firsts, speeds = [[] for _ in peers], [[] for _ in peers], []
for _ in range(rounds):
    speeds.append(read_speed(max(n_bytes, 2**28)))  # more than a cache holds
    for i, peer in enumerate(peers):
        times = peer.times(prompts)
        rates[i].append(rate(times))
        firsts[i].append(times[0])
medians = list(map(statistics.median, rates))
best = max(range(len(ways)), key=lambda way: medians[way])
ours, first, speed = medians[best], statistics.median(firsts[best]), statistics.median(speeds)
print(f'{ours:,.1f} tok/s')
print(f'{peers[best].name}: {n_parameters:,} parameters, batch {batch_size}, {prompt_tokens} + {max_new_tokens} tokens, on '
      f'{device_name(device)}' + (f', {torch.get_num_threads()} threads' if device == 'cpu' else ''))
print(f'prompt: {first:.3f} s to the first token, {batch_size * prompt_tokens / first:,.0f} tok/s')
allowed = batch_size * speed / n_bytes
print(f'weights: {n_bytes / 1e6:,.0f} MB a token, read at {speed / 1e9:.1f} GB/s, allow {allowed:,.0f} tok/s: '
      f'{ours / allowed:.0%} of that')
for i, peer in enumerate(peers):
    print(f'{peer.name}: {medians[i]:,.1f} tok/s ({", ".join(f"{x:,.1f}" for x in rates[i])})' +
          (f'; ours is {ours / medians[i]:.1f} times as fast' if i != best else ''))
