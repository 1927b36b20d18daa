r"""
Minueza-32M, second part: supervised fine-tuning on conversations in ChatML.

    python train.py config/minueza32m_sft.py    # when its data is prepared, as below

Source: the card of Felladrin/Minueza-32M-Chat and the story of its making: learning rate 2e-5, batches of 24 * 2048 tokens,
2% of the steps warm-up, no weight decay; ten data sets interleaved: databricks/databricks-dolly-15k,
euclaise/reddit-instruct-curated, THUDM/webglm-qa, starfishmedical/webGPT_x_dolly, LDJnr/Capybara, Open-Orca/SlimOrca-Dedup,
HuggingFaceH4/ultrachat_200k, nvidia/HelpSteer, sablo/oasst2_curated and CohereForAI/aya_dataset, all of them also as
Felladrin/ChatML-*. The weights, the number of steps and the schedule are this recipe's own.

Begins from what config/minueza32m_base.py trains. Four of the sets, in the forms that they have on the hub:

    python prepare.py --stage=sft --block_size=2048 --tokenizer=data/minueza_openwebtext --val_fraction=0.01 \
        --source=hf:HuggingFaceH4/ultrachat_200k --split=train_sft --name=minueza_ultrachat
    python prepare.py --stage=sft --block_size=2048 --tokenizer=data/minueza_openwebtext --val_fraction=0.01 \
        --source=hf:databricks/databricks-dolly-15k --fields=prompt=instruction+context --name=minueza_dolly
    python prepare.py --stage=sft --block_size=2048 --tokenizer=data/minueza_openwebtext --val_fraction=0.01 \
        --source=hf:nvidia/HelpSteer --name=minueza_helpsteer
    python prepare.py --stage=sft --block_size=2048 --tokenizer=data/minueza_openwebtext --val_fraction=0.01 \
        --source=hf:CohereForAI/aya_dataset --fields='prompt=inputs response=targets' --name=minueza_aya
"""
stage = 'sft'
out_dir = 'out/minueza32m_sft'
init_from = 'auto:out/minueza32m_base/ckpt.pt'
dataset = 'minueza_ultrachat:0.6 minueza_dolly:0.15 minueza_helpsteer:0.15 minueza_aya:0.1'
sample_prompt = 'What is bread?'

block_size = 2048
batch_size = 24  # 49,152 tokens a step

learning_rate = 2e-5
schedule = 'linear'
warmup_iters = 40
max_iters = 2000
weight_decay = 0.0
beta2 = 0.999
