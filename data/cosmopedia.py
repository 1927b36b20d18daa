"""
Cosmopedia v2, the synthetic textbooks and stories of the SmolLM corpus (Ben Allal et al. 2024), with SmolLM2's tokenizer.

    python prepare.py data/cosmopedia.py

config/smollm135m.py trains on it.
"""
name = 'cosmopedia'
source = 'hf:HuggingFaceTB/smollm-corpus'
subset = 'cosmopedia-v2'
tokenizer = 'HuggingFaceTB/cosmo2-tokenizer'
val_fraction = 0.001
note = 'Cosmopedia v2, of the SmolLM corpus (Ben Allal et al. 2024)'
