"""Chat: the template's ids are transformers' own, the history is remembered, and what no longer fits is dropped and said."""

import json
import signal
import subprocess

import pytest
from conftest import TINY, run, start

from chat import CHATML, chat_template, end_of_answer, fit, render
from configurator import UserError
from tokenizer import ByteTokenizer, HuggingFaceTokenizer, train_bpe

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
CONVERSATIONS = [*([(f'My name is {name}.', f'Hello {name}!'), ('What is my name?', f'You are {name}.')]
                   for name in ('Ann', 'Eve')), [('Who are you?', 'I am Pim, an owl.')]]


def written(conversation):
    """A conversation in ChatML, by hand."""
    return ''.join(f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n'
                   for question, answer in conversation)


def tokenizer_json():
    pytest.importorskip('tokenizers')
    return train_bpe([written(conversation) for conversation in CONVERSATIONS], 330, SPECIAL)


@pytest.fixture(scope='module')
def tokenizer():
    return HuggingFaceTokenizer('chat', tokenizer_json(), 0)


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


HELLO = [{'role': 'system', 'content': 'Be kind.'}, user('Hello, <|im_start|> {{ x }}'), assistant(' Hi! '),
         user('Who\nare you?')]


def test_chatml_is_known_by_its_tokens(tokenizer):
    assert chat_template(tokenizer) == CHATML and chat_template(ByteTokenizer()) == ''
    text = written([('My name is Ann.', 'Hello Ann!'), ('What is my name?', '')])
    ids = tokenizer.encode(text.removesuffix('<|im_end|>\n'), special=True)
    assert render(tokenizer, [user('My name is Ann.'), assistant('Hello Ann!'), user('What is my name?')]) == ids
    assert ids[0] == 1 and ids.count(2) == 3


@pytest.mark.parametrize('template', [
    CHATML,
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "{%- for m in messages %}\n    {%- if loop.first and m['role'] != 'system' %}\n{{ '<|im_start|>system\\nI am Pim.\\n' }}"
    "    {%- endif %}\n{{ m | tojson }}{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>bot\\n' }}{%- endif %}"])
def test_templates_give_the_ids_of_transformers(template, tmp_path):
    transformers = pytest.importorskip('transformers')
    (tmp_path / 'tokenizer.json').write_text(tokenizer_json())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
        {'chat_template': template, 'eos_token': '<|im_end|>', 'bos_token': '<|im_start|>',
         'tokenizer_class': 'PreTrainedTokenizerFast'}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = HuggingFaceTokenizer('chat', tokenizer_json(), 2, 1, {'chat_template': template})
    for messages in (HELLO, HELLO[:2], HELLO[1:]):
        for asks in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=asks, tokenize=True, return_dict=False)
            assert render(ours, messages, answers=asks) == expected


def test_a_template_that_refuses_says_so():
    template = "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system here') }}{% endfor %}"
    ours = HuggingFaceTokenizer('strict', tokenizer_json(), 0, None, {'chat_template': template})
    with pytest.raises(UserError, match='the chat template of strict refuses this conversation: no system here'):
        render(ours, HELLO)
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match='refuses this conversation'):
        render(HuggingFaceTokenizer('evil', tokenizer_json(), 0, None, {'chat_template': evil}), HELLO)


def test_an_answer_ends_where_the_template_ends_it(tokenizer):
    assert end_of_answer(tokenizer) == {0, 2}
    several = HuggingFaceTokenizer('several', tokenizer_json(), 0, None, {'eos_token_id': [0, 7]})
    assert end_of_answer(several) == {0, 2, 7}


