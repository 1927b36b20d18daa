"""
Learns one short story by heart: a small Llama on data/owl.txt, in half a minute on a CPU.

    python train.py config/mini_owl.py
    python sample.py --out_dir=out/mini_owl --temperature=0 --prompt='In the bakery'

Source: the Mini project's owl tutorial: 4 layers, 8 heads, 256 wide, windows of 128 moved by 8, batches of 2, AdamW at a
constant 1e-4 for 100 epochs, with Mistral's SentencePiece; it reports a loss of 1.8174 (perplexity 6.16) at the end.
Here the tokens are bytes, and 1e-3 along a cosine, without weight decay, needs 10 epochs. The training loss should end
at 0.01 to 0.03, and greedy sampling recites the story to its last word. With Mistral's SentencePiece, as there, it is 266
tokens and 11.4 million parameters, and recites it as well:

    python prepare.py data/owl.py --tokenizer=PATH/tokenizer.model.v1 --name=owl_mistral
    python train.py config/mini_owl.py --dataset=owl_mistral --out_dir=out/owl_mistral
"""
out_dir = 'out/mini_owl'
dataset = 'owl'
sample_prompt = 'In the bakery'
sample_interval = 300
checkpoint_interval = 300
log_interval = 50

block_size = 128
stride = 8
batch_size = 2

n_layer = 4
n_head = 8
n_kv_head = 8
n_embd = 256
norm = 'rmsnorm'
mlp = 'swiglu'
pos = 'rope'

learning_rate = 1e-3
schedule = 'cosine'
warmup_iters = 50
max_iters = 600
weight_decay = 0.0
