r"""
Minueza-32M, a Mistral-shaped model of 32,792,760 parameters, made to chat in a browser: its pre-training.

    python train.py config/minueza32m_base.py    # when its data is prepared, as below

Source: the published configuration and card of Felladrin/Minueza-32M-Base and the story of its making: learning rate 5e-5,
batches of 8 * 2048 tokens, about 650 million tokens, subsets of nine data sets interleaved: Skylion007/openwebtext, c4,
wikimedia/wikipedia (20231101.simple), tiiuae/falcon-refinedweb, izumi-lab/open-text-books,
togethercomputer/RedPajama-Data-V2, databricks/databricks-dolly-15k, euclaise/reddit-instruct-curated and
CohereForAI/aya_dataset. Its attention reaches back 1024 tokens. No loss was published; the weights of the mixture, schedule,
warm-up and betas are this recipe's own. Its tokenizer is Mistral's with the two tokens of ChatML, of which <|im_end|>
ends texts too.

    python prepare.py data/openwebtext.py --tokenizer=Felladrin/Minueza-32M-Base --name=minueza_openwebtext
    python prepare.py --source=hf:wikimedia/wikipedia --subset=20231101.simple --tokenizer=data/minueza_openwebtext \
        --val_fraction=0.001 --name=minueza_wikipedia

The other seven are prepared like the second, and named in `dataset` with their weights.
"""
out_dir = 'out/minueza32m_base'
dataset = 'minueza_openwebtext:0.8 minueza_wikipedia:0.2'
sample_prompt = 'The best way to'
sample_interval = 2000
eval_interval = 1000
eval_iters = 50

block_size = 2048
batch_size = 8  # 16,384 tokens a step

vocab_size = 32002
n_layer = 10
n_head = 12
n_kv_head = 4
n_embd = 312
n_inner = 1092
norm = 'rmsnorm'
norm_eps = 1e-6
mlp = 'swiglu'
pos = 'rope'
sliding_window = 1024
tie_weights = False

learning_rate = 5e-5
schedule = 'constant'
warmup_iters = 500
max_iters = 39_700  # 650M tokens
weight_decay = 0.0
beta2 = 0.999
