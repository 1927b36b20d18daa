"""
From a model's logits to text: sampling, batches of prompts, streams, and what makes it fast.

    writer = Writer(model, tokenizer, 'cpu', 'bfloat16')
    prompts = [tokenizer.beginning(text) for text in ('Once', 'In the bakery')]
    for row, text, ended in writer.write(prompts, Sampling(temperature=0), seeds=[1, 2]):
        ...                                  # what the row goes on with: whole characters, never a part of a stop

It is a ladder of small functions: logits → probabilities → the next token → prefill and decode → ids → text.
"""

import itertools
import math
import sys
import types
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F

from attention import KVCache
from configurator import UserError
from device import not_compiled

NUMBERS = itertools.count()


@dataclass
class Sampling:
    """How the next token is drawn, and when to stop. Raises UserError for what is out of range."""

    max_new_tokens: int = 1000
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple = ()  # texts that end a sample, and are not part of it

    def __post_init__(self):
        for name, ok, rule in (('max_new_tokens', self.max_new_tokens >= 0, '0 or more'),
                               ('temperature', 0 <= self.temperature < math.inf, '0 or more'),
                               ('top_k', self.top_k >= 0, '0 or more'),
                               ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
                               ('min_p', 0 <= self.min_p <= 1, 'from 0 to 1'),
                               ('repetition_penalty', 0.01 <= self.repetition_penalty <= 100, 'from 0.01 to 100')):
            if not ok:
                raise UserError(f'{name}={getattr(self, name)} must be {rule}')

    @classmethod
    def of(cls, settings):
        """From settings of the same names; `stop` holds several texts with | between them."""
        chosen = {field.name: settings[field.name] for field in fields(cls)}
        stops = chosen['stop'].replace('\\n', '\n').split('|')
        return cls(**chosen | {'stop': tuple(text for text in stops if text)})


# ---- logits → probabilities → the next token

