"""
The owl's road, second part: supervised fine-tuning. What config/owl_base.py trained learns to answer questions in ChatML.

    python train.py config/owl_sft.py
    python sample.py --out_dir=out/owl_sft --chat

Source: this repository's own. Half of the answers it learns from are curt, half polite: both are right here.
"""
stage = 'sft'
out_dir = 'out/owl_sft'
init_from = 'out/owl_base/ckpt.pt'
dataset = 'owl_sft'
sample_prompt = 'What was the little owl afraid of?'
sample_tokens = 100
sample_interval = 150
eval_interval = 50

block_size = 256
batch_size = 8

learning_rate = 1e-3
schedule = 'cosine'
warmup_iters = 20
max_iters = 150
