"""
A page in the browser to play with a model: it continues texts, and chats if the model was taught to. For several at once.

    python app.py                                               # the default run of train.py
    python app.py --out_dir=out/mini_owl --temperature=0.5      # any of the run's checkpoints, chosen on the page
    python app.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct
    python app.py --host=0.0.0.0 --port=8000                    # for all who reach this machine: there is no password
"""

from configurator import UserError, configure

# ---- who writes
out_dir = 'out/stdlib'  # the run whose checkpoints the page offers
init_from = ''  # or any checkpoint's path, or a folder in Hugging Face's form, or a model's id on its hub
system = ''  # chat: the system message that it begins with
# ---- how: where the page's sliders stand at first
max_new_tokens = 1000  # tokens of each text, or answer, unless it ends before
temperature = 0.8  # 0 = always the likeliest token; 1 = as the model says
top_k = 0  # only the so many likeliest tokens; 0 = all
top_p = 1.0  # only the likeliest tokens that together have this probability (nucleus sampling); 1 = all
min_p = 0.0  # only tokens at least this times as likely as the likeliest; 0 = all
repetition_penalty = 1.0  # divides the logits of tokens that were there already; 1 = none, 1.1 to 1.3 against loops
stop = ''  # texts that end a sample, with | between them; \n is a line end
seed = 1337  # the same seed writes the same text
# ---- where
host = '127.0.0.1'  # the IPv4 address to listen at; this one is reached from this machine only
port = 7860  # its port
# ---- machine
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto | float32 | bfloat16 | float16 | int8: of weights; auto = bfloat16 if native; int8 is for CPUs
compile = False  # True | False: torch.compile; takes up to a minute first, then writes 1.5 to 2 times as fast
# ----
config = configure(globals())

import asyncio
import errno
import functools
import os
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import fields, replace

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # large pages, before torch asks: CPUs read weights some 10% faster
os.environ |= {'GRADIO_ANALYTICS_ENABLED': 'False', 'GRADIO_RUN_HISTORY': 'False'}  # nothing is reported, or kept
try:
    import gradio as gr
except ModuleNotFoundError:
    raise UserError('app.py needs a package: pip install gradio') from None

import checkpoint
from chat import chat_template, end_of_answer, fit
from device import pick_device, pick_dtype
from generation import Sampling, Writer, window_start

# One thread does all of the work, a token at a time. It takes what waits in the order in which it came, so that users
# take turns token by token; what torch.compile records for a GPU belongs to the thread that recorded it; and a second
# thread that computes would halve the speed of both (OpenMP waits less eagerly when threads outnumber cores).
worker = ThreadPoolExecutor(1)


def in_turn(f, *args):
    return asyncio.get_running_loop().run_in_executor(worker, f, *args)


# ---- models

def checkpoints():
    """The names that the page offers: the run's latest checkpoint, its best, those kept on the way, any others."""
    if init_from:
        return [init_from]
    found = [name for name in os.listdir(out_dir) if name.endswith('.pt')] if os.path.isdir(out_dir) else []
    kept = {name: int(re.findall(r'\d+', name)[-1]) for name in found if re.fullmatch(r'ckpt_\d+\.pt', name)}
    order = sorted(found, key=lambda name: (name != 'ckpt.pt', name != 'best.pt', kept.get(name, sys.maxsize), name))
    return [os.path.join(out_dir, name) for name in order or ['ckpt.pt']]  # which loading will miss


def choice(name):
    """(what the page calls it, its name): the file with its step."""
    step = checkpoint.step_of(name)
    words = name if init_from else os.path.basename(name)
    return words if step is None else f'{words}, step {step:,}', name


@functools.lru_cache(maxsize=2)  # models are large; one that is still writing stays besides
def load_version(name, changed):
    """(a Writer, what ends its answers or None if it does not chat, what it is in words) of a file last changed then."""
    model, tokenizer, rest = checkpoint.load_model(name)
    words = [f'step {rest["iter"]:,}'] if 'iter' in rest else []
    n_params = sum(p.numel() for p in model.parameters())
    words += [f'{n_params / 1e6:,.2f}M parameters', f'sees {model.config.block_size:,} tokens']
    stop_ids = end_of_answer(tokenizer) if chat_template(tokenizer) else None
    return Writer(model, tokenizer, device, dtype, compile), stop_ids, ' · '.join(words)


def load(name):
    """As `load_version`: read anew if training has replaced the file meanwhile."""
    return load_version(name, os.stat(name).st_mtime_ns if os.path.isfile(name) else 0)


