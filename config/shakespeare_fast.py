"""
config/shakespeare.py's job with what is known since: a Llama of the same size with Muon, in a tenth of the steps.

    python prepare.py data/shakespeare.py
    python train.py config/shakespeare_fast.py
    python sample.py --out_dir=out/shakespeare_fast --prompt='ROMEO:'

Source: Jordan et al. 2024 (Muon), Hu et al. 2024 (warm-up, stable, decay); the learning rate is from the sweep in LOG.md. The
context and the number of weights are those of nanoGPT's job, the batch is twice as large.
"""
out_dir = 'out/shakespeare_fast'
dataset = 'shakespeare'
sample_prompt = 'ROMEO:'
sample_interval = 0
eval_interval = 1000
eval_iters = 100

block_size = 64
batch_size = 24

n_layer = 4
n_head = 4
n_kv_head = 4
n_embd = 128
n_inner = 320  # three matrices, where nanoGPT's feed-forward has two of 512
norm = 'rmsnorm'
mlp = 'swiglu'
pos = 'rope'
bias = False

optimizer = 'muon'
learning_rate = 1e-2
schedule = 'wsd'
warmup_iters = 20
max_iters = 200
wsd_decay_iters = 110
weight_decay = 0.1
