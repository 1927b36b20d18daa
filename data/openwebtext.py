"""
OpenWebText (Gokaslan and Cohen 2019), 8 million documents linked from Reddit, 54 GB of text, 9 billion tokens of GPT-2's.

    python prepare.py data/openwebtext.py
    python prepare.py --adopt=../nanoGPT/data/openwebtext --tokenizer=gpt2 --name=openwebtext      # nanoGPT's own files

The hub's repository carries a loading script, which `datasets` refuses since version 4; the revision is the proposal of
its maintainers that replaces the script by Parquet files.
"""
name = 'openwebtext'
source = 'hf:Skylion007/openwebtext'
revision = 'refs/pr/22'
tokenizer = 'gpt2'
val_fraction = 0.0005
note = 'OpenWebText (Gokaslan and Cohen 2019)'
