"""
Minueza-32M, a Mistral-shaped model of 32,792,760 parameters, made to chat in a browser: its pre-training.

    python train.py config/minueza32m_base.py

Source: the published configuration of Felladrin/Minueza-32M-Base and the story of its making: learning rate 5e-5, batches
of 8 * 2048 tokens, nine data sets interleaved, about 650 million tokens. Its attention reaches back 1024 tokens. No loss
was published; schedule, warm-up, weight decay and betas are this recipe's own.

Needs the data sets, each prepared with Mistral's tokenizer.model; `dataset` then names them with their weights, as in
'a:0.7 b:0.3'. The vocabulary has room for the two tokens of ChatML that the second part adds.
"""
out_dir = 'out/minueza32m_base'
dataset = 'minueza_base'
sample_prompt = 'The best way to'
sample_interval = 2000
eval_interval = 1000
eval_iters = 50

block_size = 2048
batch_size = 8  # 16,384 tokens a step

vocab_size = 32002
n_layer = 10
n_head = 12
n_kv_head = 4
n_embd = 312
n_inner = 1092
norm = 'rmsnorm'
norm_eps = 1e-6
mlp = 'swiglu'
pos = 'rope'
sliding_window = 1024
tie_weights = False

learning_rate = 5e-5
schedule = 'constant'
warmup_iters = 500
max_iters = 39_700  # 650M tokens
weight_decay = 0.0
beta2 = 0.999