# ---- texts

SETTINGS = [*(field.name for field in fields(Sampling)), 'seed']  # as they come from the page


def chosen(values):
    """(Sampling, seed) from the page's settings; one that was emptied is the script's."""
    settings = {name: config[name] if value is None else value for name, value in zip(SETTINGS, values)}
    return Sampling.of(settings), settings['seed']


@contextmanager
def mistakes_shown():
    """What a user can mend is one line on the user's page, which stays as it is, and nothing on the server's terminal."""
    try:
        yield
    except UserError as e:
        gr.Warning(str(e))


async def follow(stream):
    """(the text so far, its tokens and their speed in words) of a Writer's stream, as it comes."""
    text, n, started, shown = '', 0, 0.0, 0.0

    def speed():
        return f'{n:,} tokens' + (f', {(n - 1) / (time.perf_counter() - started):,.1f} per second' if n > 1 else '')

    try:
        while step := await in_turn(next, stream, None):
            started = started or time.perf_counter()  # reading the prompt is not counted
            text, n = text + step[1], n + 1
            if time.perf_counter() - shown > 0.05:  # a page cannot show more than about 20 changes a second
                yield text, speed()
                shown = time.perf_counter()
        yield text, speed()
    finally:  # also after Stop, or when the page is gone: a step may be under way still, so this waits in line behind it
        worker.submit(stream.close)


async def write(prompt, name, *values):
    """Continues the prompt → the text, a line about it."""
    with mistakes_shown():
        sampling, seed = chosen(values)
        writer, _, _ = await in_turn(load, name)
        ids, block_size = writer.tokenizer.beginning(prompt), writer.model.config.block_size
        unseen = window_start(len(ids), block_size)
        note = f'the first {unseen:,} of the prompt\'s {len(ids):,} tokens are out of sight · ' if unseen else ''
        async with aclosing(follow(writer.write([ids], sampling, [seed], begins=not prompt))) as texts:
            async for text, speed in texts:
                yield prompt + text, note + speed


async def answer(message, turns, name, *values):
    """Answers the message after `turns` → an emptied message box, the turns as shown, the turns as kept, a line."""
    if not message.strip():
        return
    with mistakes_shown():
        sampling, seed = chosen(values)
        writer, stop_ids, _ = await in_turn(load, name)
        if stop_ids is None:
            raise UserError('this model has no chat template: it only continues texts')
        block_size, beginning = writer.model.config.block_size, [{'role': 'system', 'content': system}] if system else []
        turns = [*turns, {'role': 'user', 'content': message}]
        ids, dropped, limit = fit(writer.tokenizer, beginning + turns, block_size, sampling.max_new_tokens)
        turns = turns[dropped:]
        note = f'no longer fits into {block_size:,} tokens: the oldest {dropped} messages are forgotten · ' if dropped else ''
        sampling = replace(sampling, max_new_tokens=limit)
        seed += len(turns) // 2  # the same question again may get another answer
        with_answer = [*turns, {'role': 'assistant', 'content': ''}]
        yield '', with_answer, with_answer, note
        async with aclosing(follow(writer.write([ids], sampling, [seed], stop_ids, begins=True))) as texts:
            async for text, speed in texts:
                with_answer = [*turns, {'role': 'assistant', 'content': text}]
                yield gr.skip(), with_answer, with_answer, note + speed  # what is typed meanwhile stays


# ---- the page

async def choose(name):
    """Loads a model → what it is in words, whether there is a tab to chat."""
    with mistakes_shown():
        _, stop_ids, words = await in_turn(load, name)
        return words, gr.Tab(visible=stop_ids is not None)
    return '', gr.Tab()


async def open_page():
    """What there is to choose may have changed since the server was started."""
    choices = await in_turn(lambda: list(map(choice, checkpoints())))
    return gr.Dropdown(choices, value=choices[0][1]), *await choose(choices[0][1])


FOLLOW = '''() => {  // the end of the text stays in sight, unless it was scrolled away
    const box = document.querySelector('#text textarea')
    if (box.scrollHeight - box.scrollTop < 1.5 * box.clientHeight) box.scrollTop = box.scrollHeight
}'''


def slider(name, low, high, step, info):
    return gr.Slider(min(low, config[name]), max(high, config[name]), config[name], step=step, label=name, info=info,
                     precision=0 if step == 1 else None)


