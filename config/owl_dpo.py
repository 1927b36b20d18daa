"""
The owl's road, third part: direct preference optimization. Of two right answers the polite one is preferred.

    python train.py config/owl_dpo.py
    python sample.py --out_dir=out/owl_dpo --chat

Source: this repository's own; the loss is the paper's (Rafailov et al. 2023).
"""
stage = 'dpo'
out_dir = 'out/owl_dpo'
init_from = 'out/owl_sft/ckpt.pt'
dataset = 'owl_dpo'
sample_prompt = 'What was the little owl afraid of?'
sample_tokens = 100
sample_interval = 40
eval_interval = 20

block_size = 256
batch_size = 8

learning_rate = 4e-5
schedule = 'linear'
warmup_iters = 10
max_iters = 40
beta = 0.3
