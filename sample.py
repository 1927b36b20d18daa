"""
Lets a model write: text, several texts, or a chat; from a checkpoint, or from a model in Hugging Face's form.

    python sample.py                                                      # from the default run of train.py
    python sample.py --out_dir=out/mini_owl --prompt='In the bakery' --temperature=0
    python sample.py --init_from=out/gpt2/best.pt --prompt_file=beginning.txt --num_samples=3 --top_p=0.9
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --chat
    python sample.py --compare='out/stdlib/ckpt_*.pt' --prompt='def '     # the same text at every kept checkpoint
"""

from configurator import UserError, configure

# ---- who writes
out_dir = 'out/stdlib'  # the run whose latest checkpoint writes
init_from = ''  # or any checkpoint's path, or a folder in Hugging Face's form, or a model's id on its hub
compare = ''  # checkpoints of a run, as a pattern: each continues the prompt, with its step and loss beside it
# ---- what
prompt = ''  # what the text continues; '' = it begins from end-of-text, as a new document
prompt_file = ''  # a file that holds the prompt
prompts_file = ''  # a file with a prompt on each line, all continued in one batch
num_samples = 1  # continuations of each prompt, in one batch
chat = False  # a conversation, typed in; for models with a chat template (others continue what is typed)
system = ''  # chat: the system message that it begins with
# ---- how
max_new_tokens = 1000  # tokens of each sample, or answer, unless it ends before
temperature = 0.8  # 0 = always the likeliest token; 1 = as the model says
top_k = 0  # only the so many likeliest tokens; 0 = all
top_p = 1.0  # only the likeliest tokens that together have this probability (nucleus sampling); 1 = all
min_p = 0.0  # only tokens at least this times as likely as the likeliest; 0 = all
repetition_penalty = 1.0  # divides the logits of tokens that were there already; 1 = none, 1.1 to 1.3 against loops
stop = ''  # texts that end a sample, with | between them; \n is a line end
seed = 1337  # of the first sample; the next has the next
# ---- machine
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto | float32 | bfloat16 | float16 | int8: of weights; auto = bfloat16 if native; int8 is for CPUs
compile = False  # True | False: torch.compile; takes up to a minute first, then writes 1.5 to 2 times as fast
# ----
config = configure(globals())

import glob
import os
import re
import sys
from dataclasses import replace

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # large pages, before torch asks: CPUs read weights some 10% faster

import checkpoint
from chat import chat_template, end_of_answer, fit
from device import pick_device, pick_dtype
from generation import Sampling, Writer, window_start
from logs import read_log


def read(name, path):
    """The text of the file that the setting `name` gives."""
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except UnicodeDecodeError:
        raise UserError(f"{name}='{path}' is not UTF-8 text") from None
    except OSError as e:
        raise UserError(f"{name}='{path}' cannot be read ({e.strerror})") from None


def read_prompts():
    """The prompts' texts, from the setting or a file."""
    given = [name for name in ('prompt', 'prompt_file', 'prompts_file') if config[name]]
    if len(given) > 1:
        raise UserError(f'{" and ".join(given)} are both given; choose one')
    if not prompts_file:
        return [read('prompt_file', prompt_file) if prompt_file else prompt]
    lines = [line for line in read('prompts_file', prompts_file).splitlines() if line]
    if not lines:
        raise UserError(f"prompts_file='{prompts_file}' holds no prompt: each line that is not empty is one")
    return lines


def note(words):
    """Says what is to be known and is no part of the text."""
    print(f'note: {words}', file=sys.stderr, flush=True)


def load(name):
    """The model called `name`, ready to write, and its step, if it has one; the optimizer's state is let go."""
    model, tokenizer, rest = checkpoint.load_model(name)
    return Writer(model, tokenizer, device, dtype, compile), rest.get('iter')


def complete(writer, texts, seeds):
    """Prints what the model makes of each text: the first as it comes, each other as soon as those before it have ended."""
    prompts, block_size = [writer.tokenizer.beginning(text) for text in texts], writer.model.config.block_size
    for n in sorted({len(ids) for ids in prompts if len(ids) > block_size}):
        note(f'the prompt has {n:,} tokens, and the model sees {block_size:,}: the first {window_start(n, block_size):,} are '
             'left out')
    waits, ended, lengths, shown = list(texts), [False] * len(texts), list(map(len, prompts)), 0
    print(waits[0], end='', flush=True)
    waits[0] = ''
    for row, text, ended[row] in writer.write(prompts, sampling, seeds, begins=not texts[0]):
        lengths[row] += 1
        waits[row] += text
        while shown < len(texts) and (waits[shown] or ended[shown]):
            print(waits[shown], end='', flush=True)
            waits[shown] = ''
            if not ended[shown]:
                break
            shown += 1
            print('\n--------' if shown < len(texts) else '')
    if max_new_tokens == 0:
        print('\n--------\n'.join(waits))
    longest = max(lengths)
    if any(length - 1 > block_size >= len(ids) for length, ids in zip(lengths, prompts)):  # the last token was not read
        note(f'the text came to {longest:,} tokens, and the model sees {block_size:,}: each time that these were full, the '
             f'oldest {window_start(block_size + 1, block_size):,} dropped out of its sight')


