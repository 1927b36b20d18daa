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

from configurator import UserError, configure

# ---- the machine
device_name = ''  # a10g, h100, ...: the device; here = this machine, measured; '' = a table of all that are known
devices = 1  # how many of them
mfu = 0.0  # share of the device's peak that training uses; 0 = 0.35, an assumption, or for a config file and 'here', measured
price = 0.0  # dollars that a device costs in an hour
device_memory = 0.0  # its memory in GB, where it is not what the table says
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
import time
from types import SimpleNamespace

import torch

import checkpoint
import costs
import rows
import scaling
from curves import columns, import_pyplot, save
from dataset import folder_of, parse_mix, read_meta
from device import DEVICES, autocast, memory_limit, pick_device, pick_dtype, product_rate, set_up, synchronize
from device import device_name as name_of
from files import write_whole
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
        before = f", or the recipe of init_from='{run.init_from}' before this one" * (run.init_from != 'scratch')
        raise UserError(f"vocab_size=0 takes the vocabulary of dataset='{run.dataset}', which is not prepared here; give a "
                        f'number{before}')
    return size


def data_at_hand():
    """Training tokens of each data set; None where not all of them are prepared."""
    names, _ = parse_mix(run.dataset)
    if all(os.path.exists(folder_of(name)) for name in names):
        return [sum(entry['tokens'] for file, entry in read_meta(name)['files'].items() if file.startswith('train'))
                for name in names]


def build(settings, vocab_size):
    """The model that settings describe, without its weights."""
    with torch.device('meta'):
        return Transformer(checkpoint.shape_of(settings, vocab_size))


def planned_model():
    """The model that is trained: of `init_from`, if that is there already or on the hub, else of the settings."""
    name = run.init_from.removeprefix('auto:')
    if name in ('scratch', 'auto') or not os.path.exists(name) and name.endswith('.pt'):
        return build(config, vocabulary())
    loaded = checkpoint.load_any(run.out_dir if name == 'resume' else name)
    if config.source['block_size'] == 'default':
        run.block_size = loaded['config']['block_size']
    return build(loaded['model_config'] | {'block_size': run.block_size}, loaded['model_config']['vocab_size'])


def tokens_per_step():
    return run.batch_size * run.gradient_accumulation_steps * run.block_size * rows.sides(run.stage)


def work_of(model):
    """(tokens that are trained on, tokens that evaluations read, FLOPs of both: without a backward pass it is a third)."""
    evaluations = run.max_iters // run.eval_interval + 1 + (run.max_iters % run.eval_interval > 0)
    trained = run.max_iters * tokens_per_step()
    evaluated = evaluations * run.eval_iters * run.batch_size * run.block_size
    return trained, evaluated, model.flops_per_token() * (trained + evaluated / 3)


def micro_batch():
    """Windows of a micro-batch, as train.py cuts them."""
    total = run.batch_size * run.gradient_accumulation_steps
    if total % devices:
        raise UserError(f'devices={devices} cannot share a step of {total} windows (batch_size * gradient_accumulation_steps); '
                        f'choose a product that is a multiple of {devices}')
    share = total // devices
    return next(n for n in range(min(run.batch_size, share), 0, -1) if share % n == 0)


def memory_on(model, dtype, on_cpu):
    return costs.memory(model, micro_batch() * rows.sides(run.stage), dtype, run.optimizer, on_cpu,
                        run.checkpoint_activations, devices if run.fsdp else 1)


