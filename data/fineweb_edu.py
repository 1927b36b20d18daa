"""
FineWeb-Edu (Lozhkov et al. 2024), educational pages of the web: the sample of about 10 billion tokens.

    python prepare.py data/fineweb_edu.py                                                  # 10BT, GPT-2's tokenizer
    python prepare.py data/fineweb_edu.py --subset=sample-100BT --name=fineweb_edu_100bt
    python prepare.py data/fineweb_edu.py --tokenizer=NousResearch/Llama-2-7b-hf --val_fraction=0.1 --name=fineweb_edu_llama2

The last is the form that config/llamacraft437m.py trains on, whose 200,000 steps read it some twelve times (the text of its
write-up speaks of sample-100BT, its script of sample-10BT).
"""
name = 'fineweb_edu'
source = 'hf:HuggingFaceFW/fineweb-edu'
subset = 'sample-10BT'
tokenizer = 'gpt2'
val_fraction = 0.001
note = 'FineWeb-Edu (Lozhkov et al. 2024)'
