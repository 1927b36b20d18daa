"""
Generates text from a checkpoint, which needs nothing beside it, or from a model in Hugging Face's form.

    python sample.py                                                      # from the default run of train.py
    python sample.py --out_dir=out/mini_owl --prompt='In the bakery' --temperature=0
    python sample.py --init_from=out/gpt2/best.pt --prompt_file=beginning.txt --num_samples=3 --top_p=0.9
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --prompt='Bread is'
"""

from configurator import UserError, configure

# ---- settings
out_dir = 'out/stdlib'  # the run whose latest checkpoint writes
init_from = ''  # or any checkpoint's path, or a folder in Hugging Face's form, or a model's id on its hub
prompt = ''  # what the text continues; '' = it begins from end-of-text, as a new document
prompt_file = ''  # a file that holds the prompt
num_samples = 1  # continuations of the prompt, one after the other
max_new_tokens = 1000  # tokens of each sample, unless it ends before
temperature = 0.8  # 0 = always the likeliest token; 1 = as the model says
top_k = 0  # only the so many likeliest tokens; 0 = all
top_p = 1.0  # only the likeliest tokens that together have this probability (nucleus sampling)
seed = 1337  # of the first sample; the next has the next
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto | float32 | bfloat16 | float16: of matrix products; auto = bfloat16 if native
# ----
config = configure(globals())

import os

import torch

import checkpoint
from device import autocast, pick_device, pick_dtype
from model import generate


def read_prompt():
    """The prompt's text, from the setting or the file."""
    if not prompt_file:
        return prompt
    if prompt:
        raise UserError('prompt and prompt_file are both given; choose one')
    try:
        with open(prompt_file, encoding='utf-8') as f:
            return f.read()
    except UnicodeDecodeError:
        raise UserError(f"prompt_file='{prompt_file}' is not UTF-8 text") from None
    except OSError as e:
        raise UserError(f"prompt_file='{prompt_file}' cannot be read ({e.strerror})") from None


def check_settings():
    for name, ok, rule in (('temperature', temperature >= 0, '0 or more'), ('top_k', top_k >= 0, '0 or more'),
                           ('top_p', 0 < top_p <= 1, 'above 0 and at most 1'), ('num_samples', num_samples > 0, 'above 0'),
                           ('max_new_tokens', max_new_tokens >= 0, '0 or more')):
        if not ok:
            raise UserError(f'{name}={config[name]} must be {rule}')


check_settings()
text = read_prompt()
device = pick_device(device)
dtype = pick_dtype(dtype, device)
model, tokenizer, _ = checkpoint.load_model(init_from or os.path.join(out_dir, 'ckpt.pt'))
model.to(device)
ids = torch.tensor([tokenizer.beginning(text)], device=device)
for i in range(num_samples):
    generator = torch.Generator(device).manual_seed(seed + i)
    stream = tokenizer.stream(begins=not text)
    print(text, end='', flush=True)
    with autocast(device, dtype):
        for token in generate(model, ids, max_new_tokens, temperature, top_k, top_p, tokenizer.vocab_size, generator):
            if token.item() == tokenizer.eot_id:
                break
            print(stream(token.item()), end='', flush=True)
    print('\n--------' if i < num_samples - 1 else '')
