"""
Minueza-32M, second part: supervised fine-tuning on conversations in ChatML.

    python train.py config/minueza32m_sft.py

Source: the story of its making: learning rate 2e-5, batches of 24 * 2048 tokens, ChatML data sets interleaved.
The schedule, warm-up, weight decay and betas are this recipe's own, as is the number of steps.
Needs stage='sft', which is still to come, and the base model that config/minueza32m_base.py trains.
"""
stage = 'sft'
out_dir = 'out/minueza32m_sft'
init_from = 'out/minueza32m_base/ckpt.pt'
dataset = 'minueza_sft'
sample_prompt = '<|im_start|>user\nWhat is bread?<|im_end|>\n<|im_start|>assistant\n'

block_size = 2048
batch_size = 24  # 49,152 tokens a step

learning_rate = 2e-5
schedule = 'linear'
warmup_iters = 100
max_iters = 2000
weight_decay = 0.0
beta2 = 0.999
