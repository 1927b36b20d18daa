"""
SmolLM2-135M's shape, 134,515,008 parameters, on Cosmopedia-v2: 14 hours on one A10G spot instance, $4.73.

    python prepare.py data/cosmopedia.py
    python train.py config/smollm135m.py

Source: the official training configuration of SmolLM2-135M (the shape, init_std 1/24) and a write-up that trained it from
nothing: 37,000 steps of 32,768 tokens (1,212,465,152 in all by its own count), with a validation-free loss of

    step    1,000   5,000  10,000  15,000  25,000  30,000  35,000  37,000
    loss    5.09    3.468  3.130   3.012   2.911   2.885   2.866   2.859

It sampled the same prompt at each of these; this recipe does every 5,000 steps. Here the schedule is the official run's
warm-up, stable, decay, with the decay over the last 20%; --schedule=cosine --min_lr=1.5e-5 comes closer to the write-up's.
"""
out_dir = 'out/smollm135m'
dataset = 'cosmopedia'
sample_prompt = 'Once upon a time'
sample_interval = 5000
eval_interval = 1000
eval_iters = 50
keep_every = 5000

block_size = 1024
batch_size = 16
gradient_accumulation_steps = 2  # 2 * 16 * 1024 = 32,768 tokens a step

vocab_size = 49152
n_layer = 30
n_head = 9
n_kv_head = 3
n_embd = 576
n_inner = 1536
norm = 'rmsnorm'
norm_eps = 1e-5
mlp = 'swiglu'
pos = 'rope'
rope_theta = 10000.0
tie_weights = True
init_std = 1 / 24

learning_rate = 3e-4
schedule = 'wsd'
wsd_decay_iters = 7400
warmup_iters = 3000
max_iters = 37_000
weight_decay = 0.01
beta2 = 0.95
