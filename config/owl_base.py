"""
The owl's road, first part: a small Llama reads some fifty tales about an owl until it knows them, in a minute or two on a CPU.

    python train.py config/owl_base.py
    python train.py config/owl_sft.py      # then it learns to answer questions about them
    python train.py config/owl_dpo.py      # and then to answer politely
    python sample.py --out_dir=out/owl_dpo --chat

Source: this repository's own; the tales, questions and answers in data/ were written for it. It is to learn them by heart, so
that the validation loss (of tales it has not read) grows again after a while. Needs the package tokenizers.
"""
out_dir = 'out/owl_base'
dataset = 'owl_base'
sample_prompt = 'Pim was afraid of'
sample_interval = 100
eval_interval = 100

block_size = 256
batch_size = 8

n_embd = 256

learning_rate = 3e-3
schedule = 'cosine'
max_iters = 300
