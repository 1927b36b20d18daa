"""
A GPT-2 of 51,008,512 parameters (50.98M without positions) on BookCorpus: under a day on one V100, $50.

    python prepare.py data/bookcorpus.py
    python train.py config/gpt51m_bookcorpus.py

Source: a write-up that took its size from Chinchilla's law (Hoffmann et al. 2022): 320 PFLOPs buy 50M parameters on 1.1B
tokens. AdamW at 5e-4, weight decay 0.01, batches of 224 * 64, fp16. It publishes no usable loss (a "perplexity of 0.83"
cannot be: 1 is the least, and padding was trained on); the recipe is what can be reproduced. Schedule, warm-up and betas
are not among the published facts at hand; those below are this recipe's own.
"""
out_dir = 'out/gpt51m'
dataset = 'bookcorpus'
sample_prompt = 'life is about'
sample_interval = 5000
eval_interval = 1000
eval_iters = 50

block_size = 64
batch_size = 224  # 14,336 tokens a step

vocab_size = 50304
n_layer = 8
n_head = 8
n_kv_head = 8
n_embd = 512
norm = 'layernorm'
mlp = 'gelu'
pos = 'learned'
bias = True
tie_weights = True
dropout = 0.1

learning_rate = 5e-4
schedule = 'constant'
warmup_iters = 1000
max_iters = 76_730  # 1.1B tokens, once
weight_decay = 0.01
beta2 = 0.999