def penalize(logits, seen, penalty):
    """Logits (B, V) of the tokens `seen` (B, V) already, made smaller by `penalty` (Keskar et al. 2019, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """
    Logits (B, V) → probabilities (B, V), in this order: divided by `temperature` (0 puts everything on the largest); all
    but the `top_k` largest set to 0 (0 = none); then all beyond the smallest set that holds `top_p` of the mass (Holtzman
    et al. 2020); then all less than `min_p` times the largest (Nguyen et al. 2024).
    """
    if temperature < 1e-6:
        largest = logits.amax(-1, keepdim=True)
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float() + (largest - largest)  # nan for `draw`, if not finite
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: nothing overflows
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        for k in (1024, p.size(-1)):  # where the likeliest thousand suffice, not all are put in order
            ordered, order = p.topk(min(k, p.size(-1)))
            if (ordered.sum(-1) >= top_p).all():
                break
        kept = ordered.cumsum(-1) - ordered < top_p  # unless the mass before a token already suffices
        p = torch.zeros_like(p).scatter(-1, order, ordered * kept)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True) if top_p < 1 or min_p > 0 else p


def draw(p, generators):
    """
    Probabilities (B, V) → a token for each row (B,): where the sum of probabilities passes a number drawn by the row's own
    generator, of the CPU on every device. (torch.multinomial draws a number for each of V.)
    """
    mass = (p.cpu() if p.is_mps else p).double().cumsum(-1)
    if not mass[:, -1].isfinite().all():
        raise UserError("the model's logits are not finite numbers; if dtype is float16 they overflow: use --dtype=float32")
    chance = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    return torch.searchsorted(mass, (chance.to(mass.device) * mass[:, -1])[:, None], right=True)[:, 0].to(p.device)


# ---- contexts → logits

def window_start(n, block_size):
    """
    Where the context of a text of `n` tokens begins: at 0 as long as it fits; then the oldest quarter of `block_size`
    drops out at once, each time that it is full again, and the rest is read anew. So it is read seldom, and never holds
    less than three quarters of what the model can see.
    """
    quarter = max(1, block_size // 4)
    return max(0, -(-(n - block_size) // quarter)) * quarter


def logits_after(model, idx, where, mask, cache):
    """Reads ids (B, T) at the places that `cache.advance` gave → logits (B, V) of what follows the last."""
    return model.lm_head(model.hidden(idx, where, mask, cache)[:, -1:])[:, 0]


def prefill(model, contexts, size, static=False):
    """
    Reads whole contexts (a list of ids for each row) → logits (B, V) of what follows, and a cache of `size` slots that
    holds them. Shorter rows are padded on their left, where no token sees it; equal rows are read once.
    """
    same = all(context == contexts[0] for context in contexts[1:])
    read, device = contexts[:1] if same else contexts, model.wte.weight.device
    # attention on CPUs is faster in float32 than in bfloat16, and more so the longer the context (LOG.md)
    dtype = torch.float32 if device.type == 'cpu' else model.wte.weight.dtype
    cache = KVCache(model.config, len(read), size, dtype, device, static)
    lengths = [len(context) for context in read]
    longest = max(lengths)
    if min(lengths) < longest:
        cache.padding = torch.tensor([longest - n for n in lengths], device=device)
    idx = torch.tensor([[0] * (longest - len(context)) + context for context in read], device=device)
    logits = logits_after(model, idx, *cache.advance(longest), cache)
    if len(read) < len(contexts):
        cache.repeat(len(contexts))
    return logits.expand(len(contexts), -1), cache


@torch.inference_mode()
def generate(model, prompts, sampling, generators, unknown=None, step=None):
    """
    Continues each of `prompts` (lists of ids, of any lengths) by up to `sampling.max_new_tokens`, yielding the next ids,
    one for each row, at a time. What a row is given does not depend on the other rows.

    `generators`: one for each row; `unknown` (V,): True for ids that are never drawn; `step`: `logits_after` for single
    tokens, compiled, of shapes that never change.
    """
    rows, block_size, device = [list(prompt) for prompt in prompts], model.config.block_size, model.wte.weight.device
    penalizes = sampling.repetition_penalty != 1
    if penalizes:
        seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, of_row in zip(rows, seen):
            of_row[row] = True
    size = max(map(len, rows)) + sampling.max_new_tokens
    if step:
        size = max(256, 1 << (size - 1).bit_length())  # few sizes: each is compiled anew
    starts = tokens = None
    for _ in range(sampling.max_new_tokens):
        former, starts = starts, [window_start(len(row), block_size) for row in rows]
        if starts != former:
            contexts = [row[start:] for row, start in zip(rows, starts)]
            logits, cache = prefill(model, contexts, min(size, block_size), static=step is not None)
        else:
            logits = (step or logits_after)(model, tokens[:, None], *cache.advance(1), cache)
        if unknown is not None:
            logits = logits.masked_fill(unknown, -math.inf)
        if penalizes:
            logits = penalize(logits, seen, sampling.repetition_penalty)
        p = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        tokens = draw(p, generators)
        if penalizes:
            seen.scatter_(1, tokens[:, None], True)
        for row, token in zip(rows, tokens.tolist()):
            row.append(token)
        yield [row[-1] for row in rows]


# ---- ids → text

def until_stop(stream, stops):
    """
    A function from the next id to (the text that it completes, whether a stop has come). What may be the beginning of
    one of `stops` is held back until it is not; an id of None gives what is still held.
    """
    held = ''

    def text_of(i):
        nonlocal held
        if i is None:
            return held, True
        held += stream(i)
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            return held[:min(found)], True
        waits = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        text, held = held[:len(held) - waits], held[len(held) - waits:]
        return text, False

    return text_of


def unknown_ids(tokenizer, model):
    """(V,): True for the ids that the model has and the tokenizer does not, such as rows that pad the vocabulary; or None."""
    unknown = torch.ones(model.config.vocab_size, dtype=torch.bool)
    unknown[[i for i in tokenizer.known_ids() if i < len(unknown)]] = False
    return unknown.to(model.wte.weight.device) if unknown.any() else None


class Writer:
    """A model with its tokenizer, made ready to write: on a device, in a precision, compiled or not."""

    def __init__(self, model, tokenizer, device='cpu', dtype='float32', compile=False):
        """
        Takes `model` over: its weights are converted, and laid out as generation reads them fastest. `dtype` 'int8' is for
        CPUs: 8 bits for a weight, and for an activation within a product.
        """
        if dtype == 'int8' and compile:
            raise UserError("dtype='int8' is not compiled; leave out compile, or use --dtype=bfloat16")
        if dtype == 'int8' and device != 'cpu':
            raise UserError(f"dtype='int8' is for CPUs, and device is {device}; use --dtype=bfloat16, or --device=cpu")
        self.tokenizer, self.device = tokenizer, device
        self.model = fast_linears(model.eval().to(device), dtype, compile)
        self.step = compiled_step(device) if compile else None
        self.unknown = unknown_ids(tokenizer, self.model)

    def write(self, prompts, sampling, seeds, stop_ids=None, begins=False):
        """
        Continues prompts (lists of ids), all in one batch; yields (row, text, ended) for each token of each row that has
        not ended. The text is whole characters, possibly none. A row ends at `stop_ids` (default: the tokenizer's), at one of
        `sampling.stop`, or at its last token. `begins`: nothing that is text comes before.
        """
        n_ids = self.model.config.vocab_size
        for i in (i for prompt in prompts for i in prompt):
            if i >= n_ids:
                raise UserError(f'the prompt holds token {i} of the tokenizer {self.tokenizer.name}, and the model knows only '
                                f'the ids below {n_ids}')
        stop_ids = set(self.tokenizer.stop_ids()) if stop_ids is None else stop_ids
        texts = [until_stop(self.tokenizer.stream(begins), sampling.stop) for _ in prompts]
        generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        going = set(range(len(prompts)))
        steps = generate(self.model, prompts, sampling, generators, self.unknown, self.step)
        for n in range(1, sampling.max_new_tokens + 1):
            try:
                ids = next(steps)
            except RuntimeError as e:  # CPUs have no kind of their own for it
                if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
                    raise
                raise UserError(f'{len(prompts)} texts of up to {sampling.max_new_tokens:,} tokens at once need more memory '
                                f'than there is on {self.device}; ask for fewer, or for shorter ones') from None
            for row in sorted(going):
                stopped = ids[row] in stop_ids
                text, ended = texts[row](None if stopped else ids[row])
                if not ended and n == sampling.max_new_tokens:
                    text, ended = text + texts[row](None)[0], True
                if ended:
                    going.remove(row)
                yield row, text, ended
            if not going:
                return


# ---- what makes it fast

class PackedLinear(nn.Module):
    """
    nn.Linear with its weights laid out in oneDNN's own order, by the operators that torch.compile uses for it. For a
    single row, which is all reading, it is 1.3 to 2 times as fast on x86 (LOG.md).
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, 'none', [], '')