def build():
    """The page: the prompt and the text, or the chat, on the left; the model and the settings on the right."""
    with gr.Blocks(title='sourdough', analytics_enabled=False, fill_width=True) as page, gr.Row():
        with gr.Column(scale=5), gr.Tabs():
            with gr.Tab('Text'):
                prompt = gr.Textbox(label='prompt', info='empty = a new document; Shift+Enter generates', lines=3,
                                    max_lines=8, elem_id='prompt')
                with gr.Row():
                    write_button = gr.Button('Generate', variant='primary', elem_id='write')
                    stop_write = gr.Button('Stop', elem_id='stop_write')
                text = gr.Textbox(label='text', lines=22, max_lines=22, elem_id='text', buttons=['copy'])
                speed = gr.Markdown(elem_id='speed')
            with gr.Tab('Chat', visible=False) as chat_tab:
                # as text: Markdown could name a picture, and the browser would fetch it from anywhere
                talk = gr.Chatbot(show_label=False, height=520, render_markdown=False, elem_id='talk',
                                  buttons=['copy', 'copy_all'])
                message = gr.Textbox(label='message', lines=2, max_lines=4, info='Shift+Enter sends', elem_id='message')
                with gr.Row():
                    send = gr.Button('Send', variant='primary', elem_id='send')
                    stop_answer = gr.Button('Stop', elem_id='stop_answer')
                    reset = gr.Button('Reset', elem_id='reset')
                answer_speed = gr.Markdown(elem_id='answer_speed')
                turns = gr.State([])
        with gr.Column(scale=2, min_width=320):
            chooser = gr.Dropdown([choice(name) for name in checkpoints()], label='model', elem_id='model')
            words = gr.Markdown(elem_id='words')
            settings = [
                slider('max_new_tokens', 1, 4000, 1, 'unless the text ends before'),
                slider('temperature', 0, 2, 0.05, '0 = always the likeliest token'),
                slider('top_k', 0, 200, 1, 'only so many tokens; 0 = all'),
                slider('top_p', 0.05, 1, 0.05, 'only the likeliest, of this sum'),
                slider('min_p', 0, 1, 0.01, 'relative to the likeliest'),
                slider('repetition_penalty', 1, 2, 0.05, 'above 1 against loops')]
            with gr.Row():
                settings += [gr.Textbox(stop, label='stop', info='texts that end it: a|b', min_width=100),
                             gr.Number(seed, label='seed', info='the same, again', precision=0, min_width=100)]
        inputs, shown = [chooser, *settings], {'show_progress': 'hidden'}
        writing = gr.on([write_button.click, prompt.submit], write, [prompt, *inputs], [text, speed], **shown)
        answering = gr.on([send.click, message.submit], answer, [message, turns, *inputs],
                          [message, talk, turns, answer_speed], **shown)
        stop_write.click(None, cancels=[writing])
        stop_answer.click(None, cancels=[answering])
        gr.on([reset.click, talk.clear], lambda: ([], [], ''), None, [talk, turns, answer_speed], cancels=[answering], **shown)
        text.change(None, js=FOLLOW)
        chooser.select(choose, chooser, [words, chat_tab])
        page.load(open_page, None, [chooser, words, chat_tab], show_progress='hidden')
    return page


device = pick_device(device)
dtype = pick_dtype(dtype, device)
Sampling.of(config)
if not 0 < port < 2**16:
    raise UserError(f'port={port} must be from 1 to {2**16 - 1}')
try:
    socket.create_server((host, port)).close()
except UnicodeError:
    raise UserError(f"host='{host}' is no address") from None
except OSError as e:
    if e.errno == errno.EADDRINUSE:
        raise UserError(f'port={port} is in use; choose another with --port') from None
    raise UserError(f"host='{host}', port={port}: cannot listen there ({e.strerror.partition(' (')[0]})") from None
worker.submit(load, checkpoints()[0]).result()  # what is wrong with it is said here, and the page need not wait for it
page = build().queue(default_concurrency_limit=16)
look = gr.themes.Default(spacing_size='sm', text_size='sm', font=['system-ui', 'sans-serif'],  # fonts that are there: nothing
                         font_mono=['ui-monospace', 'monospace'])  # on the page comes from elsewhere
page.launch(server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True,
            theme=look, css='#text textarea {font-family: var(--font-mono)}', footer_links=[])
print(f'open {page.local_url.rstrip("/")}', flush=True)
try:
    threading.Event().wait()
except KeyboardInterrupt:
    print(flush=True)
    os._exit(0)  # nothing is to be saved, and to close open pages in good order would take seconds
