"""
Measures how fast a model is trained, or writes, here.

    python bench.py config/gpt2.py --batch_size=4                     # training, with any of train.py's settings
    python bench.py config/gpt2.py --batch_size=4 --vs=../nanoGPT     # beside a clone of nanoGPT, in turns
    python bench.py --task=sample --init_from=out/stdlib --max_new_tokens=128
    python bench.py --task=sample --init_from=hf/gpt2 --prompt_tokens=700 --vs='transformers ../nanoGPT'

The first line is the figure. Training: tokens per second, in steps of one micro-batch; below it where the time goes, what of
the device's matrix products is used (MFU), and the memory. Writing: tokens per second once the prompt is read; below it the
prompt's reading, and what of the memory's speed is used: to write a token, all weights must be read once. (nanoGPT's figure
there, and transformers' for several prompts at once, count the prompt's reading too.) Measure when nothing else runs.
"""

from configurator import UserError, at_least, configure

# ---- what
task = 'train'  # train | sample: what is measured
vs = ''  # what to measure beside it, in turns: transformers, or the path of a clone of nanoGPT, or both with a blank between
rounds = 3  # each is measured so often, in turns; the median counts
steps = 0  # train: steps in a round; 0 = 1 on CPUs, 20 elsewhere
prompt_tokens = 16  # sample: length of the prompt
max_new_tokens = 128  # sample: tokens written after it; no end of text ends them
way = ''  # train: what this process measures, of all that bench.py measures in processes of their own; '' = it starts them
# ---- as in train.py and sample.py
dtype = 'auto'  # auto | float32 | bfloat16 | float16 | int8: auto = bfloat16 if native; int8 is for writing on CPUs
compile = 'auto'  # auto | True | False: torch.compile, whose own time is not counted; writing: auto = the faster counts
# ----
config = configure(globals(), inherits='train.py')

import contextlib
import copy
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

if task == 'sample':
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # large pages, before torch asks: CPUs read weights some 10% faster

import torch

import checkpoint
import huggingface
from dataset import Split, TrainingOrder, folder_of, parse_mix, read_ahead, read_meta
from device import autocast, device_name, peak_flops, peak_memory, pick_device, pick_dtype, product_rate, set_up, synchronize
from generation import Sampling, Writer
from model import Transformer
from optim import make_optimizer

run = SimpleNamespace(**config)  # the settings of train.py too
BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}


def nanogpt(path, c):
    """The model of nanoGPT's own model.py: a GPT-2 of the same layers, heads and width, with random weights."""
    file = os.path.join(path, 'model.py')
    if not os.path.isfile(file):
        raise UserError(f"vs='{vs}': there is no {file}; name transformers, or the path of a clone of nanoGPT")
    spec = importlib.util.spec_from_file_location('nanogpt_model', file)
    module = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt_model'] = module
    spec.loader.exec_module(module)
    shape = module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                             n_embd=c.n_embd, dropout=0.0, bias=True)
    with contextlib.redirect_stdout(sys.stderr):  # it tells its size
        return module.GPT(shape).to(device)


