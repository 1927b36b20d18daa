"""
What memory training takes, by part. Calculated, nothing is run.
"""

import math

from attention import ATTENTION_BLOCK
from loss import CHUNK

PROCESS = 380_000_000  # bytes of Python with torch, its compiler and the rest, on Linux


def memory(model, windows, dtype, optimizer, on_cpu, checkpoint_activations=False, shares=1, masked=False):
    """
    Bytes that training takes at most, by part, of a `model` (on the meta device, say), with micro-batches of so many `windows`
    and matrix products in `dtype` (float32, or another, of 16 bits). `shares`: processes over which weights, gradients and
    optimizer are spread (fsdp). On CPUs there is the process too, and a checkpoint while it is saved. A compiler needs less of
    the activations, which are those that the backward pass reads (see `layer_bytes`). `masked`: rows of several texts, as in
    sft and dpo.
    """
    c, n, width = model.config, model.count_parameters(), 4 if dtype == 'float32' else 2
    tokens, matrices = windows * c.block_size, sum(p.numel() for p in model.parameters() if p.dim() == 2)
    hidden = sum(p.numel() for p in model.h.parameters() if p.dim() == 2)
    moments = {'adamw': 8 * n, 'adam': 8 * n, 'sgd': 4 * n, 'muon': 8 * n - 4 * hidden, 'adamw8bit': 2 * n}[optimizer]
    mask = masked or 0 < c.sliding_window < c.block_size
    layer, norms = layer_bytes(c, width, on_cpu, mask), (8 if c.norm == 'rmsnorm' else 4) + width
    kept = c.n_layer * 4 * c.n_embd + layer if checkpoint_activations else c.n_layer * layer
    logits = tokens * c.vocab_size
    parts = {
        'weights': 4 * n // shares,
        'gradients': 4 * n // shares,
        'optimizer': moments // shares,
        'weights in ' + dtype: 2 * matrices if width == 2 else 0,  # which autocast keeps for the step
        'activations': tokens * (kept + norms * c.n_embd + masked * c.block_size),
        # in float32 as they are, their logarithms of probabilities, and the gradient; a CPU's process keeps what it frees, and
        # blocks so large and of several sizes do not fit into each other's places: 20 to 25 bytes were measured (LOG.md)
        'logits': (22 if on_cpu else 12) * min(logits, CHUNK) + (4 * c.vocab_size * c.n_embd if logits > CHUNK else 0),
    }
    if on_cpu:
        parts |= {'checkpoint, while it is saved': 4 * n + moments, 'process': PROCESS}
    return {part: size for part, size in parts.items() if size}


def layer_bytes(c, width, on_cpu, mask=False):
    """
    Bytes that a layer keeps of each token for the backward pass, where the results of matrix products take `width` bytes.

    The residual stream is in float32, and so are the norms: each keeps what it reads and, rmsnorm, what it multiplies by its
    weights; then their results in the products' precision. Of attention: query, key and value as they are made, query and key
    turned by rope, and what it writes; with a `mask`, keys and values for each query head; of scores nothing, but for two cases
    on CPUs. Of the feed-forward: all it makes.
    """
    C, kv, T = c.n_embd, c.n_kv_head * c.head_size, c.block_size
    norms = 2 * ((8 if c.norm == 'rmsnorm' else 4) + width) * C
    attention = width * (C + 2 * kv + C) + (width * (C + kv) if c.pos == 'rope' else 0)
    if mask:
        attention += 2 * width * (C - kv)
    if on_cpu and c.dropout:
        attention += 12 * c.n_head * T
    elif on_cpu and width == 2 and T <= 1024:  # attention_in_blocks
        attention += 2 * c.n_head * (T + min(T, ATTENTION_BLOCK)) // 2 + 4 * C
    feed_forward = width * (4 if c.mlp == 'swiglu' else 2) * c.n_inner
    masks = 2 * C * (width if on_cpu else 1) if c.dropout else 0
    return norms + attention + feed_forward + masks


def short(number, units='kMGT'):
    """'1.61 G': three digits and a unit of thousands."""
    thousands = min(max(math.floor(math.log10(max(number, 1)) / 3 + 1e-9), 0), len(units))
    gap = ' ' if units == 'kMGT' else ''
    return f'{number / 1000 ** thousands:.3g}{gap}{units[thousands - 1] if thousands else ""}'


def in_words(parts):
    """'1.2 GB: weights 0.5 GB, ...'."""
    return f'{short(sum(parts.values()))}B (' + ', '.join(f'{part} {short(size)}B' for part, size in parts.items()) + ')'
