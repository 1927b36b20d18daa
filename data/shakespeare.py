"""
Shakespeare, 1.1 MB: the file of Karpathy's char-rnn (2015), as bytes, the last tenth for validation as in nanoGPT.

    python prepare.py data/shakespeare.py                          # fetches it
    python prepare.py data/shakespeare.py --source=input.txt       # a copy at hand
"""
name = 'shakespeare'
source = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
tokenizer = 'bytes'
val_fraction = 0.1
note = "Shakespeare's plays, from char-rnn (Karpathy 2015)"
