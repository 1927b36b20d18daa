"""
What a token may see of others: masks, the cache of keys and values, and attention itself. Shapes as in model.py.
"""

import torch
from torch.nn import functional as F


def visible(queries, keys, window):
    """
    Which keys each query sees, by their positions (T,) and (S,): itself, those before it, and of these the nearest
    `window` only, itself included (0 = all); (T, S), True where it sees.
    """
    distance = queries[:, None] - keys
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def separate_texts(begins, window):
    """
    Where texts begin in a batch of rows (B, T) → the tokens' positions, counted in their own text (B, T), and the mask by
    which none sees another text (B, 1, T, T).
    """
    place = torch.arange(begins.size(1), device=begins.device)
    start = torch.where(begins, place, 0).cummax(1).values
    mask = visible(place, place, window) & (place >= start[:, :, None])
    return place - start, mask[:, None]


class KVCache:
    """
    The keys and values of the tokens that a model has read, so that it need not read them again: `model(idx,
    cache=cache)` reads only what is new, and its logits are those of the whole text (Pope et al. 2022).

    A row's tokens stand in consecutive slots. All rows end in the same slot; a shorter row begins in a later one, and the
    slots before it are padding.
    """

    def __init__(self, config, batch_size, size, dtype=torch.float32, device='cpu', static=False):
        """
        `size`: slots, at most `block_size`; `dtype`: of what is kept. `static`: single tokens are read with shapes that
        never change, over all slots, which is what a compiler wants.
        """
        shape = (batch_size, config.n_kv_head, size, config.head_size)
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)] for _ in 'kv')
        self.slots = torch.arange(size, device=device)
        self.window, self.static = config.sliding_window, static
        self.length, self.padding = 0, None  # slots in use; padding slots before each row (B,), None = none at all

    def advance(self, T):
        """
        Makes room for T tokens in the next slots → their positions, which index a tensor's first dimension, and the mask
        of the slots that they see, None if each sees all up to itself. Raises ValueError if there is no room.
        """
        start, size = self.length, len(self.slots)
        if start + T > size:
            raise ValueError(f'{start} tokens and {T} more are beyond the {size} slots of the cache')
        self.length += T
        static = self.static and T == 1
        self.reach = size if static else self.length  # slots that attention reads
        self.at = self.slots[start:start + 1].clone() if static else slice(start, self.length)  # those written to
        windowed = 0 < self.window < self.length
        if self.padding is None and not (static or windowed or T > 1 and start):
            return self.at, None
        queries, keys = self.slots[start:self.length], self.slots[:self.reach]
        mask = visible(queries, keys, self.window)
        if self.padding is None:
            return self.at, mask
        # a padding slot sees itself: a query that sees nothing would be not a number
        mask = mask & (keys >= self.padding[:, None, None]) | (keys == queries[:, None])  # (B, T, reach)
        return (queries - self.padding[:, None]).clamp(min=0), mask[:, None]

    def append(self, layer, k, v):
        """A layer's new keys and values (B, nkv, T, hs) go into their slots → all of them (B, nkv, reach, hs)."""
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept[:, :, self.at] = new.to(kept.dtype)
        return self.k[layer][:, :, :self.reach], self.v[layer][:, :, :self.reach]

    def repeat(self, batch_size):
        """The only row becomes so many."""
        self.k, self.v = ([kept.repeat(batch_size, 1, 1, 1) for kept in part] for part in (self.k, self.v))


def repeat_heads(x, nh):
    """Key or value heads (B, nkv, S, hs), each as often as query heads share it → (B, nh, S, hs)."""
    return x if x.size(1) == nh else x.repeat_interleave(nh // x.size(1), dim=1)


ATTENTION_BLOCK = 256  # queries


def attention_in_blocks(q, k, v, mask=None, size=ATTENTION_BLOCK):
    """
    Causal attention, softmax(q kᵀ / √hs) v, of q (B, nh, T, hs) and k, v (B, nkv, T, hs), a block of queries after the
    other and each with the keys up to its end, or those of them that a `mask` shows. For training in bfloat16 on CPUs: there
    the backward pass of torch's own takes up to seven times as long (see LOG.md). (T² + size T) / 2 scores of each head are
    kept for it.
    """
    T = q.size(2)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    q = q * q.size(-1) ** -0.5
    unseen = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1) if mask is None else ~mask
    y = []
    for start in range(0, T, size):
        end = start + size
        scores = (q[:, :, start:end] @ k[:, :, :end].transpose(2, 3)).masked_fill(unseen[..., start:end, :end], float('-inf'))
        y.append(scores.softmax(-1) @ v[:, :, :end])
    return torch.cat(y, dim=2)


def attention(q, k, v, mask=None, dropout=0.0):
    """
    softmax(q kᵀ / √hs) v of queries (B, nh, T, hs) and keys and values (B, nkv, S, hs): causal, or by the `mask` of what
    each query sees.
    """
    T, causal = q.size(2), mask is None and q.size(2) > 1
    trains_on_cpu = torch.is_grad_enabled() and q.device.type == 'cpu'
    if trains_on_cpu and q.dtype == torch.bfloat16 and not dropout and 1 < T <= 1024:
        return attention_in_blocks(q, k, v, mask)
    if mask is not None and torch.is_grad_enabled():
        # CUDA's kernels that keep no scores for the backward pass take a mask or grouped heads, not both
        k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.size(1) < q.size(1),
                                          dropout_p=dropout)
