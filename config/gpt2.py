"""
GPT-2 small, 124,439,808 parameters, on OpenWebText, as nanoGPT reproduced it.

    python prepare.py data/openwebtext.py
    torchrun --nproc_per_node=8 train.py config/gpt2.py

Source: Radford et al. 2019 (the model); nanoGPT's config/train_gpt2.py (the run: half a million tokens a step, 600,000
steps, about 4 days on 8 A100s). It should reach a validation loss of about 2.85. nanoGPT leaves out GPT-2's biases and
pads the vocabulary, which --bias=False --vocab_size=50304 does here too.
"""
out_dir = 'out/gpt2'
dataset = 'openwebtext'
sample_prompt = 'The meaning of life is'
sample_interval = 5000
eval_interval = 1000
eval_iters = 200

block_size = 1024
batch_size = 12
gradient_accumulation_steps = 40  # 40 * 12 * 1024 = 491,520 tokens a step

vocab_size = 50257
n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
norm = 'layernorm'
mlp = 'gelu'
pos = 'learned'
bias = True
tie_weights = True
dropout = 0.0

learning_rate = 6e-4
min_lr = 6e-5
schedule = 'cosine'
warmup_iters = 2000
max_iters = 600_000
weight_decay = 0.1
beta2 = 0.95