def describe():
    """Prints what the run is, and what it takes where."""
    model, data = planned_model(), data_at_hand()
    n, c = model.count_parameters(), model.config
    trained, evaluated, work = work_of(model)
    outside = sum(p.numel() for name, p in model.named_parameters() if name.startswith(('wte', 'positions', 'lm_head')))
    print(f'model: {n:,} parameters, {outside:,} of them embeddings, {n - outside:,} not ({in_layers(c)}, '
          f'vocabulary {c.vocab_size:,}, context {c.block_size:,})')
    print(f'tokens: {run.max_iters:,} steps of {tokens_per_step():,} = {trained:,}, {trained / n:.1f} per parameter; ' +
          (f'the data ({run.dataset}) is not prepared here' if data is None else
           f'{max(trained * w / d for w, d in zip(parse_mix(run.dataset)[1], data)):.2f} epochs of {sum(data):,}'))
    print(f'work: {model.flops_per_token():,} FLOPs a token (6 N + 12 layers x width x context), {work:.3g} in all')
    if trained and run.stage == 'pretrain' and run.init_from in ('scratch', 'auto'):
        best_n, best_d = scaling.LAWS['besiroglu'].optimum(6 * n * trained)
        print(f'for as much work the best is {short(best_n)} parameters on {short(best_d)} tokens '
              f'({difference(scaling.LAWS["besiroglu"], n, trained)} loss; Besiroglu et al. 2024)')
    dtype = '16 bits' if run.dtype == 'auto' else run.dtype
    if device_name != 'here':
        parts = memory_on(model, dtype, on_cpu=False)
        print(memory_line(parts, dtype))
    optimizer = costs.memory(model, 1, dtype, run.optimizer, False).get('optimizer', 0)
    print(f'checkpoint: {costs.short(4 * n + optimizer)}B, {run.keep_last} of them and the best are kept')
    if device_name == 'here':
        here(model)
    elif device_name:
        print(on_device(device_name, parts, work))
    else:
        table = [('device', 'TFLOP/s', 'GB', 'fits', f'time at {mfu or USUAL_MFU:.0%} MFU' + f' on {devices}' * (devices > 1))]
        for name, (peak, room) in DEVICES.items():
            own = memory_on(model, 'float32', on_cpu=False) if name[0] == 'M' and run.dtype == 'auto' else parts  # Apple's
            table.append((name, f'{peak / 1e12:.3g}', f'{room / 1e9:.0f}', 'yes' if fits(own, room) else 'no',
                         duration(work / (peak * devices * (mfu or USUAL_MFU)))))
        print(columns(table))


def in_layers(shape):
    return f'{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide'


def memory_line(parts, dtype):
    return (f'memory: {costs.in_words(parts)}; micro-batches of {micro_batch()} x {run.block_size} tokens, {dtype}, '
            f'{run.optimizer}')


def on_device(name, parts, work):
    """The line on a device of the table."""
    name, peak, room = find_device(name)
    used = mfu or USUAL_MFU
    verdict = 'fits' if fits(parts, room) else \
        'does not fit: a smaller batch_size with more gradient_accumulation_steps, or --checkpoint_activations'
    return (f'{devices} x {name}, {peak / 1e12:.3g} TFLOP/s, {room / 1e9:.0f} GB: {verdict}; ' +
            time_and_money(work / (peak * devices * used)) + f' at an MFU of {used:.0%}' + ', assumed' * (not mfu))


def here(model):
    """Measures training on this machine, and prints what the run takes here."""
    device = pick_device(run.device)
    dtype = pick_dtype(run.dtype, device)
    trained, evaluated, _ = work_of(model)
    rate, evaluation_rate, windows = measure(model.config, device, dtype)
    parts = memory_on(model, dtype, device == 'cpu')
    print(memory_line(parts, dtype))
    room = device_memory * 1e9 or memory_limit(device)
    print(f'here, {name_of(device)}, {room / 1e9:.0f} GB: {"fits" if fits(parts, room) else "does not fit"}; '
          f'{time_and_money((trained / rate + evaluated / evaluation_rate) / devices)} at {rate:,.0f} tokens a second, measured '
          f'({windows} x {run.block_size} tokens at once)')


