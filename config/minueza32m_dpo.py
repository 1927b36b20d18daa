r"""
Minueza-32M, third part: direct preference optimization (Rafailov et al. 2023).

    python train.py config/minueza32m_dpo.py    # when its data is prepared, as below
    python train.py config/minueza32m_dpo.py --seed=2 --init_from=out/minueza32m_dpo/ckpt.pt --out_dir=out/minueza32m_dpo2

Source: the card of Felladrin/Minueza-32M-Chat and the story of its making: learning rate 7.5e-7, batches of 6 * 2048 tokens,
200 steps, 2% of them warm-up, beta 0.1, no weight decay, repeated several times with the interleaved sets shuffled anew, which
is the second command: another seed, from where the first round ended. Five data sets:
argilla/distilabel-capybara-dpo-7k-binarized, argilla/distilabel-intel-orca-dpo-pairs,
argilla/ultrafeedback-binarized-preferences, sablo/oasst2_dpo_pairs_en and NeuralNovel/Neural-DPO. The weights, the schedule
and Adam's betas are this recipe's own. Here a row of 2048 tokens holds as many pairs as fit, so that a step has more than six.

Begins from what config/minueza32m_sft.py trains. Three of the sets, in the forms that they have on the hub:

    python prepare.py --stage=dpo --block_size=2048 --tokenizer=data/minueza_ultrachat --val_fraction=0.01 \
        --source=hf:argilla/distilabel-capybara-dpo-7k-binarized --name=minueza_capybara
    python prepare.py --stage=dpo --block_size=2048 --tokenizer=data/minueza_ultrachat --val_fraction=0.01 \
        --source=hf:argilla/distilabel-intel-orca-dpo-pairs --fields=prompt=input --name=minueza_orca
    python prepare.py --stage=dpo --block_size=2048 --tokenizer=data/minueza_ultrachat --val_fraction=0.01 \
        --source=hf:argilla/ultrafeedback-binarized-preferences \
        --fields='prompt=instruction chosen=chosen_response rejected=rejected_response' --name=minueza_feedback
"""
stage = 'dpo'
out_dir = 'out/minueza32m_dpo'
init_from = 'auto:out/minueza32m_sft/ckpt.pt'
dataset = 'minueza_capybara:0.2 minueza_orca:0.3 minueza_feedback:0.5'
sample_prompt = 'What is bread?'

block_size = 2048
batch_size = 6  # pairs of rows, 12,288 tokens of chosen answers a step and as many of rejected ones

learning_rate = 7.5e-7
schedule = 'linear'
warmup_iters = 4
max_iters = 200
weight_decay = 0.0
beta = 0.1
beta2 = 0.999
