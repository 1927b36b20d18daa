"""
What a run will be, before any time or money is spent: its size, work, memory, time and price. Nothing is trained.

    python plan.py config/smollm135m.py                                     # the run, and what it is on common devices
    python plan.py config/smollm135m.py --device_name=a10g --price=0.3377   # on one of them, in dollars
    python plan.py --device_name=here                                       # on this machine, measured in ten seconds
    python plan.py --flops=3.2e17 --plot=isoflop.png                        # the best model for so much computation
    python plan.py --dollars=50 --device_name=v100 --price=2.48 --write=config/mine.py     # or for so much money, as a recipe
    python plan.py --fit='out/sweep_*' --n_layer=6 --n_embd=224             # by a scaling law of your own runs

The settings of train.py describe the run. Work is counted as 6 N + 12 layers x width x context FLOPs a token, forward and
backward (PaLM, Chowdhery et al. 2022, appendix B); scaling laws count 6 N, and N with the embeddings (Hoffmann et al. 2022).
"""

from configurator import UserError, at_least, configure

# ---- the machine
device_name = ''  # a10g, h100, ...: the device; here = this machine, measured; '' = a table of all that are known
devices = 1  # how many of them
mfu = 0.0  # share of the device's peak that training uses; 0 = 0.35, an assumption (a run planned for 'here' is measured)
price = 0.0  # dollars that a device costs in an hour
device_memory = 0.0  # its memory in GB, where it is not the table's: A100s and V100s are sold in two sizes
seconds = 10.0  # that measuring takes, about
# ---- the best model for a budget, given as one of these
flops = 0.0  # floating-point operations; 1 PFLOP = 1e15
hours = 0.0  # on `devices` of `device_name`
dollars = 0.0  # the same at `price`
law = 'auto'  # auto | hoffmann | besiroglu | fit: the scaling law that chooses; auto = fit, if one is given, else besiroglu
write = ''  # the config file to write for it, such as config/mine.py
# ---- a scaling law of your own
fit = ''  # folders of finished runs, such as 'out/sweep_*'
check = ''  # folders of runs left out of it, with which its prediction is compared
plot = ''  # the picture to draw, .png or .svg: of losses by size and budget, or with `fit` of the runs and their law
# ----
config = configure(globals(), inherits='train.py')

import difflib
import glob
import math
import os
import re
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

import checkpoint
import costs
import parallel
import rows
import scaling
from curves import columns, import_pyplot, save
from dataset import folder_of, parse_mix, read_meta
from device import DEVICES, autocast, memory_there, not_compiled, pick_device, pick_dtype, product_rate, set_up, synchronize
from device import device_name as name_of
from files import write_whole
from logs import read_log
from model import Transformer
from optim import make_optimizer

run = SimpleNamespace(**config)  # the settings of train.py too
USUAL_MFU = 0.35  # nanoGPT's GPT-2 on A100s ran at 0.30, the 135M write-up on an A10G at 0.35, MosaicML's MPT-125M at 0.43
HEADROOM = 0.92  # share of a device's memory that a plan may fill: CUDA itself and gaps take the rest
PUBLISHED = {  # parameters and tokens
    'GPT-51M (write-up)': (51_008_512, 1.1e9), 'SmolLM2-135M (write-up)': (134_515_008, 1.212e9),
    'GPT-2 124M (nanoGPT)': (124_439_808, 295e9), 'SmolLM2-135M (released)': (134_515_008, 2e12),
}


# ---- the run that the settings describe

def vocabulary():
    """Ids of the model that the settings describe: as they say, or of the data, or as its recipe will make them."""
    name = parse_mix(run.dataset)[0][0]
    if run.vocab_size or os.path.exists(folder_of(name)):
        return run.vocab_size or read_meta(name)['vocab_size']
    kind = f'data/{name}'
    while kind.startswith('data/'):  # a recipe may take another's
        recipe = os.path.join(os.path.dirname(os.path.abspath(__file__)), f'{kind}.py')
        text = open(recipe, encoding='utf-8').read() if os.path.isfile(recipe) else ''
        kind = (re.findall(r"^tokenizer = '(.*)'", text, re.M) or [''])[0]
    size = {'bytes': 257, 'gpt2': 50257}.get(kind) or kind.startswith('bpe:') and int(kind[4:])
    if not size:
        raise UserError(f"vocab_size=0 takes the vocabulary of dataset='{run.dataset}', which is not prepared here; give a "
                        'number')
    return size