def import_transformers():
    """transformers, quiet."""
    try:
        import transformers
    except ImportError:
        raise UserError("vs='transformers' needs a package: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ---- training

def training_ways():
    """What is measured, ours first: 'name,dtype,compile'."""
    cuda = device.startswith('cuda')
    ways = [f'sourdough,{dtype},{cuda if compile == "auto" else compile}']
    for peer in vs.split():
        if peer == 'transformers':
            ways += ['transformers,float32,False', f'transformers,{dtype},False']
        else:  # as it ships, on CPUs in float32 and (by its README) not compiled; there also with what it lacks
            ways += [f'nanoGPT,{dtype},True'] if cuda else [
                'nanoGPT,float32,False', f'nanoGPT,{dtype},False', f'nanoGPT,{dtype},True']
    return list(dict.fromkeys(ways))


def training_data():
    """(vocabulary, a function from a step to its batch, what it is): of the data set, or random where that is not there."""
    names, weights = parse_mix(run.dataset)
    if all(os.path.exists(folder_of(name)) for name in names):
        splits = [Split(name, 'train', run.block_size, run.stride) for name in names]
        order = TrainingOrder(splits, weights, batch_size, run.seed)
        return (run.vocab_size or read_meta(names[0])['vocab_size'],
                lambda it: tuple(map(torch.from_numpy, order.batch(it, range(batch_size)))), f'data of {run.dataset}')
    vocab, shape = run.vocab_size or 50257, (2, batch_size, run.block_size)
    return (vocab, lambda it: tuple(torch.randint(vocab, shape, generator=torch.Generator().manual_seed(it))),
            f'random tokens, since data/{run.dataset} is not there')


def training_peer(name, c, compiled):
    """(a function from a batch to its mean loss, the weights, the optimizer) of one way to train."""
    torch.manual_seed(run.seed)
    betas = run.beta1, run.beta2
    if name == 'sourdough':
        set_up(device)
        model = Transformer(c).to(device)
        model.checkpoint_activations = run.checkpoint_activations
        opt = make_optimizer(run.optimizer, model, run.learning_rate, *betas, run.momentum, run.weight_decay, device)
    elif name == 'nanoGPT':
        model = nanogpt(next(peer for peer in vs.split() if peer != 'transformers'), c)
        with contextlib.redirect_stdout(sys.stderr):
            opt = model.configure_optimizers(run.weight_decay, run.learning_rate, betas, device.split(':')[0])
    else:
        transformers = import_transformers()
        both = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tie_weights)
        if c.pos == 'learned':
            shape = transformers.GPT2Config(n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **both)
        else:
            shape = transformers.LlamaConfig(
                hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size, **both)
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).to(device)
        opt = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, betas=betas, weight_decay=run.weight_decay)
    model.train()
    forward = torch.compile(model, dynamic=False) if compiled else model
    loss_of = {'sourdough': lambda x, y: forward(x, y, criterion=run.criterion), 'nanoGPT': lambda x, y: forward(x, y)[1],
               'transformers': lambda x, y: forward(x, labels=x).loss}[name]
    return loss_of, list(model.parameters()), opt


