"""
The owl's road, first part: a small Llama reads fifty tales about an owl, in two minutes on a CPU.

    python train.py config/owl_base.py
    python train.py config/owl_sft.py      # then it learns to answer questions about them
    python train.py config/owl_dpo.py      # and then to answer politely
    python sample.py --out_dir=out/owl_dpo --chat

Source: this repository's own; the tales, questions and answers in data/ were written for it.
"""
out_dir = 'out/owl_base'
dataset = 'owl_base'
sample_prompt = 'Pim was afraid of'
sample_interval = 600
eval_interval = 200

block_size = 256
batch_size = 8

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 256

learning_rate = 4e-3
schedule = 'cosine'
warmup_iters = 50
max_iters = 600
dropout = 0.1