def data_at_hand():
    """Training tokens of each data set; None where not all of them are prepared."""
    names, _ = parse_mix(run.dataset)
    if all(os.path.exists(folder_of(name)) for name in names):
        return [sum(entry['tokens'] for file, entry in read_meta(name)['files'].items() if file.startswith('train'))
                for name in names]


def build(settings, vocab_size):
    """The model that settings describe, without its weights."""
    return Transformer.without_weights(checkpoint.shape_of(settings, vocab_size))


def planned_model():
    """The model that is trained, and the steps that it has behind it: of `init_from` if that is there, else of the settings."""
    name = run.init_from.removeprefix('auto:')
    if name in ('scratch', 'auto'):
        return build(config, vocabulary()), 0
    if not os.path.exists(name) and name.endswith('.pt'):
        if config.source['n_layer'] == 'default':
            raise UserError(f"init_from='{run.init_from}' is not there yet, and the settings do not say its shape; name the "
                            'recipe that trains it before this one: plan.py config/BASE.py config/THIS.py')
        return build(config, vocabulary()), 0
    loaded = checkpoint.load_any(run.out_dir if name == 'resume' else name)
    for key, value in loaded['config'].items():  # what is not said anew is as it was
        if config.source.get(key) == 'default' and (name == 'resume' or key == 'block_size'):
            setattr(run, key, value)
    shape = loaded['model_config'] | {'block_size': run.block_size}
    return build(shape, shape['vocab_size']), loaded['iter'] if name == 'resume' else 0


def tokens_per_step():
    return run.batch_size * run.gradient_accumulation_steps * run.block_size * rows.sides(run.stage)


def tokens_to_come(done):
    """Tokens that are trained on after `done` steps, and tokens that evaluations read, of each data set."""
    evaluations = len({*range(done, run.max_iters, run.eval_interval), run.max_iters})
    evaluated = run.eval_iters * run.batch_size * run.block_size * rows.sides(run.stage) * len(parse_mix(run.dataset)[0])
    return max(run.max_iters - done, 0) * tokens_per_step(), evaluations * evaluated


def memory_on(device, model):
    """(windows of a micro-batch as train.py cuts a step; bytes by part). batch_size=auto: the largest that fits."""
    _, _, sizes = parallel.share_step(run.batch_size, run.gradient_accumulation_steps, devices)
    auto = 'batch_size' in config.auto
    for windows in sizes:
        if auto or windows <= run.batch_size:
            parts = costs.memory(model, windows * rows.sides(run.stage), device.dtype, run.optimizer, device.on_cpu,
                                 run.checkpoint_activations, devices if run.fsdp else 1, masked=run.stage != 'pretrain')
            if not auto or fits(parts, device.room):
                break
    return windows, parts


