"""
Questions about the owl's story, each with a polite answer that is preferred to a curt one, for config/owl_dpo.py.

    python prepare.py data/owl_base.py    # whose tokenizer it takes
    python prepare.py data/owl_dpo.py
"""
import os

name = 'owl_dpo'
source = os.path.join(os.path.dirname(__file__), 'owl_pairs.jsonl')
stage = 'dpo'
block_size = 256
tokenizer = 'data/owl_base'
val_fraction = 0.05
note = 'original pairs of answers, written for this repository'
