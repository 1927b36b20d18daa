"""
TinyStories (Eldan and Li 2023), about 2.1 million short stories in a child's words, 1.9 GB, with a BPE of their own.

    python prepare.py data/tinystories.py
    python prepare.py data/tinystories.py --source=TinyStoriesV2-GPT4-train.txt --separator='<|endoftext|>'

The second takes the text file that the authors publish as well, where one is at hand.
"""
name = 'tinystories'
source = 'hf:roneneldan/TinyStories'
tokenizer = 'bpe:8192'
deduplicate = True
val_fraction = 0.01
note = 'TinyStories (Eldan and Li 2023)'