def describe():
    """Prints what the run is, and what it takes where."""
    device = find_device(device_name) if device_name else None  # first of all, as it may be misspelt
    (model, done), data = planned_model(), data_at_hand()
    n, c = model.count_parameters(), model.config
    trained, evaluated = tokens_to_come(done)
    work = model.flops_per_token() * (trained + evaluated / 3)  # an evaluation has no backward pass, two thirds of the work
    outside = sum(p.numel() for name, p in model.named_parameters() if name.startswith(('wte', 'positions', 'lm_head')))
    print(f'model: {n:,} parameters, {outside:,} of them embeddings, {n - outside:,} not ({in_layers(c)}, '
          f'vocabulary {c.vocab_size:,}, context {c.block_size:,})')
    print(f'tokens: {run.max_iters - done:,} steps of {tokens_per_step():,} = {trained:,}, {trained / n:.1f} per parameter; ' +
          (f'the data ({run.dataset}) is not prepared here' if data is None else
           f'{max(trained * w / d for w, d in zip(parse_mix(run.dataset)[1], data)):.2f} epochs of {sum(data):,}'))
    print(f'work: {model.flops_per_token():,} FLOPs a token (6 N + 12 layers x width x context), {work:.3g} in all')
    if work > 1e15 and run.stage == 'pretrain' and run.init_from in ('scratch', 'auto'):  # the law was not fitted on toys
        best_n, best_d = scaling.LAWS['besiroglu'].optimum(6 * n * trained)
        print(f'the best use of that work: {short(best_n)} parameters on {short(best_d)} tokens, for a loss '
              f'{difference(n, trained)} by a scaling law (Besiroglu et al. 2024)')
    optimizer = costs.memory(model, 1, 'float32', run.optimizer, on_cpu=False).get('optimizer', 0)
    print(f'checkpoint: {costs.short(4 * n + optimizer)}B, {run.keep_last} of them and the best are kept')
    shown = device or find_device('A100')
    windows, parts = memory_on(shown, model)
    print(f'memory: {costs.in_words(parts)}; {windows} x {run.block_size} tokens at once, {shown.dtype}, {run.optimizer}')
    if device_name == 'here':
        print(here(device, model, windows, parts, trained, evaluated))
    elif device:
        print(verdict(device, parts, work))
    else:
        on_all = f' on {devices}' * (devices > 1)
        table = [('device', 'TFLOP/s', 'GB', 'precision', 'fits', f'time at {percent()} MFU{on_all}')]
        for device in map(find_device, DEVICES):
            _, parts = memory_on(device, model)
            table.append((device.name, f'{device.peak / 1e12:,.4g}', f'{device.room / 1e9:.0f}', device.dtype,
                          'yes' if fits(parts, device.room) else 'no', duration(seconds_on(device, work))))
        print(columns(table))


def in_layers(shape):
    return f'{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide'


def verdict(device, parts, work):
    """Whether the run fits on a device of the table, how long it takes there, and for how much."""
    of = DEVICES[device.name][2]
    return (f'{devices} x {device.name}, {device.peak / 1e12:,.4g} TFLOP/s, {device.room / 1e9:.3g} GB: '
            f'{fitting(parts, device.room)}; {time_and_money(seconds_on(device, work))}, with an MFU of {percent()}' +
            ', assumed' * (not mfu) + f'; its peak is that of {of}, not of {device.dtype}' * (of != device.dtype))


def seconds_on(device, work):
    return work / (device.peak * devices * (mfu or USUAL_MFU))


def fitting(parts, room):
    return 'fits' if fits(parts, room) else \
        'does not fit (try a smaller batch_size with more gradient_accumulation_steps, or --checkpoint_activations)'


def here(device, model, windows, parts, trained, evaluated):
    """Whether the run fits on this machine, and, measured, how long it takes."""
    words = f'{device.name}, {device.room / 1e9:.0f} GB: {fitting(parts, device.room)}'
    if fits(parts, device.room):
        rate, evaluation_rate, measured = measure(model.config, windows, device.dtype)
        took = (trained / rate + evaluated / evaluation_rate) / devices
        words += (f'; {time_and_money(took)} at {rate:,.0f} tokens a second, measured ({measured} x {run.block_size} at once)')
    return words


