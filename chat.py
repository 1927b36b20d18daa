"""
Conversations: a list of messages → the prompt that a model was taught to answer, and what it is taught with.

A message is {'role': 'system' | 'user' | 'assistant', 'content': text}. How they are written down is the tokenizer's chat
template (Jinja, as Hugging Face's tokenizers carry it), or ChatML where it has none but knows ChatML's tokens.
"""

import datetime
import functools
import json

import numpy as np

from configurator import UserError

ROLES = ('system', 'user', 'assistant')
EXAMPLE = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
CHATML_TOKENS = ('<|im_start|>', '<|im_end|>')
CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat_template(tokenizer):
    """The tokenizer's chat template; '' where it has none, and its model continues plain text only."""
    found = tokenizer.beside.get('chat_template', '')
    if isinstance(found, list):  # several, each with a name
        found = next((entry['template'] for entry in found if entry['name'] == 'default'), '')
    return found or (CHATML if tokenizer.special.keys() >= set(CHATML_TOKENS) else '')


def for_chats(tokenizer, template_file=''):
    """
    The tokenizer with a chat template: that of a file, or its own, or ChatML; it gets ChatML's tokens where the template has
    them and it lacks them. Raises UserError for a template that nothing can be learnt from.
    """
    template = chat_template(tokenizer) or CHATML
    if template_file:
        try:
            with open(template_file, encoding='utf-8') as f:
                template = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"chat_template='{template_file}' cannot be read ({e})") from None
    tokenizer = tokenizer.extended([token for token in CHATML_TOKENS if token in template], {'chat_template': template})
    encode(tokenizer, EXAMPLE)
    tokenizer.beside['eos_token_id'] = sorted(end_of_answer(tokenizer))
    return tokenizer


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


def written(tokenizer, messages, answers):
    """Messages → text; `answers`: up to where the assistant's answer begins. Raises UserError if the template refuses them."""
    try:
        return _compiled(chat_template(tokenizer)).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=answers,
            bos_token=tokenizer.spelled('bos'), eos_token=tokenizer.spelled('eos'))
    except Exception as e:  # a template is a program, and can fail in any way
        raise UserError(f'the chat template of {tokenizer.name} refuses this conversation: {e}') from None


def render(tokenizer, messages, answers=True):
    """The ids of what is `written`."""
    return tokenizer.encode(written(tokenizer, messages, answers), special=True)


def encode(tokenizer, messages, first=0):
    """
    A conversation → its ids, as `render` gives them, and which of them are taught (bool): the assistant's words, from
    message `first` on, with the special token that ends them. A token that begins before such words is not.

    Raises UserError where the template has no form for it, does not end an answer, or does not begin it as its prompt does.
    """
    text = written(tokenizer, messages, answers=False)
    ids = tokenizer.encode(text, special=True)
    taught, special = np.zeros(len(ids), bool), {*tokenizer.special.values(), tokenizer.eot_id}
    for n in (n for n, message in enumerate(messages) if n >= first and message['role'] == 'assistant'):
        asked = written(tokenizer, messages[:n], answers=True)
        answer = text[len(asked):].lstrip()
        if not text.startswith(asked) or not answer.startswith(messages[n]['content'].strip()):
            raise UserError(f"the chat template of {tokenizer.name} writes an answer's beginning otherwise than the prompt for "
                            'it, so that it cannot be told what to teach; choose another with --chat_template')
        before = tokenizer.encode(asked, special=True)
        start = _shared(before, ids)
        beyond = len(tokenizer.decode_bytes(before[start:]))  # where the answer's first token merges with the prompt
        while beyond > 0:
            beyond -= len(tokenizer.decode_bytes([ids[start]]))
            start += 1
        end = next((at for at in range(start, len(ids)) if ids[at] in special), None)
        if end is None:
            raise UserError(f'the chat template of {tokenizer.name} ends no answer with a special token that the tokenizer '
                            'knows, so that the model would never stop; choose another with --chat_template')
        taught[start:end + 1] = True
    return np.array(ids, np.uint32), taught


