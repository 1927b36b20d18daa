"""
One Transformer that is GPT-2 or Llama by a few switches.

    GPT-2   norm='layernorm' mlp='gelu'   pos='learned' bias=True  tie_weights=True     Radford et al. 2019
    Llama   norm='rmsnorm'   mlp='swiglu' pos='rope'    bias=False n_kv_head<n_head     Touvron et al. 2023
    Mistral the same with sliding_window                                                Jiang et al. 2023

Shapes are written with these letters:

    B    batch, sequences                nh   query heads, `n_head`
    T    time, tokens in a sequence      nkv  key/value heads, `n_kv_head`
    C    channels, `n_embd`              hs   head size, C / nh
    V    vocabulary, `vocab_size`
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


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

    def __post_init__(self):
        for least, *names in ((1, 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'),
                              (0, 'n_kv_head', 'n_inner', 'init_std', 'norm_eps', 'rope_theta', 'sliding_window')):
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

    def embed(self, x):
        return x + self.weight[:x.size(1)]

    def rotate(self, q, k):
        return q, k


def parse_rope_scaling(text):
    """'linear:2' → ('linear', [2.0]), '' → ('', []). Raises ValueError for what is no scaling."""
    kind, _, numbers = text.partition(':')
    try:
        numbers = [float(n) for n in numbers.split(',')] if text else []
        right = kind == 'linear' and len(numbers) == 1 or kind == 'llama3' and len(numbers) == 4 and numbers[1] < numbers[2]
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
        angle = torch.outer(torch.arange(config.block_size).float(), rope_frequencies(config)).repeat(1, 2)  # (block_size, hs)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)

    def embed(self, x):
        return x

    def rotate(self, q, k):
        T = q.size(2)
        cos, sin = self.cos[:T], self.sin[:T]  # (T, hs)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


def sliding_mask(T, window, device):
    """Which keys (columns) each query sees: itself and the `window` - 1 before it, (T, T); None where that is all."""
    if not 0 < window < T:
        return None
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window)


class Attention(nn.Module):
    """Causal self-attention; `n_head / n_kv_head` query heads share each key and value head."""

    def __init__(self, config):
        super().__init__()
        hs = config.head_size
        self.sizes = [config.n_head * hs, config.n_kv_head * hs, config.n_kv_head * hs]
        self.head_size = hs
        self.grouped = config.n_kv_head < config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=config.bias)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, mask):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nh or nkv, T, hs)
                   for part in self.c_attn(x).split(self.sizes, dim=-1))
        q, k = positions.rotate(q, k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GELU(nn.Module):
    """GPT-2's feed-forward, with the tanh form of GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.resid_dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))


class SwiGLU(nn.Module):
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
MLPS = {'gelu': GELU, 'swiglu': SwiGLU}
POSITIONS = {'learned': LearnedPositions, 'rope': RotaryPositions}


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream after."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = NORMS[config.norm](config)
        self.attn = Attention(config)
        self.norm_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x, positions, mask):
        x = x + self.attn(self.norm_1(x), positions, mask)
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
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = NORMS[config.norm](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight  # Press and Wolf 2017
        self._init_weights()

    @classmethod
    def from_weights(cls, config, weights):
        """The model that holds these weights (name → tensor) themselves: no others are drawn first, and none are copied."""
        with torch.device('meta'):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        if config.pos == 'rope':  # its constants are in no state_dict
            model.positions = RotaryPositions(config)
        if config.tie_weights:
            model.lm_head.weight = model.wte.weight
        return model

    @torch.no_grad()
    def _init_weights(self):
        """Normal with `init_std`; what writes into the residual stream, 1/sqrt(2 n_layer) of it (GPT-2, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=self.config.init_std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=self.config.init_std)

    def forward(self, idx, targets=None, reduction='mean'):
        """
        Token ids `idx` (B, T) → logits (B, T, V); with `targets` (B, T), a scalar: the cross-entropy in nats, its mean
        or its sum (`reduction`) over the targets that are not -1.

        Raises ValueError if T is more than `block_size`.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(f'{idx.size(1)} tokens are more than block_size {self.config.block_size}')
        mask = sliding_mask(idx.size(1), self.config.sliding_window, idx.device)
        x = self.drop(self.positions.embed(self.wte(idx)))  # (B, T, C)
        for block in self.h:
            x = block(x, self.positions, mask)
        logits = self.lm_head(self.norm_f(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)

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


# Generation is a ladder: logits → probabilities → the next token → a sequence of them.

def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """
    Logits (B, V) → probabilities (B, V), all but the `top_k` largest (0 = all) and all beyond the smallest set that
    holds `top_p` of the mass (Holtzman et al. 2020) set to 0. A temperature of 0 puts everything on the largest.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already suffices
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, vocab_size=None, generator=None):
    """
    Continues `idx` (B, T) by up to `max_new_tokens`, yielding the next ids (B,) one at a time; the context is the last
    `block_size` tokens. Ids from `vocab_size` on, rows that only pad the model's vocabulary, are never drawn.
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size:])[:, -1, :vocab_size]  # (B, V)
        p = probabilities(logits, temperature, top_k, top_p)
        nxt = torch.multinomial(p, 1, generator=generator)  # (B, 1)
        idx = torch.cat((idx, nxt), dim=1)
        yield nxt[:, 0]