def measure_way(name, precision, compiled):
    """For each line of standard input, a round's figures in seconds and bytes, as a line of JSON."""
    vocab, load, _ = training_data()
    loss_of, params, opt = training_peer(name, checkpoint.shape_of(config, vocab), compiled == 'True')
    cuda, batches = device.startswith('cuda'), read_ahead(load, range(10**9))

    def mark():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step():
        started = time.perf_counter()
        x, y = next(batches)
        waited = time.perf_counter() - started
        x, y = (part.pin_memory().to(device, non_blocking=True) if cuda else part for part in (x, y))
        marks = [mark()]
        with autocast(device, precision):
            loss = loss_of(x, y)
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        torch.nn.utils.clip_grad_norm_(params, run.grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return waited, [*marks, mark()]

    for _ in range(2):  # warms up; compiles
        step()
    synchronize(device)
    print('ready', flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        done = [step() for _ in range(steps)]
        synchronize(device)
        figures = {'step': (time.perf_counter() - started) / steps, 'data': sum(waited for waited, _ in done) / steps}
        for i, part in enumerate(('forward', 'backward', 'optimizer')):
            spans = [m[i].elapsed_time(m[i + 1]) / 1e3 if cuda else m[i + 1] - m[i] for _, m in done]
            figures[part] = sum(spans) / steps
        print(json.dumps(figures | {'memory': peak_memory(device)}), flush=True)


def measure_training():
    """Each way in a process of its own, so that none has the others' memory or settings; only one of them works at a time."""
    ways, processes = training_ways(), []
    try:
        for each in ways:
            processes.append(subprocess.Popen([sys.executable, os.path.abspath(__file__), *sys.argv[1:], f'--way={each}'],
                                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            if processes[-1].stdout.readline() != 'ready\n':
                raise UserError(f'{each} cannot be measured: its reason stands above')
        peaks, figures = [], [[] for _ in ways]
        for _ in range(rounds):
            peaks.append(product_rate(device, dtype))
            for process, done in zip(processes, figures):
                print(file=process.stdin, flush=True)
                done.append(json.loads(process.stdout.readline()))
    finally:
        for process in processes:
            process.kill()
    vocab, _, data = training_data()
    model = Transformer.without_weights(checkpoint.shape_of(config, vocab))
    tokens = batch_size * run.block_size
    rates = [[tokens / figure['step'] for figure in done] for done in figures]
    medians = list(map(statistics.median, rates))
    names = [f'{name}, {precision}' + (', compiled' if compiled == 'True' else '')
             for name, precision, compiled in (each.split(',') for each in ways)]
    median = {key: statistics.median(figure[key] for figure in figures[0]) for key in figures[0][0]}
    flops, peak, sheet = model.flops_per_token() * medians[0], statistics.median(peaks), peak_flops(device)
    print(f'{medians[0]:,.1f} tok/s')
    threads = f', {torch.get_num_threads()} threads' if device == 'cpu' else ''
    print(f'{names[0]}: {model.count_parameters():,} parameters, {run.optimizer}, steps of {batch_size} x {run.block_size} '
          f'tokens, on {device_name(device)}{threads}; {data}')
    print(f'step: {median["step"]:.3f} s; ' + ', '.join(f'{key} {median[key]:.3f}' for key in (
        'forward', 'backward', 'optimizer', 'data')))
    print(f'FLOPs: {flops / 1e12:.3f}e12 a second; MFU {flops / peak:.0%} of the {peak / 1e12:.3f}e12 that matrix products in '
          f'{dtype} reach here, ' + (f'{flops / sheet:.0%} of the data sheet\'s {sheet / 1e12:.0f}e12' if sheet else
                                     'no data sheet known'))
    print(f'memory: {median["memory"] / 1e9:.1f} GB at most')
    for i, name in enumerate(names):
        print(f'{name}: {medians[i]:,.1f} tok/s ({", ".join(f"{x:,.1f}" for x in rates[i])}), '
              f'{max(figure["memory"] for figure in figures[i]) / 1e9:.1f} GB' +
              (f'; ours is {medians[0] / medians[i]:.2f} times as fast' if i else ''))


# ---- writing

class OurWriter:
    """This repository's own generation, with the settings of sample.py."""

    def __init__(self, model, tokenizer, compile):
        self.name = f'sourdough, {dtype}' + ', compiled' * compile
        self.writer = Writer(model, tokenizer, device, dtype, compile)

    def times(self, prompts):
        """Seconds at which each further token of the batch was there, from the beginning."""
        sampling, seeds = Sampling(max_new_tokens=max_new_tokens), range(run.seed, run.seed + batch_size)
        started, times = time.perf_counter(), []
        for row, _, _ in self.writer.write(prompts, sampling, seeds, stop_ids=set()):
            if row == batch_size - 1:
                times.append(time.perf_counter() - started)
        return times


class TransformersWriter:
    """The same weights in transformers, greedy, through its `generate`."""

    def __init__(self, model, tokenizer, precision):
        transformers = import_transformers()
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


class NanoGPTWriter:
    """nanoGPT's own `generate`, as it ships."""

    def __init__(self, path, c):
        self.name = 'nanoGPT, float32'
        self.model = nanogpt(path, c).eval()

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


def measure_writing():
    """All in this process, in turns."""
    name = run.init_from if config.source['init_from'] != 'default' else 'out/stdlib'
    model, tokenizer = checkpoint.load_model(name)[:2]
    c = model.config
    if prompt_tokens + max_new_tokens > c.block_size:
        raise UserError(f'prompt_tokens {prompt_tokens} + max_new_tokens {max_new_tokens} are more than the block_size '
                        f'{c.block_size} of the model; make them fewer')
    # on a CPU only single texts are written faster when compiled
    both = dtype != 'int8' and not (device == 'cpu' and batch_size > 1)
    ways = [compile] if compile != 'auto' else [True, False] if both else [False]
    peers = []
    for peer in vs.split():
        if peer == 'transformers':
            peers += [TransformersWriter(model, tokenizer, precision) for precision in ('float32', 'bfloat16')]
        else:
            peers.append(NanoGPTWriter(peer, c))
    # what a token reads: every matrix, of the embeddings only the output layer's
    n_weights = sum(p.numel() for key, p in model.named_parameters() if not key.startswith(('positions', 'wte')))
    n_weights += c.vocab_size * c.n_embd if c.tie_weights else 0
    n_bytes = n_weights * BYTES[dtype]
    n_parameters = model.count_parameters()
    peers = [OurWriter(model if way is ways[-1] else copy.deepcopy(model), tokenizer, way) for way in ways] + peers
    generator = torch.Generator().manual_seed(run.seed % 2**63)
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


device = pick_device(run.device)
dtype = pick_dtype(dtype, device)
batch_size = 1 if task == 'sample' and config.source['batch_size'] == 'default' else run.batch_size
at_least(config, 2, 'max_new_tokens')
at_least(config, 1, 'prompt_tokens', 'batch_size', 'rounds')
at_least(config, 0, 'steps')
if 'batch_size' in config.auto:
    raise UserError('batch_size=auto is for train.py: what is measured here is a number of windows; give one')
steps = steps or (1 if device == 'cpu' else 20)
if task == 'sample':
    measure_writing()
elif dtype == 'int8':
    raise UserError("dtype='int8' is for --task=sample only; train in bfloat16 or float32")
elif way:
    measure_way(*way.split(','))
else:
    measure_training()
