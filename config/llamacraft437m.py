"""
LlamaCraft, a Llama of 437,584,896 parameters on FineWeb-Edu.

    python prepare.py data/fineweb_edu.py --tokenizer=NousResearch/Llama-2-7b-hf --val_fraction=0.1 --name=fineweb_edu_llama2
    torchrun --nproc_per_node=8 train.py config/llamacraft437m.py

Source: its write-up and repository: Llama-2's shape and tokenizer (32,000), rows packed without padding, a 90/10 split,
micro-batches of 8 * 1024 accumulated 64 times, learning rate 1e-3 with 1000 steps of warm-up and a cosine to 0, 200,000
steps planned. No finished loss was published. It used 8-bit AdamW from bitsandbytes, which is --optimizer=adamw8bit here;
AdamW in 32 bits takes 2.6 GB more. On a 24 GB card add --checkpoint_activations: about 10 GB by calculation (LOG.md).

The tokenizer is Llama-2's, from a copy that needs no licence to be accepted first.
"""
out_dir = 'out/llamacraft437m'
dataset = 'fineweb_edu_llama2'
sample_prompt = 'The history of science'
sample_interval = 2000
eval_interval = 1000
eval_iters = 100

block_size = 1024
batch_size = 8
gradient_accumulation_steps = 64  # 64 * 8 * 1024 = 524,288 tokens a step

vocab_size = 32000
n_layer = 32
n_head = 32
n_kv_head = 32
n_embd = 1024
n_inner = 2752
norm = 'rmsnorm'
norm_eps = 1e-5
mlp = 'swiglu'
pos = 'rope'
tie_weights = True
dropout = 0.1

learning_rate = 1e-3
min_lr = 0.0
schedule = 'cosine'
warmup_iters = 1000
max_iters = 200_000
weight_decay = 0.1
beta2 = 0.95
