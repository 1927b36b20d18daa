"""
Conversations: a list of messages → the prompt that a model was taught to answer.

A message is {'role': 'system' | 'user' | 'assistant', 'content': text}. How they are written down is the tokenizer's chat
template (Jinja, as Hugging Face's tokenizers carry it), or ChatML where it has none but knows ChatML's tokens.
"""

import datetime
import functools
import json

from configurator import UserError

CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat_template(tokenizer):
    """The tokenizer's chat template; '' where it has none, and its model continues plain text only."""
    found = tokenizer.beside.get('chat_template', '')
    if isinstance(found, list):  # several, each with a name
        found = next((entry['template'] for entry in found if entry['name'] == 'default'), '')
    return found or (CHATML if {'<|im_start|>', '<|im_end|>'} <= tokenizer.special.keys() else '')


@functools.cache
def _compiled(template):
    # what transformers renders templates with: one may come from anywhere, so that it runs in a sandbox
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters['tojson'] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render(tokenizer, messages, answers=True):
    """Messages → ids; `answers`: up to where the assistant's answer begins. Raises UserError if the template refuses them."""
    name_of = {i: token for token, i in tokenizer.special.items()}
    try:
        text = _compiled(chat_template(tokenizer)).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=answers,
            bos_token=name_of.get(tokenizer.bos_id, ''), eos_token=name_of.get(tokenizer.eot_id, ''))
    except Exception as e:  # a template is a program, and can fail in any way
        raise UserError(f'the chat template of {tokenizer.name} refuses this conversation: {e}') from None
    return tokenizer.encode(text, special=True)


def end_of_answer(tokenizer):
    """The ids that end an answer: the tokenizer's own stops, and the special token that its template writes behind one."""
    answered = render(tokenizer, [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}], answers=False)
    asked = render(tokenizer, [{'role': 'user', 'content': 'a'}])
    special = set(tokenizer.special.values())
    return tokenizer.stop_ids() | set([i for i in answered[len(asked):] if i in special][:1])


def fit(tokenizer, messages, block_size, max_new_tokens):
    """
    (ids, how many messages were left out, the most tokens of the answer): the conversation without as many of its oldest
    turns as it takes to leave a quarter of the context for the answer, or `max_new_tokens` if these are fewer. The system
    message stays. Raises UserError if the last message alone is too long.
    """
    room = min(max_new_tokens, block_size // 4)
    system = [m for m in messages[:1] if m['role'] == 'system']
    turns = messages[len(system):]
    starts = [i for i, m in enumerate(turns) if m['role'] == 'user']  # a turn is a question with its answer
    for start in starts:
        ids = render(tokenizer, system + turns[start:])
        if len(ids) + room <= block_size:
            return ids, start, min(max_new_tokens, block_size - len(ids))
    raise UserError(f'the message has {len(ids):,} tokens as it is sent, too many for a context of {block_size:,} that is to '
                    f'leave {room:,} for the answer; say it in fewer words')
