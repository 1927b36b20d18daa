"""
Some fifty short tales about the owl of data/owl.txt and its bakery, written for this repository: what config/owl_base.py reads.

    python prepare.py data/owl_base.py
"""
import os

name = 'owl_base'
source = os.path.join(os.path.dirname(__file__), 'owl_tales.txt')
separator = '\n***\n'
tokenizer = 'bpe:768'
val_fraction = 0.05
note = 'original tales, written for this repository'
