"""
Fine-tunes OpenAI's GPT-2 (124M) on a text of your own; Shakespeare, for a start.

    python prepare.py data/shakespeare.py --tokenizer=gpt2 --name=shakespeare_gpt2
    python train.py config/finetune_gpt2.py
    python train.py config/finetune_gpt2.py --dataset=mine --out_dir=out/mine_gpt2         # your text, prepared with gpt2
    python train.py config/finetune_gpt2.py --init_from=gpt2-xl --batch_size=1 --gradient_accumulation_steps=32 --out_dir=out/xl

Source: nanoGPT's config/finetune_shakespeare.py for the learning rate, the 32,768 tokens a step and the few steps (there
on GPT-2 XL and constant; here it falls along a line). The shape comes with the weights; what is set here is only how to
go on. A small text is learnt by heart soon: best.pt is the checkpoint to keep, and dropout stays at GPT-2's own 0.1.
"""
init_from = 'gpt2'  # gpt2-medium, gpt2-large, gpt2-xl; or a folder in Hugging Face's form
out_dir = 'out/shakespeare_gpt2'
dataset = 'shakespeare_gpt2'
sample_prompt = 'ROMEO:'
sample_interval = 20
eval_interval = 10
eval_iters = 20
log_interval = 1

block_size = 1024
batch_size = 4
gradient_accumulation_steps = 8  # 8 * 4 * 1024 = 32,768 tokens a step

learning_rate = 3e-5
min_lr = 0.0
schedule = 'linear'
warmup_iters = 5
max_iters = 60
weight_decay = 0.1