def measure(shape, most_windows, dtype):
    """
    Trains a model of that shape on random tokens for some `seconds` → tokens per second of training and of evaluating, and how
    many windows of a micro-batch there was time for.
    """
    device = pick_device(run.device)
    torch.manual_seed(0)
    model = forward = Transformer(shape).to(device)
    model.checkpoint_activations = run.checkpoint_activations
    if device.startswith('cuda') if run.compile == 'auto' else run.compile:
        forward = torch.compile(model, dynamic=False)
    opt = make_optimizer(run.optimizer, model, run.learning_rate, run.beta1, run.beta2, run.momentum, run.weight_decay, device)

    def took(work):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - started

    def gradient():
        with autocast(device, dtype):
            loss = forward(idx, idx)
        loss.backward()

    def optimize():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate():
        with autocast(device, dtype):
            forward(idx, idx)

    windows = 1
    while True:  # as many as a micro-batch has, if there is time for ten of them
        idx = torch.randint(shape.vocab_size, (windows, shape.block_size), device=device)
        try:
            gradient()  # warms up; compiles
        except Exception as e:  # of any kind
            if forward is model or isinstance(e, torch.OutOfMemoryError):
                raise
            print(not_compiled(e))
            forward = model
        once = took(gradient)
        if windows == most_windows or once * 10 > seconds:
            break
        windows = min(most_windows, max(windows + 1, int(windows * min(seconds / 10 / once, 8))))
    for work in (optimize, evaluate):
        work()
    times, began = {gradient: [], optimize: [], evaluate: []}, time.perf_counter()
    while time.perf_counter() - began < seconds / 2 or len(times[gradient]) < 2:
        for work in (gradient, optimize) + (evaluate,) * (len(times[evaluate]) < 3):
            times[work].append(took(work))
    each, tokens = {work: statistics.median(values) for work, values in times.items()}, windows * shape.block_size
    rounds = tokens_per_step() / devices / tokens  # micro-batches of a step
    return tokens * rounds / (each[gradient] * rounds + each[optimize]), tokens / each[evaluate], windows


def find_device(name):
    """
    A device's `name`, `peak` FLOP/s, `room` for tensors in bytes, the `dtype` that training takes there, and whether it is
    `on_cpu`. Raises UserError for one that is not known.
    """
    def plain(text):
        return re.sub('[^a-z0-9]|rtx', '', text.lower())

    if name == 'here':
        device = pick_device(run.device)
        set_up(device)
        dtype = pick_dtype(run.dtype, device)
        return SimpleNamespace(name=f'here, {name_of(device)}', peak=product_rate(device, dtype), dtype=dtype,
                               on_cpu=device == 'cpu', room=device_memory * 1e9 or memory_there(device))
    found = next((known for known in DEVICES if plain(known) == plain(name)), None)
    if not found:
        near = difflib.get_close_matches(plain(name), map(plain, DEVICES), 1, 0.5)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f"device_name='{name}' is none of {', '.join(DEVICES)}, here{hint}")
    peak, room, dtype = DEVICES[found]
    return SimpleNamespace(name=found, peak=peak, room=device_memory * 1e9 or room, on_cpu=False,
                           dtype=dtype if run.dtype == 'auto' else run.dtype)


def fits(parts, room):
    return sum(parts.values()) <= HEADROOM * room


def percent():
    return f'{100 * (mfu or USUAL_MFU):.3g}%'


def time_and_money(took):
    """Seconds in words, with what they cost."""
    return duration(took) + (f', ${took / 3600 * price * devices:,.2f} for ${price:g} an hour' +
                             ' each' * (devices > 1) if price else '')


def duration(took):
    """Seconds in words."""
    for unit, size in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if took >= 2 * size:
            return f'{took / size:,.1f} {unit}'
    return f'{took:.0f} s'


def short(number):
    """'48.2M', '1.1B'."""
    return costs.short(number, 'kMBT')


def difference(n, d):
    """'0.123 lower': how much lower the loss of the best N and D for the same work is, by the corrected law."""
    of = scaling.LAWS['besiroglu']
    return f'{of.loss(n, d) - of.loss(*of.optimum(6 * n * d)):.3f} lower'


# ---- the best model for a budget

def budget():
    """(FLOPs that the budget buys, what that is in words)."""
    given = [name for name in ('flops', 'hours', 'dollars') if config[name]]
    if len(given) > 1:
        raise UserError(f'{" and ".join(given)} are budgets, of which one is enough; leave the others out')
    if flops:
        bought, words = flops, f'{flops:.3g} FLOPs'
    elif not device_name or dollars and not price:
        raise UserError(f'{given[0]}={config[given[0]]:g} needs a --device_name' +
                        ' and a --price in dollars an hour' * bool(dollars))
    else:
        took, device = (hours or dollars / price / devices) * 3600, find_device(device_name)
        bought = took * device.peak * devices * (mfu or USUAL_MFU)
        words = (f'{bought:.3g} FLOPs: {time_and_money(took)}, on {devices} x {device.name}, {device.peak / 1e12:,.4g} '
                 f'TFLOP/s, with an MFU of {percent()}' + ', assumed' * (not mfu))
    if not 1e9 <= bought <= 1e26:
        raise UserError(f'the budget is {bought:.3g} FLOPs, ' + (
            'too few to train anything' if bought < 1e9 else 'beyond any model of these shapes') + '; 1 PFLOP is 1e15')
    return bought, words


