"""
Some 700 questions about the owl's story with their answers, curt ones and polite ones, for config/owl_sft.py.

    python prepare.py data/owl_base.py    # whose tokenizer it takes
    python prepare.py data/owl_sft.py
"""
import os

name = 'owl_sft'
source = os.path.join(os.path.dirname(__file__), 'owl_chat.jsonl')
stage = 'sft'
block_size = 256
tokenizer = 'data/owl_base'
val_fraction = 0.05
note = 'original conversations, written for this repository'
