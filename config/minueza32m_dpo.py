"""
Minueza-32M, third part: direct preference optimization (Rafailov et al. 2023).

    python train.py config/minueza32m_dpo.py

Source: the story of its making: learning rate 7.5e-7, batches of 6 * 2048 tokens, 200 steps, repeated several times with
the interleaved data sets shuffled anew.
The schedule, warm-up, weight decay and betas are this recipe's own.
Needs stage='dpo', which is still to come, and the model that config/minueza32m_sft.py trains.
"""
stage = 'dpo'
out_dir = 'out/minueza32m_dpo'
init_from = 'out/minueza32m_sft/ckpt.pt'
dataset = 'minueza_dpo'
sample_prompt = '<|im_start|>user\nWhat is bread?<|im_end|>\n<|im_start|>assistant\n'

block_size = 2048
batch_size = 6  # 12,288 tokens a step

learning_rate = 7.5e-7
schedule = 'linear'
warmup_iters = 20
max_iters = 200
weight_decay = 0.0
beta2 = 0.999