def measure(shape, device, dtype):
    """
    Trains a model of that shape on random tokens for some `seconds` → tokens per second of training and of evaluating, and how
    many windows of a micro-batch there was time for.
    """
    set_up(device)
    torch.manual_seed(0)
    model = Transformer(shape).to(device)
    model.checkpoint_activations = run.checkpoint_activations
    compiled = device.startswith('cuda') if run.compile == 'auto' else run.compile
    forward = torch.compile(model, dynamic=False) if compiled else model
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
    while True:  # as many as a micro-batch has, if there is time for some of them
        idx = torch.randint(shape.vocab_size, (windows, shape.block_size), device=device)
        once = took(gradient)
        if windows == micro_batch() or once * 10 > seconds:
            break
        windows = min(micro_batch(), max(windows + 1, int(windows * min(seconds / 10 / once, 8))))
    gradients, steps, evaluations, began = [], [took(optimize)], [], time.perf_counter()
    while time.perf_counter() - began < 0.6 * seconds or len(gradients) < 2:
        gradients.append(took(gradient))
        steps.append(took(optimize))
        if len(evaluations) < 3 or sum(evaluations) < sum(gradients) / 5:
            evaluations.append(took(evaluate))
    tokens, median = windows * shape.block_size, lambda values: sorted(values)[len(values) // 2]
    rounds = tokens_per_step() / devices / tokens  # micro-batches of a step
    return tokens * rounds / (median(gradients) * rounds + median(steps)), tokens / median(evaluations), windows


def find_device(name):
    """(its name, FLOP/s, bytes) of a device in the table. Raises UserError for another."""
    def plain(text):
        return re.sub('[^a-z0-9]|rtx', '', text.lower())

    if name == 'here':
        device = pick_device(run.device)
        return f'this {name_of(device)}', product_rate(device, pick_dtype(run.dtype, device)), \
            device_memory * 1e9 or memory_limit(device)
    found = next((known for known in DEVICES if plain(known) == plain(name)), None)
    if not found:
        near = difflib.get_close_matches(plain(name), map(plain, DEVICES), 1, 0.5)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f"device_name='{name}' is none of {', '.join(DEVICES)}, here{hint}")
    peak, room = DEVICES[found]
    return found, peak, device_memory * 1e9 or room


def fits(parts, room):
    return sum(parts.values()) <= HEADROOM * room


