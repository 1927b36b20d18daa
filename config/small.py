"""
Makes the recipe before it small: its kind of model, optimizer, schedule and batch, in a size that a CPU trains in minutes.

    python prepare.py data/stdlib.py --tokenizer=bpe:4096 --name=stdlib_bpe4096
    python train.py config/smollm135m.py config/small.py --dataset=stdlib_bpe4096 --out_dir=out/smollm_small

A file of settings sees those before it. Heads keep their size, and as many of them share a key and value head as before; the
learning rate grows as the width shrinks, to 1e-3 at least, since the run is short. What begins from a model (SFT, DPO) keeps
that one's shape, and its own learning rate. README.md has a table of what came of five systems in this size.
"""
_shrink = 4

if init_from in ('scratch', 'resume', 'auto'):
    _head_size, _groups, _width = n_embd // n_head, n_head // (n_kv_head or n_head), n_embd
    n_kv_head = max((n_kv_head or n_head) // _shrink, 1)
    n_head = n_kv_head * _groups
    n_embd = n_head * _head_size
    n_inner = n_inner * n_embd // _width
    n_layer = max(n_layer // _shrink, 4)
    vocab_size = 0  # the data's
    sliding_window = min(sliding_window, 128)
    dropout = 0.0  # attention with dropout is slow on CPUs
    learning_rate = max(learning_rate * _width / n_embd, 1e-3)

block_size = min(block_size, 256)
gradient_accumulation_steps = min(gradient_accumulation_steps, 2)
batch_size = min(batch_size, 4096 // block_size // gradient_accumulation_steps)  # at most 4,096 tokens a step

max_iters = min(max_iters, 1000)
warmup_iters = max_iters // 20
lr_decay_iters = wsd_decay_iters = 0  # as long as the run; 20% of it
eval_interval = 250
eval_iters = 20
sample_interval = 500
keep_every = 0