def like_the_settings():
    """
    Settings of the models to choose from: those given; those of the runs that a law was fitted to; and else GPT-2's vocabulary
    and context, as train.py's defaults are for bytes.
    """
    usual = {'vocab_size': 50304, 'block_size': 1024, 'n_kv_head': 0, 'dataset': 'fineweb_edu'}
    if config.source['dataset'] != 'default':
        usual |= {'vocab_size': vocabulary(), 'dataset': run.dataset}
    if law == 'fit':
        usual = {key: fitted_runs[0].config[key] for key in usual} | {'vocab_size': fitted_runs[0].vocab_size}
    settings = config | {key: value for key, value in usual.items() if config.source[key] == 'default'}
    settings['vocab_size'] = settings['vocab_size'] or usual['vocab_size']
    checkpoint.shape_of(settings, settings['vocab_size'])  # which may be wrong
    return settings


def nearest_shape(settings, target):
    """
    The model like the settings' of about `target` parameters: an even number of layers, heads of 64 channels (32 where it is
    narrower than 256), widths in multiples of 64 (128 from 512 on), and about 64 channels for each layer, as GPT-2 small.
    """
    groups = max(settings['n_head'] // (settings['n_kv_head'] or settings['n_head']), 1)
    found = []
    for width in (*range(64, 512, 64), *range(512, 16385, 128)):
        heads = width // (64 if width >= 256 else 32)
        kv_heads = heads // groups if heads % groups == 0 else heads
        shape = settings | {'n_embd': width, 'n_head': heads, 'n_kv_head': kv_heads, 'n_inner': 0}
        one, two = (build(shape | {'n_layer': n}, shape['vocab_size']).count_parameters() for n in (1, 2))
        more = 2 * round((target - one) / (two - one) / 2 + 0.5)
        for layers in {max(2, more), max(2, more - 2)}:
            miss = abs(math.log((one + (layers - 1) * (two - one)) / target)) + 0.2 * abs(math.log(width / layers / 64))
            found.append((miss, width, shape | {'n_layer': layers}))
        if one > 4 * target:
            break
    return build(min(found, key=lambda each: each[:2])[2], settings['vocab_size'])


def choose():
    """Prints the best models for a budget by each law, and writes and draws what is wanted of them."""
    work, words = budget()
    settings = like_the_settings()
    print(words)
    table, chosen = [('law', 'parameters', 'tokens', 'each', 'loss', 'nearest shape', 'its size', 'its tokens')], None
    for name, of in laws.items():
        if name == 'fit' != law:
            continue
        n, d = of.optimum(work)
        model = nearest_shape(settings, n)
        table.append((name, short(n), short(d), f'{d / n:.1f}', f'{of.loss(n, d):.3f}', in_layers(model.config),
                      short(model.count_parameters()), short(work / model.flops_per_token())))
        if name == law:
            chosen = model
            too_many = model.count_parameters() > 1.3 * n
    print(columns(table))
    print('(each: tokens per parameter; a loss is of the text and the tokenizer that the law was fitted on)')
    if too_many:
        print(f'note: the best size is too small for a vocabulary of {settings["vocab_size"]:,}; a BPE of your own can be '
              'smaller: --vocab_size=4096')
    if law != 'fit':
        print(columns(far_off()))
    if write:
        write_config(work, words, settings, chosen)
    if plot:
        draw_budgets(work)


def far_off():
    """How far published models are from the best use of the computation that they took, by the corrected law."""
    table = [('model', 'parameters', 'tokens', 'each', 'FLOPs', 'best: parameters', 'tokens', 'loss')]
    for name, (n, d) in PUBLISHED.items():
        best = scaling.LAWS['besiroglu'].optimum(6 * n * d)
        table.append((name, short(n), short(d), f'{d / n:,.0f}', f'{6 * n * d:.2g}', *map(short, best), difference(n, d)))
    return table


CONFIG = '''\
"""
{parameters} parameters on {tokens} tokens, the best use of {work:.3g} FLOPs by a scaling law ({law}).

{prepare}    {launch} train.py {path}

Written by plan.py for {words}.
Learning rate and batch are those of DeepSeek LLM's law (Bi et al. 2024, section 3.1), which was fitted from 1e17 FLOPs on.
"""
out_dir = {out_dir!r}
dataset = {dataset!r}
eval_interval = {often}
sample_interval = {at_times}

batch_size = {batch_size}
gradient_accumulation_steps = {accumulation}  # {step:,} tokens a step

{shape}

optimizer = {optimizer!r}
learning_rate = {learning_rate:.2g}
schedule = 'wsd'
warmup_iters = {warmup}
max_iters = {steps:_}
weight_decay = 0.1
beta2 = 0.95
'''


def write_config(work, words, settings, model):
    """Writes a recipe for train.py, with the largest micro-batch that fits (without a device, into 24 GB)."""
    if os.path.exists(write):
        raise UserError(f"write='{write}' is there already; choose another, or remove it")
    if not write.endswith('.py') or not os.path.isdir(os.path.dirname(write) or '.'):
        raise UserError(f"write='{write}' is no name for a Python file in a folder that is there, such as config/mine.py")
    c, tokens = model.config, work / model.flops_per_token()
    device = find_device(device_name or 'A10G')
    wanted = 0.2920 * work ** 0.3271 / c.block_size / devices  # windows that each device has of a step
    windows = 2 ** math.floor(math.log2(max(wanted, 1)))
    while windows > 1 and not fits(costs.memory(model, windows, device.dtype, run.optimizer, device.on_cpu), device.room):
        windows //= 2
    accumulation = devices * max(round(wanted / windows), 1)
    steps = max(round(tokens / (windows * accumulation * c.block_size)), 1)
    recipe = f'data/{settings["dataset"]}.py'
    text = CONFIG.format(
        parameters=short(model.count_parameters()), tokens=short(tokens), work=work, law=law, path=write, words=words,
        prepare=f'    python prepare.py {recipe}\n' * os.path.exists(recipe),
        launch=f'torchrun --nproc_per_node={devices}' if devices > 1 else 'python',
        out_dir=f'out/{os.path.splitext(os.path.basename(write))[0]}', dataset=settings['dataset'],
        batch_size=windows, accumulation=accumulation, step=windows * accumulation * c.block_size,
        shape='\n'.join(f'{key} = {value!r}' for key, value in vars(c).items()), optimizer=run.optimizer,
        learning_rate=0.3118 * work ** -0.1250, steps=steps, warmup=max(steps // 50, 10), often=max(steps // 20, 1),
        at_times=max(steps // 10, 1))
    try:
        write_whole(write, text.encode())
    except OSError as e:
        raise UserError(f"write='{write}' cannot be written ({e.strerror})") from None
    said = [key for key in ('device_name', 'devices', 'mfu', 'price') if config.source[key] != 'default']
    print(f'{write}: {steps:,} steps of {windows * accumulation * c.block_size:,} tokens. See what it takes:\n'
          f'    python plan.py {" ".join([write, *(f"--{key}={config[key]}" for key in said)])}')


def draw_budgets(work):
    """Draws the loss by size for budgets around `work`, by each law, the best of each, and what others chose."""
    pyplot = import_pyplot(f"plot='{plot}'")
    figure, axes = pyplot.subplots(figsize=(9, 6), layout='constrained')
    of = laws[law]
    for i, more in enumerate((0.01, 0.1, 1, 10, 100)):
        best, _ = of.optimum(work * more)
        sizes = [best * 10 ** (step / 20) for step in range(-20, 21)]
        axes.plot(sizes, [of.loss(n, work * more / 6 / n) for n in sizes], color=f'C{i}', linewidth=2.5 if more == 1 else 1.2,
                  label=f'{work * more:.2g} FLOPs' + ', the budget' * (more == 1))
    for (name, other), style in zip(laws.items(), ('-', '--', ':')):
        path = [other.optimum(work * 10 ** (step / 4)) for step in range(-9, 10)]
        axes.plot([n for n, _ in path], [of.loss(n, d) for n, d in path], color='black', linewidth=1, linestyle=style,
                  label=f'best sizes by {name}')
    n, d = of.optimum(work)
    axes.plot(n, of.loss(n, d), '*', color='C2', markersize=16, zorder=5)
    axes.annotate(f'{short(n)} parameters\n{short(d)} tokens', (n, of.loss(n, d)), xytext=(0, -32), textcoords='offset points',
                  ha='center', fontweight='bold', bbox={'color': 'white', 'alpha': 0.7, 'pad': 1}, zorder=6)
    low, high = work / 300, work * 300
    for name, (n, d) in PUBLISHED.items():
        if low < 6 * n * d < high:
            axes.plot(n, of.loss(n, d), 'o', color='grey', zorder=4)
            axes.annotate(name, (n, of.loss(n, d)), xytext=(6, 6), textcoords='offset points', fontsize=8, color='dimgrey')
    axes.set(xscale='log', xlabel='parameters N', ylabel='predicted loss, nats per token',
             title=f'Loss by size where the computation is given: 6 N D FLOPs (law: {law})')
    axes.xaxis.set_major_formatter(short_ticks)
    axes.legend(fontsize=8)
    save(figure, plot)
    print(f'{plot}: the predicted losses by size')


def short_ticks(number, _):
    return short(number)


# ---- a scaling law of your own

def read_runs(pattern, setting):
    """The finished runs of a pattern. Raises UserError where there is none."""
    found, left_out = [], []
    folders = {os.path.normpath(path) for part in pattern.split() for path in glob.glob(part) if os.path.isdir(path)}
    for folder in sorted(folders):
        path = os.path.join(folder, 'ckpt.pt')
        loaded = checkpoint.peek(path)
        losses = [r['val_loss'] for r in read_log(folder, loaded['iter']) if 'val_loss' in r] if loaded else []
        if not losses or not 0 < losses[-1] < math.inf or not 0 < loaded['config']['max_iters'] <= loaded['iter']:
            left_out.append(folder)
            continue
        shape = checkpoint.model_config(loaded, path)
        n = Transformer.without_weights(shape).count_parameters()
        data = {e['sha256'] for d in loaded['data'].values() for file, e in d['files'].items() if file.startswith('val')}
        found.append(SimpleNamespace(name=folder, n=n, d=loaded['tokens'], loss=losses[-1], data=data, config=loaded['config'],
                                     vocab_size=shape.vocab_size))
    if left_out:
        print(f'left out, since not finished or without an evaluation: {", ".join(left_out)}')
    if not found:
        raise UserError(f"{setting}='{pattern}' finds no finished run with an evaluation; name folders such as 'out/sweep_*'")
    return found


def fit_law():
    """Fits the law to the runs, prints it and what it says, and draws it. Returns it and the runs."""
    checks = read_runs(check, 'check') if check else []
    runs = [each for each in read_runs(fit, 'fit') if each.name not in [other.name for other in checks]]
    for each in runs + checks:
        if each.data != (runs + checks)[0].data:
            raise UserError(f'{(runs + checks)[0].name} and {each.name} were evaluated on other data; a law is of one text')
    of, spread = scaling.fit(*(np.array([getattr(each, key) for each in runs]) for key in ('n', 'd', 'loss')))
    table = [('run', 'parameters', 'tokens', 'loss', 'by the law', 'difference')]
    for each in runs:
        by_law = of.loss(each.n, each.d)
        table.append((each.name, short(each.n), short(each.d), f'{each.loss:.4f}', f'{by_law:.4f}',
                      f'{each.loss - by_law:+.4f}'))
    print(columns(table))
    print(('L(N, D) = E + A / N^alpha + B / D^beta: ' if of.A else 'L(D) = E + B / D^beta: ') + ', '.join(
        f'{name} {value:.4g} ({low:.4g} to {high:.4g})' for name, (value, low, high) in scaling.constants(of, spread).items()))
    print(f'(in brackets the middle 80% of {len(spread)} fits to runs drawn anew, with repetition)')

    def predicted(n, d):
        low, high = scaling.interval(other.loss(n, d) for other in spread)
        return f'{short(n)} parameters, {short(d)} tokens: {of.loss(n, d):.4f} predicted ({low:.4f} to {high:.4f})'

    for each in checks:
        print(f'{each.name}, left out: {predicted(each.n, each.d)}, {each.loss:.4f} reached')
    asked = (*checkpoint.ModelConfig.__annotations__, 'max_iters')
    if not has_budget and any(config.source[key] != 'default' for key in asked):
        n = build(config, vocabulary()).count_parameters()
        print(f'these settings: {predicted(n, run.max_iters * tokens_per_step())}')
    if plot and not has_budget:
        draw_law(of, spread, runs, checks)
    return of, runs


def draw_law(of, spread, runs, checks):
    """Draws the runs' losses by tokens, a curve of the law for each size, and the runs that were left out."""
    pyplot = import_pyplot(f"plot='{plot}'")
    figure, axes = pyplot.subplots(figsize=(9, 6), layout='constrained')
    sizes, lengths = ({getattr(each, key) for each in runs + checks} for key in ('n', 'd'))
    least, most = min(lengths), max(lengths)
    tokens = [least * (most / least * 2) ** (step / 60) / 1.2 for step in range(61)]
    for i, n in enumerate(sorted(sizes)):
        fitted = any(n == each.n for each in runs)
        axes.plot(tokens, [of.loss(n, d) for d in tokens], color=f'C{i}', linestyle='-' if fitted else '--')
        low, high = zip(*(scaling.interval(other.loss(n, d) for other in spread) for d in tokens))
        axes.fill_between(tokens, low, high, color=f'C{i}', alpha=0.15, linewidth=0)
        for group, mark, words in ((runs, 'o', ''), (checks, '*', ', not fitted')):
            points = [(each.d, each.loss) for each in group if each.n == n]
            if points:
                axes.plot(*zip(*points), mark, color=f'C{i}', markersize=14 if mark == '*' else 6,
                          label=f'{short(n)} parameters{words}')
    axes.set(xscale='log', xlabel='training tokens D', ylabel='validation loss, nats per token',
             title='Runs (marks), their law (lines) and its uncertainty (80%)')
    axes.xaxis.set_major_formatter(short_ticks)
    axes.xaxis.set_minor_formatter(short_ticks)
    axes.legend()
    save(figure, plot)
    print(f'{plot}: the runs and their law')


# ---- what is wanted

at_least(config, 0, 'mfu', 'price', 'device_memory', 'flops', 'hours', 'dollars', 'max_iters')
at_least(config, 1, 'devices', 'batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'seconds')
if mfu > 1:
    raise UserError(f'mfu={mfu} is a share of the peak, such as 0.35')
has_budget = bool(flops or hours or dollars)
A_BUDGET, RUNS = 'a budget: --flops, --hours or --dollars', "--fit='out/sweep_*'"
for name, given, needs in (('write', has_budget, A_BUDGET), ('law', has_budget, A_BUDGET), ('check', fit, RUNS),
                           ('plot', has_budget or fit, f'{RUNS} or {A_BUDGET}'), ('price', device_name, 'a --device_name')):
    if config.source[name] != 'default' and not given:
        raise UserError(f'{name}={config[name]!r} needs {needs}')
if law == 'fit' and not fit:
    raise UserError("law='fit' needs runs: --fit='out/sweep_*'")
law = ('fit' if fit else 'besiroglu') if law == 'auto' else law
laws = dict(scaling.LAWS)
if fit:
    laws['fit'], fitted_runs = fit_law()
if has_budget:
    choose()
elif not fit:
    describe()