def time_and_money(took):
    """Seconds in words, with what they cost."""
    return duration(took) + (f', ${took / 3600 * price * devices:,.2f} at ${price:g} an hour' +
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


def difference(of, n, d):
    """'0.123 lower': how much lower the loss of the best N and D for the same work is, by a law."""
    return f'{of.loss(n, d) - of.loss(*of.optimum(6 * n * d)):.3f} lower'


# ---- the best model for a budget

def budget():
    """(FLOPs that the budget buys, what that is in words)."""
    given = [name for name in ('flops', 'hours', 'dollars') if config[name]]
    if len(given) > 1:
        raise UserError(f'{" and ".join(given)} are budgets, of which one is enough; leave the others out')
    if flops:
        return flops, f'{flops:.3g} FLOPs'
    if not device_name or dollars and not price:
        raise UserError(f'{given[0]}={config[given[0]]:g} needs a --device_name' +
                        ' and a --price in dollars an hour' * bool(dollars))
    took = (hours or dollars / price / devices) * 3600
    name, peak, _ = find_device(device_name)
    bought = took * peak * devices * (mfu or USUAL_MFU)
    return bought, (f'{bought:.3g} FLOPs: {time_and_money(took)} on {devices} x {name}, {peak / 1e12:.3g} TFLOP/s, at an MFU '
                    f'of {mfu or USUAL_MFU:.0%}' + ', assumed' * (not mfu))


def nearest_shape(target):
    """
    The settings of a model of about `target` parameters: an even number of layers, heads of 64 channels (32 where it is
    narrower than 256), widths in multiples of 64 (128 from 512 on), and about 64 channels for each layer, as GPT-2 small.
    """
    best = None
    for width in (*range(64, 512, 64), *range(512, 8193, 128)):
        heads = width // (64 if width >= 256 else 32)
        shape = {'n_embd': width, 'n_head': heads, 'n_kv_head': heads // kv_groups if heads % kv_groups == 0 else heads,
                 'n_inner': 0}
        base, one = (build_like(shape | {'n_layer': layers}).count_parameters() for layers in (1, 2))
        for layers in {max(2, 2 * round((target - base) / (one - base) / 2 + more)) for more in (0, 0.5)}:
            size = base + (layers - 1) * (one - base)
            miss = abs(math.log(size / target)) + 0.2 * abs(math.log(width / layers / 64))
            if best is None or miss < best[0]:
                best = miss, shape | {'n_layer': layers}
        if base > 4 * target:
            break
    return best[1]


def build_like(shape):
    return build(settings | shape, settings['vocab_size'])


def choose():
    """Prints the best models for a budget by each law, and writes and draws what is wanted of them."""
    work, words = budget()
    if work < 1e9:
        raise UserError(f'the budget is {work:g} FLOPs, which trains nothing; 1 PFLOP is 1e15')
    print(words)
    table = [('law', 'parameters', 'tokens', 'each', 'loss', 'nearest shape', 'its size', 'its tokens')]
    for name, of in laws.items():
        n, d = of.optimum(work)
        shape = nearest_shape(n)
        model = build_like(shape)
        table.append((name, short(n), short(d), f'{d / n:.1f}', f'{of.loss(n, d):.3f}', in_layers(model.config),
                      short(model.count_parameters()), short(work / model.flops_per_token())))
        if name == law:
            chosen = model
    print(columns(table))
    print('(each: tokens per parameter; a loss is of the text and the tokenizer that the law was fitted on)')
    n = laws[law].optimum(work)[0]
    if chosen.count_parameters() > 1.3 * n:
        print(f'note: {short(n)} parameters are too few for a vocabulary of {settings["vocab_size"]:,}; a BPE of your own can '
              'be smaller: --vocab_size=4096')
    print(far_off())
    if write:
        write_config(work, words, chosen)
    if plot:
        draw_budgets(work)


def far_off():
    """How far published models are from the best use of the computation that they took."""
    table = [('model', 'parameters', 'tokens', 'each', 'FLOPs', 'best parameters', 'best tokens', 'best loss')]
    of = laws[law]
    for name, (n, d) in PUBLISHED.items():
        best = of.optimum(6 * n * d)
        table.append((name, short(n), short(d), f'{d / n:,.0f}', f'{6 * n * d:.2g}', *map(short, best), difference(of, n, d)))
    return columns(table)


CONFIG = '''\
"""
{parameters} parameters on {tokens} tokens, the best use of {work} FLOPs by a scaling law ({law}).

{prepare}    python train.py {path}

Written by plan.py for {words}.
Learning rate and batch are those of DeepSeek LLM's law (Bi et al. 2024, section 3.1), which was fitted from 1e17 FLOPs on.
"""
out_dir = 'out/{name}'
dataset = '{dataset}'
eval_interval = {often}
sample_interval = {at_times}

block_size = {block_size}
batch_size = {batch_size}
gradient_accumulation_steps = {accumulation}  # {step} tokens a step

vocab_size = {vocab_size}
{shape}

learning_rate = {learning_rate}
schedule = 'wsd'
warmup_iters = {warmup}
max_iters = {steps}
weight_decay = 0.1
beta2 = 0.95
'''


def write_config(work, words, model):
    """Writes a recipe for train.py, with the largest micro-batch that fits (without a device, into 24 GB)."""
    if os.path.exists(write):
        raise UserError(f"write='{write}' is there already; choose another, or remove it")
    if not write.endswith('.py') or not os.path.isdir(os.path.dirname(write) or '.'):
        raise UserError(f"write='{write}' is no name for a Python file in a folder that is there, such as config/mine.py")
    c, tokens = model.config, work / model.flops_per_token()
    batch = 0.2920 * work ** 0.3271 / c.block_size  # windows
    room = find_device(device_name)[2] if device_name else 24e9
    windows = 2 ** math.floor(math.log2(max(batch, 1)))
    while windows > 1 and not fits(costs.memory(model, windows, 'bfloat16', 'adamw', False), room):
        windows //= 2
    accumulation = max(round(batch / windows), 1)
    steps = max(round(tokens / (windows * accumulation * c.block_size)), 1)
    name = os.path.splitext(os.path.basename(write))[0]
    dataset = run.dataset if config.source['dataset'] != 'default' else 'fineweb_edu'
    keys = ['n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner', 'norm', 'mlp', 'pos', 'bias', 'tie_weights']
    write_whole(write, CONFIG.format(
        parameters=short(model.count_parameters()), tokens=short(tokens), work=f'{work:.3g}', path=write, words=words, law=law,
        prepare=f'    python prepare.py data/{dataset}.py\n' * os.path.exists(f'data/{dataset}.py'),
        name=name, dataset=dataset, block_size=c.block_size, vocab_size=c.vocab_size,
        batch_size=windows, accumulation=accumulation, step=f'{windows * accumulation * c.block_size:,}',
        shape='\n'.join(f'{key} = {getattr(c, key)!r}' for key in keys), learning_rate=f'{0.3118 * work ** -0.1250:.2g}',
        steps=f'{steps:_}', warmup=max(steps // 50, 10), often=max(steps // 20, 1), at_times=max(steps // 10, 1)).encode())
    print(f'{write}: {steps:,} steps of {windows * accumulation * c.block_size:,} tokens. See what it takes:\n'
          f'    python plan.py {write}' + f' --device_name={device_name}' * bool(device_name))


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


# ---- a scaling law of your own

def read_runs(pattern, setting):
    """The finished runs of a pattern, as (name, N, D, loss). Raises UserError where there is none, or their data differ."""
    found, left_out, data = [], [], {}
    for folder in sorted({path for part in pattern.split() for path in glob.glob(part) if os.path.isdir(path)}):
        loaded = checkpoint.peek(os.path.join(folder, 'ckpt.pt'))
        losses = [r['val_loss'] for r in checkpoint.read_log(folder, loaded['iter']) if 'val_loss' in r] if loaded else []
        if not losses or not 0 < loaded['config']['max_iters'] <= loaded['iter']:
            left_out.append(folder)
            continue
        n = build(loaded['model_config'], loaded['model_config']['vocab_size']).count_parameters()
        found.append((folder, n, loaded['tokens'], losses[-1]))
        hashes = {e['sha256'] for d in loaded['data'].values() for file, e in d['files'].items() if file.startswith('val')}
        data.setdefault(frozenset(hashes), []).append(folder)
    if left_out:
        print(f'left out, since not finished or without an evaluation: {", ".join(left_out)}')
    if not found:
        raise UserError(f"{setting}='{pattern}' finds no finished run with an evaluation; name folders such as 'out/sweep_*'")
    if len(data) > 1:
        one, other = list(data.values())[:2]
        raise UserError(f"{setting}='{pattern}': {one[0]} and {other[0]} were evaluated on other data; a law is of one text")
    return found


def fit_law():
    """Fits the law to the runs, prints it and what it says, and draws it."""
    runs, checks = read_runs(fit, 'fit'), read_runs(check, 'check') if check else []
    _, n, d, loss = zip(*runs)
    of, spread = scaling.fit(*map(scaling.np.array, (n, d, loss)))
    table = [('run', 'parameters', 'tokens', 'loss', 'by the law', 'difference')]
    for name, n, d, loss in runs:
        table.append((name, short(n), short(d), f'{loss:.4f}', f'{of.loss(n, d):.4f}', f'{loss - of.loss(n, d):+.4f}'))
    print(columns(table))
    print(('L(N, D) = E + A / N^alpha + B / D^beta: ' if of.A else 'L(D) = E + B / D^beta: ') + ', '.join(
        f'{name} {value:.4g} ({low:.4g} to {high:.4g})' for name, (value, low, high) in scaling.constants(of, spread).items()))
    print(f'(in brackets the middle 80% of {len(spread)} fits to runs drawn anew, with repetition)')

    def predicted(n, d):
        low, high = scaling.interval(other.loss(n, d) for other in spread)
        return f'{short(n)} parameters, {short(d)} tokens: {of.loss(n, d):.4f} predicted ({low:.4f} to {high:.4f})'

    for name, n, d, loss in checks:
        print(f'{name}, left out: {predicted(n, d)}, {loss:.4f} reached')
    if any(config.source[key] != 'default' for key in (*checkpoint.ModelConfig.__annotations__, 'max_iters') if key in config):
        n = build(config, vocabulary()).count_parameters()
        print(f'these settings: {predicted(n, run.max_iters * tokens_per_step())}')
    if plot and not (flops or hours or dollars):
        draw_law(of, spread, runs, checks)
    return of


def short_ticks(number, _):
    return short(number)


def draw_law(of, spread, runs, checks):
    """Draws the runs' losses by tokens, a curve of the law for each size, and the runs that were left out."""
    pyplot = import_pyplot(f"plot='{plot}'")
    figure, axes = pyplot.subplots(figsize=(9, 6), layout='constrained')
    sizes = sorted({n for _, n, _, _ in runs + checks})
    least, most = min(d for *_, d, _ in runs + checks), max(d for *_, d, _ in runs + checks)
    tokens = [least * (most / least * 2) ** (step / 60) / 1.2 for step in range(61)]
    for i, n in enumerate(sizes):
        fitted = any(n == other for _, other, _, _ in runs)
        axes.plot(tokens, [of.loss(n, d) for d in tokens], color=f'C{i}', linestyle='-' if fitted else '--')
        low, high = zip(*(scaling.interval(other.loss(n, d) for other in spread) for d in tokens))
        axes.fill_between(tokens, low, high, color=f'C{i}', alpha=0.15, linewidth=0)
        for group, mark, words in ((runs, 'o', ''), (checks, '*', ', not fitted')):
            here = [(d, loss) for _, other, d, loss in group if other == n]
            if here:
                axes.plot(*zip(*here), mark, color=f'C{i}', markersize=14 if mark == '*' else 6,
                          label=f'{short(n)} parameters{words}')
    axes.set(xscale='log', xlabel='training tokens D', ylabel='validation loss, nats per token',
             title='Runs (marks), their law (lines) and its uncertainty (80%)')
    axes.xaxis.set_major_formatter(short_ticks)
    axes.xaxis.set_minor_formatter(short_ticks)
    axes.legend()
    save(figure, plot)
    print(f'{plot}: the runs and their law')


# ---- what is wanted

for least, *names in ((0, 'mfu', 'price', 'device_memory', 'flops', 'hours', 'dollars', 'max_iters'),
                      (1, 'devices', 'batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'seconds')):
    for name in names:
        if config[name] < least:
            raise UserError(f'{name}={config[name]} is less than {least}')
if mfu > 1:
    raise UserError(f'mfu={mfu} is a share of the peak, such as 0.35')
if law == 'fit' and not fit:
    raise UserError("law='fit' needs runs: --fit='out/sweep_*'")
law = ('fit' if fit else 'besiroglu') if law == 'auto' else law
laws = dict(scaling.LAWS)
if fit:
    laws['fit'] = fit_law()
if flops or hours or dollars:
    # a model of the settings' kind; of those left at train.py's defaults, which are for bytes, GPT-2's vocabulary and context
    usual = {'vocab_size': 50304, 'block_size': 1024, 'n_kv_head': 0}
    settings = config | {key: value for key, value in usual.items() if config.source[key] == 'default'}
    settings['vocab_size'] = settings['vocab_size'] or 50304
    kv_groups = max(settings['n_head'] // (settings['n_kv_head'] or settings['n_head']), 1)
    choose()
elif not fit:
    describe()