def _shared(a, b):
    """How many elements two lists have in common from the beginning on."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---- records → conversations

def parse_fields(fields):
    """'prompt=question response=answer' → {'prompt': ['question'], ...}: our names for a record's fields, and its own."""
    names = {name: [name] for name in ('messages', 'system', 'prompt', 'response', 'chosen', 'rejected')}
    for part in fields.split():
        ours, _, theirs = part.partition('=')
        if ours not in names or not theirs:
            raise UserError(f"fields='{fields}': {part} is not OURS=THEIRS, with one of {', '.join(names)} for OURS")
        names[ours] = theirs.split('+')
    return names


def read_conversation(record, names):
    """
    The messages in a record: its `messages`, or `prompt` and `response`, with the `system` message before them if there is
    one. Raises ValueError for what is none.
    """
    found = _values(record, names, 'messages', 'response')
    return check(found['messages'] if 'messages' in found else _begin(found) + _message('assistant', found, 'response'))


def read_pair(record, names):
    """
    The (chosen, rejected) conversations in a record, and how many messages they share: `prompt` with `chosen` and `rejected`,
    each a text or messages, which may hold the prompt already. Raises ValueError for what is none.
    """
    found = _values(record, names, 'chosen')
    pair = []
    for key in ('chosen', 'rejected'):
        if isinstance(found.get(key), list):
            complete = not found[key] or not isinstance(found[key][0], dict) or found[key][0].get('role') != 'assistant'
            pair.append(check(found[key] if complete else _begin(found) + found[key]))
        else:
            pair.append(check(_begin(found) + _message('assistant', found, key)))
    shared = _shared(*pair)
    if pair[0] != pair[1] and not all(shared < len(side) and side[shared]['role'] == 'assistant' for side in pair):
        raise ValueError('differs in what is asked, not in what is answered')
    return *pair, shared


def _values(record, names, *one_of):
    """A record's fields under our names, `one_of` them at least; one that is put together has those that are not empty."""
    if not isinstance(record, dict):
        raise ValueError('is no object')
    found = {}
    for ours, theirs in names.items():
        values = [record[key] for key in theirs if record.get(key)]
        if any(record.get(key) is not None for key in theirs):
            found[ours] = '\n\n'.join(values) if all(isinstance(value, str) for value in values) else values[0]
    if not found.keys() & set(one_of):
        raise ValueError(f'has no {" or ".join(one_of)}; its fields are: {", ".join(sorted(map(str, record)))}, and --fields '
                         'says which is which')
    return found


def _begin(found):
    """The messages before an answer: what `system` and `prompt` hold."""
    system = _message('system', found, 'system') if found.get('system') else []
    return system + (found['prompt'] if isinstance(found.get('prompt'), list) else _message('user', found, 'prompt'))


def _message(role, found, key):
    return [{'role': role, 'content': found.get(key)}]


def check(messages):
    """The messages, of their roles and contents only. Raises ValueError for what is no conversation with an answer."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('holds an empty conversation')
    for message in messages:
        role, content = (message.get('role'), message.get('content')) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise ValueError(f'has a message with the role {role!r:.40}, which is none of {", ".join(ROLES)}')
        if content is not None and not isinstance(content, str):
            raise ValueError(f'has a message that is no text (role {role})')
        if not content or not content.strip():
            raise ValueError(f'has an empty message (role {role})')
    if not any(message['role'] == 'assistant' for message in messages):
        raise ValueError('holds no answer of the assistant')
    return [{'role': message['role'], 'content': _whole(message['content'])} for message in messages]


def _whole(text):
    """JSON can write half a character, which no text has."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


# ---- conversing

def end_of_answer(tokenizer):
    """The ids that end an answer: the tokenizer's own stops, and the special token that its template writes behind one."""
    answered, asked = render(tokenizer, EXAMPLE, answers=False), render(tokenizer, EXAMPLE[:1])
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