class DotLinear(nn.Module):
    """nn.Linear, written as products and sums where one row is compiled: the compiler's loop reads at memory's full speed."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        if not torch.compiler.is_compiling() or x.numel() > x.size(-1):
            return F.linear(x, self.weight, self.bias)
        y = (self.weight.float() * x.float().flatten()).sum(-1)
        return (y if self.bias is None else y + self.bias).type_as(x).view(*x.shape[:-1], -1)


def fast_linears(model, dtype, compile):
    """The model with its parameters in `dtype` (constants stay float32); on CPUs its linear layers are made to be read fast."""
    if dtype == 'int8':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # deprecated for torchao, which is slower here when not compiled
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
            return quantize_dynamic(model.float(), {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
    for p in model.parameters():
        p.data = p.data.to(getattr(torch, dtype))
    if model.wte.weight.device.type != 'cpu':
        return model
    packs = torch.backends.mkldnn.is_available() and (
        dtype == 'float32' or dtype == 'bfloat16' and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and compile:
                setattr(module, name, DotLinear(child))
            elif isinstance(child, nn.Linear) and packs and child.weight.numel() >= 2**18:  # below, the call itself costs more
                setattr(module, name, PackedLinear(child))
    return model


def compiled_step(device):
    """`logits_after`, compiled anew for each size of batch and cache; as it is, and said, where compiling does not work."""
    if device == 'cpu':
        # a norm or an activation is computed once, not anew in each sum over a row of weights; the kernels are called from C++
        how = {'options': {'realize_opcount_threshold': 0, 'realize_reads_threshold': 0, 'cpp_wrapper': True}}
        if hasattr(torch.compiler, 'skip_guard_on_all_nn_modules_unsafe'):  # the model does not change any more
            how['options']['guard_filter_fn'] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    else:
        how = {'mode': 'reduce-overhead'}  # CUDA graphs
    # a function of its own for each model: what is compiled belongs to its code, and no guard tells two models apart
    code = logits_after.__code__.replace(co_name=f'logits_after_{next(NUMBERS)}')
    step = torch.compile(types.FunctionType(code, globals()), dynamic=False, **how)

    def try_step(*inputs):
        nonlocal step
        try:
            return step(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # of any kind
            if step is logits_after:
                raise
            print(not_compiled(e), file=sys.stderr)
            step = logits_after
            return step(*inputs)

    return try_step