def compare_checkpoints(texts, seeds):
    """Prints the continuation of the same text at every checkpoint, in the order of their numbers."""
    paths = sorted(filter(os.path.isfile, glob.glob(compare)),
                   key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', path)])
    if not paths:
        raise UserError(f"compare='{compare}' matches no checkpoint; train.py keeps checkpoints with --keep_every=STEPS")
    for path in paths:
        writer, step = load(path)
        log = {key: value for record in read_log(os.path.dirname(path), step) if record['iter'] == step
               for key, value in record.items()}
        losses = [f', {name} {log[key]:.4f}' for key, name in (('loss', 'loss'), ('val_loss', 'validation loss')) if key in log]
        print(f'======== {path}: step {step:,}' + ''.join(losses))
        complete(writer, texts, seeds)
        del writer  # before the next is loaded


def talk(writer):
    """A conversation on the terminal. Ctrl-C stops an answer; /reset forgets; Ctrl-D or /exit leaves."""
    tokenizer, block_size = writer.tokenizer, writer.model.config.block_size
    beginning = [{'role': 'system', 'content': system}] if system else []
    messages, answers = list(beginning), 0
    chats = bool(chat_template(tokenizer))
    if not chats:
        note('this model has no chat template: it goes on with what you type, each time from nothing')
    stop_ids = end_of_answer(tokenizer) if chats else tokenizer.stop_ids()
    if sys.stdin:
        sys.stdin.reconfigure(errors='replace')  # what is piped in may be no UTF-8
    while True:
        try:
            line = input('> ')
        except (EOFError, RuntimeError):  # RuntimeError: there is no standard input at all
            return print()
        except KeyboardInterrupt:
            print()
            note('Ctrl-D, or /exit, leaves')
            continue
        if line.strip() == '/exit':
            return None
        if line.strip() == '/reset':
            messages = list(beginning)
            note('the conversation begins anew')
            continue
        if line.startswith('/') or not line.strip():
            note('/reset begins a new conversation, /exit leaves; anything else is said to the model')
            continue
        if chats:
            messages.append({'role': 'user', 'content': line})
            try:
                ids, dropped, limit = fit(tokenizer, messages, block_size, max_new_tokens)
            except UserError as e:
                messages.pop()
                note(e)
                continue
            if dropped:
                del messages[len(beginning):len(beginning) + dropped]
                note(f'the conversation no longer fits into {block_size:,} tokens: its oldest {dropped} messages are forgotten')
        else:
            ids, limit = tokenizer.beginning(line), max_new_tokens
        answer, n = '', 0
        try:
            for _, text, _ in writer.write([ids], replace(sampling, max_new_tokens=limit), [seed + answers], stop_ids, chats):
                print(text, end='', flush=True)
                answer, n = answer + text, n + 1
        except KeyboardInterrupt:
            print(' ...', end='')
        print()
        if n == limit < max_new_tokens:
            note(f'the answer ends where the context of {block_size:,} tokens is full')
        if chats:
            messages.append({'role': 'assistant', 'content': answer})
        answers += 1


sampling = Sampling.of(config)
if not 0 < num_samples < 2**16:
    raise UserError(f'num_samples={num_samples} must be above 0 and below {2**16}')
if chat and compare:
    raise UserError('chat and compare are both given; choose one')
if chat and (prompt or prompt_file or prompts_file):
    raise UserError('chat and a prompt are both given; choose one: a chat is typed in')
texts = [text for text in read_prompts() for _ in range(num_samples)]
seeds = [seed + i % num_samples for i in range(len(texts))]
device = pick_device(device)
dtype = pick_dtype(dtype, device)
if compare:
    compare_checkpoints(texts, seeds)
else:
    writer, _ = load(init_from or os.path.join(out_dir, 'ckpt.pt'))
    if chat:
        talk(writer)
    else:
        complete(writer, texts, seeds)
