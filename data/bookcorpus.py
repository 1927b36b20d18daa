"""
BookCorpus (Zhu et al. 2015), 74 million sentences of 11,000 novels, with a byte-level BPE of 50,304 trained on it.

    python prepare.py data/bookcorpus.py

config/gpt51m_bookcorpus.py trains on it. Each sentence is a document in the hub's copy, and so it is here.
The revision is the hub's own conversion to Parquet: the repository carries a loading script, which `datasets` refuses
since version 4.
"""
name = 'bookcorpus'
source = 'hf:bookcorpus/bookcorpus'
revision = 'refs/convert/parquet'
tokenizer = 'bpe:50304'
special_tokens = '<|startoftext|> <|endoftext|> <|padding|>'
val_fraction = 0.001
note = 'BookCorpus (Zhu et al. 2015)'
