"""
One Transformer that is GPT-2 or Llama by a few switches.

    GPT-2   norm='layernorm' mlp='gelu'   pos='learned' bias=True  tie_weights=True     Radford et al. 2019
    Llama   norm='rmsnorm'   mlp='swiglu' pos='rope'    bias=False n_kv_head<n_head     Touvron et al. 2023
    Mistral the same with sliding_window                                                Jiang et al. 2023

Shapes are written with these letters:

    B    batch, sequences                nh   query heads, `n_head`
    T    time, tokens in a sequence      nkv  key/value heads, `n_kv_head`
    S    tokens that a query may see     hs   head size, C / nh
    C    channels, `n_embd`              V    vocabulary, `vocab_size`

`where` are the tokens' positions, a slice, (T,) or (B, T); a `mask` is what each query sees, True = seen, None = itself and all
before it.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from attention import attention, separate_texts, visible
from loss import CRITERIA, token_nats

# far beyond any model, and few enough that a file which claims them is refused before memory is asked for
MOST = {'block_size': 2**24, 'vocab_size': 2**24, 'n_layer': 2**12, 'n_head': 2**12, 'n_embd': 2**18, 'n_inner': 2**20}


@dataclass
class ModelConfig:
    """The model's shape. Raises ValueError, with both numbers, for a shape that cannot be built."""

    block_size: int = 1024      # longest context, tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0          # 0 = n_head; fewer is grouped-query attention (Ainslie et al. 2023)
    n_embd: int = 768
    n_inner: int = 0            # width of the feed-forward; 0 = 4 * n_embd, or for swiglu 8/3 of it, in multiples of 64
    norm: str = 'layernorm'     # layernorm | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = 'gelu'           # gelu | swiglu
    pos: str = 'learned'        # learned | rope
    rope_theta: float = 10000.0
    rope_scaling: str = ''      # linear:FACTOR | llama3:FACTOR,LOW,HIGH,CONTEXT (see rope_frequencies)
    sliding_window: int = 0     # tokens that attention reaches back, its own included; 0 = all
    bias: bool = True           # in the linear layers and in layernorm
    tie_weights: bool = True    # the output layer is the token embedding
    dropout: float = 0.0
    init_std: float = 0.02
    zero_init: bool = False     # what writes into the residual stream starts at zero

    def __post_init__(self):
        for field in fields(self):
            name, value, kind = field.name, getattr(self, field.name), field.type
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f'{name} {value!r:.80} is no {kind.__name__}')
            if kind in (int, float) and not abs(value) <= MOST.get(name, 2**53):  # nor is what is not a number
                raise ValueError(f'{name} {value!r} is more than {MOST.get(name, 2**53)}')
        for least, *names in ((1, 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'rope_theta'),
                              (0, 'n_kv_head', 'n_inner', 'init_std', 'norm_eps', 'sliding_window')):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f'{name} {getattr(self, name)} is less than {least}')
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_inner == 0:
            self.n_inner = 4 * self.n_embd if self.mlp == 'gelu' else 64 * math.ceil(self.n_embd * 8 / 3 / 64)
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not divisible by n_head {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}')
        if self.pos == 'rope' and self.head_size % 2:
            raise ValueError(f"pos='rope' turns pairs of dimensions, but n_embd {self.n_embd} / n_head {self.n_head} "
                             f'makes heads of {self.head_size}')
        if self.pos == 'rope' and self.block_size * self.head_size > 2**27:
            raise ValueError(f'block_size {self.block_size} with heads of {self.head_size} makes a gigabyte of angles')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout {self.dropout} is not within 0 <= dropout < 1')
        parse_rope_scaling(self.rope_scaling)
        for name, known in (('norm', NORMS), ('mlp', MLPS), ('pos', POSITIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} {getattr(self, name)!r} is none of {", ".join(known)}')

    @property
    def head_size(self):
        return self.n_embd // self.n_head


class LayerNorm(nn.LayerNorm):
    """Zero mean, unit variance over the channels (Ba et al. 2016); the bias is a switch."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.Module):
    """Unit root mean square over the channels (Zhang and Sennrich 2019)."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        # Plain operations, which a compiler fuses; on CPUs nn.RMSNorm's backward is slower than theirs (see LOG.md).
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


class LearnedPositions(nn.Module):
    """A vector for each position, added to the tokens' embeddings once; queries and keys stay as they are."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.block_size, config.n_embd))

    def embed(self, x, where):
        return x + self.weight[where]

    def rotation(self, where):
        return None

    @staticmethod
    def rotate(x, rotation):
        return x


def parse_rope_scaling(text):
    """'linear:2' → ('linear', [2.0]), '' → ('', []). Raises ValueError for what is no scaling."""
    kind, _, numbers = text.partition(':')
    try:
        numbers = [float(n) for n in numbers.split(',')] if text else []
        right = kind == 'linear' and len(numbers) == 1 or kind == 'llama3' and len(numbers) == 4 and numbers[1] < numbers[2]
        right = right and all(map(math.isfinite, numbers))
    except ValueError:
        right = False
    if text and not (right and numbers[0] >= 1):
        raise ValueError(f'rope_scaling {text!r} is neither linear:FACTOR nor llama3:FACTOR,LOW,HIGH,CONTEXT, with a factor '
                         'of 1 or more and LOW below HIGH')
    return kind, numbers


def rope_frequencies(config):
    """
    The angle, in radians per token, by which each pair of dimensions turns (hs/2,). `rope_scaling` slows them down, so
    that a model reaches further than the context it was first trained with:

    linear:FACTOR                   all of them (Chen et al. 2023)
    llama3:FACTOR,LOW,HIGH,CONTEXT  those that turn less than LOW times within CONTEXT tokens; not those that turn more
                                    than HIGH times; in between, partly (Grattafiori et al. 2024, and Llama 3.1's code)
    """
    frequency = 1 / config.rope_theta ** (torch.arange(0, config.head_size, 2).float() / config.head_size)
    kind, numbers = parse_rope_scaling(config.rope_scaling)
    if kind == 'linear':
        frequency = frequency / numbers[0]
    if kind == 'llama3':
        factor, low, high, context = numbers
        turns = context * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    return frequency


class RotaryPositions(nn.Module):
    """
    Queries and keys are turned by angles that grow with their position, so that their products depend on distances
    only (Su et al. 2021, eq. 34). Dimension i is paired with i + hs/2, which is Hugging Face's layout.
    """

    def __init__(self, config):
        super().__init__()
        angle = torch.outer(torch.arange(config.block_size).float(), rope_frequencies(config))  # (block_size, hs/2)
        self.register_buffer('cos', angle.cos().repeat(1, 2), persistent=False)  # both (block_size, hs)
        self.register_buffer('sin', torch.cat((-angle.sin(), angle.sin()), dim=-1), persistent=False)

    def embed(self, x, where):
        return x

    def rotation(self, where):
        return self.cos[where].unsqueeze(-2), self.sin[where].unsqueeze(-2)  # (T, 1, hs) or (B, T, 1, hs)

    @staticmethod
    def rotate(x, rotation):
        # the halves (a, b) become (a cos - b sin, b cos + a sin): roll swaps them, and `sin` holds the minus
        cos, sin = rotation
        return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).type_as(x)


class Attention(nn.Module):
    """Causal self-attention; `n_head / n_kv_head` query heads share each key and value head."""

    def __init__(self, config, layer):
        super().__init__()
        nh, nkv, hs = config.n_head, config.n_kv_head, config.head_size
        self.layer = layer  # its number, by which the cache knows it
        self.heads = (nh, nkv)
        self.head_size = hs
        self.dropout = config.dropout
        self.rotate = POSITIONS[config.pos].rotate
        self.c_attn = nn.Linear(config.n_embd, (nh + 2 * nkv) * hs, bias=config.bias)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation, mask, cache):
        B, T, C = x.shape
        nh, nkv = self.heads
        qk, v = self.c_attn(x).view(B, T, -1, self.head_size).split((nh + nkv, nkv), dim=2)  # (B, T, nh + nkv or nkv, hs)
        q, k = self.rotate(qk, rotation).split((nh, nkv), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh or nkv, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # a cache may keep another precision than x has
        y = attention(q.type_as(k), k, v, mask, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C).type_as(qk)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class GELUMLP(nn.Module):
    """GPT-2's feed-forward, with the tanh form of GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.resid_dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))


class SwiGLUMLP(nn.Module):
    """Llama's feed-forward: down(silu(gate(x)) * up(x)), where `c_proj` is down (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.c_gate_up = nn.Linear(config.n_embd, 2 * config.n_inner, bias=config.bias)  # both in one product
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.c_gate_up(x).chunk(2, dim=-1)
        return self.resid_dropout(self.c_proj(F.silu(gate) * up))


NORMS = {'layernorm': LayerNorm, 'rmsnorm': RMSNorm}
MLPS = {'gelu': GELUMLP, 'swiglu': SwiGLUMLP}
POSITIONS = {'learned': LearnedPositions, 'rope': RotaryPositions}


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream after."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm_1 = NORMS[config.norm](config)
        self.attn = Attention(config, layer)
        self.norm_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x, rotation, mask, cache):
        x = x + self.attn(self.norm_1(x), rotation, mask, cache)
        x = x + self.mlp(self.norm_2(x))
        return x


class Transformer(nn.Module):
    """Token ids → logits: embedding, `n_layer` blocks, norm, output layer. `config` is a ModelConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = POSITIONS[config.pos](config)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm_f = NORMS[config.norm](config)
        self.checkpoint_activations = False
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight  # Press and Wolf 2017
        self._init_weights()

    @classmethod
    def without_weights(cls, config):
        """The shapes only, on torch's meta device: to count them, to compare, or to fill them."""
        with torch.device('meta'):
            return cls(config)

    @classmethod
    def from_weights(cls, config, weights):
        """The model that holds these weights (name → tensor) themselves: no others are drawn first, and none are copied."""
        model = cls.without_weights(config)
        model.load_state_dict(weights, assign=True)
        if config.pos == 'rope':  # its constants are in no state_dict
            model.positions = RotaryPositions(config)
        if config.tie_weights:
            model.lm_head.weight = model.wte.weight
        return model

    @torch.no_grad()
    def _init_weights(self):
        """
        Normal with `init_std`; what writes into the residual stream, 1/sqrt(2 n_layer) of it (GPT-2, section 2.3), or, with
        `zero_init`, zero: at first each block passes on what it gets (Zhang et al. 2019).
        """
        c = self.config
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.0 if c.zero_init else c.init_std / math.sqrt(2 * c.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=c.init_std)

    def forward(self, idx, targets=None, reduction='mean', cache=None, criterion='cross_entropy', begins=None):
        """
        Token ids `idx` (B, T) → logits (B, T, V); with `targets` (B, T), where -1 does not count, a loss:

        reduction   'mean' or 'sum' over the targets: a scalar; 'none': the cross-entropy of each (B, T)
        criterion   what the scalar is, by its name in loss.py; cross-entropy is in nats
        cache       a KVCache: `idx` goes on from what it holds
        begins      (B, T), True where a text begins that is not to see those before it

        Raises ValueError if T is more than `block_size`, or than the cache has room for.
        """
        T, window = idx.size(1), self.config.sliding_window
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens are more than block_size {self.config.block_size}')
        where, mask = slice(0, T), None
        if cache is not None:
            where, mask = cache.advance(T)
        elif begins is not None:
            where, mask = separate_texts(begins, window)
        elif 0 < window < T:
            mask = visible(torch.arange(T, device=idx.device), torch.arange(T, device=idx.device), window)
        x = self.hidden(idx, where, mask, cache)
        if targets is None:
            return self.lm_head(x)
        if reduction == 'none':
            return token_nats(x.flatten(0, 1), self.lm_head.weight, targets.flatten()).view_as(targets)
        loss = CRITERIA[criterion](x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return loss / (targets >= 0).sum() if reduction == 'mean' else loss

    def hidden(self, idx, where, mask, cache=None):
        """
        Token ids (B, T) → the states that the output layer reads (B, T, C). `where`: the tokens' positions, a slice, (T,)
        or (B, T); `mask`: what each attends to, None = all up to itself.
        """
        x = self.drop(self.positions.embed(self.wte(idx), where))
        rotation = self.positions.rotation(where)
        for block in self.h:
            if self.checkpoint_activations and torch.is_grad_enabled():
                # only x is kept, and the block is computed again in the backward pass (Chen et al. 2016)
                x = recompute(block, x, rotation, mask, cache, use_reentrant=False)
            else:
                x = block(x, rotation, mask, cache)
        return self.norm_f(x)

    def count_parameters(self):
        """Parameters, with a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """FLOPs for a token's forward and backward pass: 6 N + 12 L nh hs T (PaLM, Chowdhery et al. 2022, appendix B)."""
        c = self.config
        matrices = self.count_parameters() - (c.block_size * c.n_embd if c.pos == 'learned' else 0)
        matrices -= 0 if c.tie_weights else c.vocab_size * c.n_embd  # looking up an embedding multiplies nothing
        reach = min(c.sliding_window or c.block_size, c.block_size)
        return 6 * matrices + 12 * c.n_layer * c.n_embd * reach