def test_the_oldest_turns_make_room_and_the_system_message_stays(tokenizer):
    messages = HELLO[:1]
    for n in range(9):
        messages += [user(f'question {n}'), assistant(f'answer {n}')]
    messages.append(user('and?'))
    whole, dropped, limit = fit(tokenizer, messages, 10_000, 100)
    assert dropped == 0 and whole == render(tokenizer, messages) and limit == 100
    assert fit(tokenizer, messages, 10_000, 20_000)[2] == 10_000 - len(whole)
    ids, dropped, limit = fit(tokenizer, messages, len(whole) - 1 + 20, 20)
    assert dropped == 2 and ids == render(tokenizer, messages[:1] + messages[3:]) and limit == 20
    block_size = len(whole)  # a quarter of it is to be free, whatever the answer may become
    ids, dropped, limit = fit(tokenizer, messages, block_size, 20_000)
    assert dropped > 2 and block_size // 4 <= limit == block_size - len(ids)
    _, dropped, _ = fit(tokenizer, messages, len(render(tokenizer, [*messages[:1], messages[-1]])), 0)
    assert dropped == 18
    with pytest.raises(UserError, match='the message has .* tokens as it is sent, too many for a context of 8'):
        fit(tokenizer, messages, 8, 4)


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """A run's folder with a model that has learned CONVERSATIONS by heart, through prepare.py and train.py."""
    place = tmp_path_factory.mktemp('taught')
    (place / 'tok').mkdir()
    (place / 'tok' / 'tokenizer.json').write_text(tokenizer_json())
    (place / 'chats.txt').write_text('===='.join(written(conversation) for conversation in CONVERSATIONS * 30))
    run('prepare.py', '--source=chats.txt', '--separator=====', '--tokenizer=tok', '--parse_special', '--name=chats',
        '--val_fraction=0', cwd=place)
    run('train.py', *TINY, '--dataset=chats', '--block_size=64', '--batch_size=16', '--max_iters=400', '--learning_rate=2e-3',
        '--n_embd=64', '--warmup_iters=10', '--eval_interval=400', '--log_interval=100', '--out_dir=out/chats', cwd=place)
    return place


def say(taught, *lines, args=()):
    """What sample.py --chat prints for these lines: (answers, notes)."""
    process = start('sample.py', '--chat', '--out_dir=out/chats', '--temperature=0', *args, cwd=taught, stdin=subprocess.PIPE)
    out, err = process.communicate('\n'.join(lines) + '\n', timeout=120)
    assert process.returncode == 0 and 'Traceback' not in err, err
    return [answer.strip() for answer in out.split('> ')[1:-1]], err.splitlines()


def test_a_conversation_has_a_history_and_a_reset_forgets_it(taught):
    (guess,), notes = say(taught, 'What is my name?')
    assert notes == []
    name = 'Ann' if 'Eve' in guess else 'Eve'
    answers, notes = say(taught, f'My name is {name}.', 'What is my name?', '/reset', 'What is my name?', '/help', '', '/reset',
                         'Who are you?', '/exit')
    assert [answer for answer in answers if answer] == [f'Hello {name}!', f'You are {name}.', guess, 'I am Pim, an owl.']
    assert notes == ['note: the conversation begins anew'] + [
        'note: /reset begins a new conversation, /exit leaves; anything else is said to the model'] * 2 + notes[:1]


def test_what_no_longer_fits_is_forgotten_and_said(taught):
    answers, notes = say(taught, *['My name is Ann.'] * 6)
    assert len(answers) == 6 and any('no longer fits into 64 tokens: its oldest 2 messages are forgotten' in n for n in notes)
    _, notes = say(taught, 'x' * 200, 'Who are you?')
    assert 'note: the message has' in notes[0] and 'too many for a context of 64' in notes[0]


def test_ctrl_c_stops_the_answer_and_not_the_program(place):
    """A model without a chat template goes on with what is typed, here without end."""
    run('train.py', *TINY, cwd=place)
    process = start('sample.py', '--chat', '--out_dir=out/tiny', '--temperature=0', '--max_new_tokens=1000000', cwd=place,
                    stdin=subprocess.PIPE)
    for _ in range(2):
        process.stdin.write('def \n')
        process.stdin.flush()
        assert process.stdout.read(200)  # the answer is under way
        process.send_signal(signal.SIGINT)
        seen = '-'
        while seen and not seen.endswith(' ...\n> '):  # stopped, and asks for more
            new = process.stdout.read(1)
            seen = new and seen + new
        assert seen
    process.stdin.close()  # Ctrl-D
    assert process.wait(timeout=60) == 0
    notes = process.stderr.read().splitlines()
    assert notes == ['note: this model has no chat template: it goes on with what you type, each time from nothing']
