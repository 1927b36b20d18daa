"""
One short story about an owl, written for this repository: small enough for a model to learn by heart in half a minute.

    python prepare.py data/owl.py

There is no validation split: the point is to memorise every character.
"""
import os

name = 'owl'
source = os.path.join(os.path.dirname(__file__), 'owl.txt')
tokenizer = 'bytes'
val_fraction = 0.0
note = 'an original story, written for this repository'
