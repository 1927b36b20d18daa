r"""
Fine-tunes SmolLM2-135M (or another Llama or Mistral of the hub) on a text of your own.

    python prepare.py --source=PATH --tokenizer=HuggingFaceTB/SmolLM2-135M --name=mine_smollm2 --val_fraction=0.1
    python train.py config/finetune_smollm2.py --dataset=mine_smollm2

Another model has another tokenizer, so the text is prepared anew:

    python prepare.py --source=PATH --tokenizer=TinyLlama/TinyLlama-1.1B-Chat-v1.0 --name=mine_tinyllama --val_fraction=0.1
    python train.py config/finetune_smollm2.py --init_from=TinyLlama/TinyLlama-1.1B-Chat-v1.0 --dataset=mine_tinyllama \
        --out_dir=out/finetune_tinyllama

SmolLM2 reaches over 8192 tokens; the model that comes out of this reaches over the 1024 it was tuned in, unless block_size
says more. The learning rate, a thirtieth of SmolLM2's own 3e-3, is this recipe's choice. Compare best.pt with the model it
began from (iter 0 of the log): on a small text, fewer steps may be better.
"""
init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/finetune_smollm2'
dataset = 'mine_smollm2'
sample_interval = 100
sample_prompt = ''
eval_interval = 50
eval_iters = 50
log_interval = 5

block_size = 1024
batch_size = 4
gradient_accumulation_steps = 8  # 8 * 4 * 1024 = 32,768 tokens a step

learning_rate = 1e-4
min_lr = 0.0
schedule = 'linear'
warmup_iters = 20
max_iters = 300
weight_decay = 0.01
