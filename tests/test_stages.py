"""Post-training: what is taught is the assistant's words and nothing else, and preference tuning is the paper's."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import GPT2, TINY, losses, read_log, run, start
from test_huggingface import tokenizer as any_tokenizer
from test_model import FAMILIES, make
from test_train import assert_same
from test_train import checkpoint as saved

import huggingface
import rows
from chat import CHATML, CHATML_TOKENS, encode, for_chats, render
from checkpoint import load_model
from configurator import UserError
from dataset import Rows
from loss import CHUNK, preference, token_nats
from model import Transformer
from tokenizer import ByteTokenizer, load_tokenizer, tokenizer_from_state

tokenizer = any_tokenizer  # every kind of it
TALK = [*TINY, '--block_size=96', '--learning_rate=1e-3', '--sample_prompt=What is 3?']
NUMBERS = ['none', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def conversations():
    more = [user('And one more?'), assistant('One more.')]
    return [[user(f'What is {n}?'), assistant(f'It is {word}.'), *(more if n % 3 == 0 else [])]
            for n, word in enumerate(NUMBERS * 3)]


def write_jsonl(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def prepare(place, file, stage, *more, size=64):
    """data/<the file's name without its ending>, without validation; what prepare.py printed."""
    return run('prepare.py', f'--source={file}', f'--stage={stage}', f'--block_size={size}', '--val_fraction=0',
               f'--name={file.partition(".")[0]}', *more, cwd=place)[0]


@pytest.fixture(scope='module')
def talks(prepared, tmp_path_factory):
    """A folder with conversations and pairs, prepared, and a base model; tests do not change it."""
    place = tmp_path_factory.mktemp('talks')
    (place / 'data').mkdir()
    (place / 'data' / 'tiny').symlink_to(prepared / 'data' / 'tiny')
    write_jsonl(place / 'talk.jsonl', [{'messages': messages} for messages in conversations()])
    write_jsonl(place / 'pairs.jsonl', [{'prompt': f'What is {n}?', 'chosen': f'Gladly: {word}!', 'rejected': word}
                                        for n, word in enumerate(NUMBERS * 3)])
    for stage, name in (('sft', 'talk'), ('dpo', 'pairs')):
        prepare(place, f'{name}.jsonl', stage, '--val_fraction=0.3', size=96)
    run('train.py', *TALK, '--out_dir=out/base', cwd=place)
    run('train.py', *TALK, *SFT, '--out_dir=out/sft', cwd=place)
    return place


@pytest.fixture(scope='module')
def chats(tokenizer):
    return for_chats(tokenizer)


SFT = ['--stage=sft', '--dataset=talk', '--init_from=out/base/ckpt.pt']
DPO = ['--stage=dpo', '--dataset=pairs', '--init_from=out/sft/ckpt.pt']


@pytest.fixture
def place(talks, tmp_path):
    """A folder with the same, to write to."""
    (tmp_path / 'data').mkdir()
    for name in os.listdir(talks / 'data'):
        (tmp_path / 'data' / name).mkdir()
        for file in os.listdir(talks / 'data' / name):
            (tmp_path / 'data' / name / file).symlink_to(talks / 'data' / name / file)
    (tmp_path / 'out').mkdir()
    for name in ('base', 'sft'):
        (tmp_path / 'out' / name).symlink_to(talks / 'out' / name)
    return tmp_path


# ---- what is taught

def test_the_mask_token_by_token():
    tok = for_chats(ByteTokenizer())
    ids, taught = encode(tok, [user('Hi'), assistant('Yo!'), user('Bye'), assistant('So long')])
    spelled = {257: '<|im_start|>', 258: '<|im_end|>'}
    text = ''.join(spelled.get(i, chr(i)) for i in ids.tolist())
    assert text == ('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo!<|im_end|>\n'
                    '<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long<|im_end|>\n')
    parts = ([257, *b'user\nHi', 258, *b'\n', 257, *b'assistant\n'], [*b'Yo!', 258],
             [*b'\n', 257, *b'user\nBye', 258, *b'\n', 257, *b'assistant\n'], [*b'So long', 258], [*b'\n'])
    assert ids.tolist() == sum(parts, [])
    assert taught.tolist() == [n % 2 == 1 for n, part in enumerate(parts) for _ in part]


def test_every_tokenizer_is_taught_the_same_words(tokenizer, chats):
    tok = chats
    assert for_chats(tok).fingerprint() == tok.fingerprint() and tok.vocab_size == tokenizer.vocab_size + 2
    assert tokenizer_from_state(json.loads(json.dumps(tok.state()))).fingerprint() == tok.fingerprint()
    assert tok.agrees_with(tokenizer) and tok.encode('<|im_end|>') == tokenizer.encode('<|im_end|>')
    messages = [{'role': 'system', 'content': 'Be kind.'}, user('Who are you?'), assistant('I am Pim, an owl.\n\nAnd you?'),
                user('  Ann.  '), assistant('Hello Ann! ' * 3)]
    ids, taught = encode(tok, messages)
    assert ids.tolist() == render(tok, messages, answers=False)
    edges = np.flatnonzero(np.diff(taught.astype(int))) + 1
    found = [tok.decode(part.tolist()) for part in np.split(ids, edges)[1::2]]
    assert found == [message['content'] for message in messages if message['role'] == 'assistant']
    assert [ids[edge - 1] for edge in edges[1::2]] == [tok.special['<|im_end|>']] * 2


def test_a_token_that_begins_before_the_answer_is_not_taught():
    if not os.environ.get('TIKTOKEN_CACHE_DIR'):
        pytest.skip('the BPE file of gpt2 is not at hand: no TIKTOKEN_CACHE_DIR')
    tok = for_chats(load_tokenizer('gpt2'))
    ids, taught = encode(tok, [user('a'), assistant('\n\nb')])  # the header's line end and the answer's first are one token
    assert tok.decode(ids[taught].tolist()) == '\nb' and ids[np.flatnonzero(taught)[0] - 1] == tok.encode('\n\n')[0]
    assert ids.tolist() == render(tok, [user('a'), assistant('\n\nb')], answers=False)


@pytest.mark.parametrize('template, problem', [
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
     'ends no answer with a special token'),
    ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", "writes an answer's beginning otherwise"),
    ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}Bot: {% endif %}",
     "writes an answer's beginning otherwise"),
    ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "writes an answer's beginning otherwise"),
    ("{{ raise_exception('no') }}", 'refuses this conversation: no'), ('{% if %}', 'refuses this conversation')])
def test_a_template_that_nothing_can_be_learnt_from(template, problem, tmp_path):
    (tmp_path / 'template').write_text(template)
    with pytest.raises(UserError, match=problem):
        for_chats(ByteTokenizer().extended(CHATML_TOKENS, {}), str(tmp_path / 'template'))


def conversations_in(x, y, begins):
    """The ids of each conversation in a row, and how many of its targets are taught."""
    edges = [*np.flatnonzero(begins).tolist(), len(x)]
    return [(x[a:b], int((y[a:b] >= 0).sum())) for a, b in zip(edges, edges[1:])]


def test_rows_hold_every_conversation_once_and_apart(talks):
    tok, found = for_chats(ByteTokenizer()), []
    for split in ('train', 'val'):
        data = Rows(str(talks / 'data' / 'talk'), split, 96)
        for k in range(data.n_windows):
            x, y, begins = data.window(k)
            assert x.shape == y.shape == begins.shape == (96,) and begins[0] and (y >= 0).any()
            assert (y[:-1][y[:-1] >= 0] == x[1:][y[:-1] >= 0]).all() and y[-1] == -1
            found += [(tuple(ids.tolist()), n) for ids, n in conversations_in(x, y, begins)]
    wanted = []
    for messages in conversations():
        ids, taught = encode(tok, messages)
        wanted.append((tuple(ids.tolist()), int(taught.sum())))
    found = [(ids[:len(ids) - next(i for i, t in enumerate(reversed(ids)) if t != 256)], n) for ids, n in found]  # unpadded
    assert sorted(found) == sorted(wanted)


def test_packing_is_tight_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(1, 97, 2000)
    packed = rows.pack(lengths, 96)
    assert sorted(sum(packed, [])) == list(range(2000))
    assert all(sum(lengths[items]) <= 96 for items in packed)
    assert len(packed) < 1.03 * lengths.sum() / 96


@pytest.mark.parametrize('family, changes', [('gpt2', {}), ('llama', {}), ('llama', {'sliding_window': 9})])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_equals_unpacked(talks, family, changes, dtype):
    """The loss of a row and its gradients are those of its conversations, each alone."""
    model = make(FAMILIES[family] | {'block_size': 96, 'vocab_size': 259} | changes).train()
    data = Rows(str(talks / 'data' / 'talk'), 'train', 96)
    batch = [data.window(k) for k in range(data.n_windows) if data.window(k)[2].sum() > 1][:3]
    assert len(batch) == 3

    def gradients(total):
        model.zero_grad()
        total.backward()
        return total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    x, y, begins = (torch.from_numpy(np.stack(part)) for part in zip(*batch))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        packed, packed_grad = gradients(model(x, y, reduction='sum', begins=begins))
        alone = 0
        for x, y, begins in batch:
            edges = [*np.flatnonzero(begins).tolist(), 96]
            for a, b in zip(edges, edges[1:]):
                alone = alone + model(torch.from_numpy(x[None, a:b]), torch.from_numpy(y[None, a:b]), reduction='sum')
        alone, alone_grad = gradients(alone)
        together = model(torch.from_numpy(x[None]), torch.from_numpy(y[None]), reduction='sum')
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert packed == pytest.approx(alone, rel=tolerance)
    assert (packed_grad - alone_grad).norm() < tolerance * alone_grad.norm()
    x, y, begins = (torch.from_numpy(part[None]) for part in batch[-1])
    apart = model(x, y, reduction='sum', begins=begins).item()
    assert abs(together.item() - apart) > 1e-3 or 'sliding_window' in changes  # the mask is felt


def test_the_users_words_have_no_gradient(talks):
    model = make(FAMILIES['llama'] | {'block_size': 96, 'vocab_size': 259})
    x, y, begins = (torch.from_numpy(part[None]) for part in Rows(str(talks / 'data' / 'talk'), 'train', 96).window(0))
    states = []

    def keep(_, args, output):
        output.retain_grad()
        states.append(output)

    model.norm_f.register_forward_hook(keep)  # from these the logits are made
    model(x, y, begins=begins).backward()
    moved = states[0].grad.abs().sum(-1)[0] > 0
    assert torch.equal(moved, y[0] >= 0) and 0 < moved.sum() < 96


# ---- preference tuning

def by_hand(policy, reference, pairs, beta, label_smoothing):
    """The paper's equation 7, a conversation at a time: the mean loss over pairs of (ids, taught)."""
    def log_prob(model, ids, taught):
        logits = model(ids[None])[0, :-1].log_softmax(-1)
        return sum(logits[i, ids[i + 1]] for i in range(len(ids) - 1) if taught[i + 1])

    total = 0
    for chosen, rejected in pairs:
        ratios = []
        for ids, taught in (chosen, rejected):
            ids = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                base = log_prob(reference, ids, taught)
            ratios.append(log_prob(policy, ids, taught) - base)
        margin = beta * (ratios[0] - ratios[1])
        right, wrong = (torch.log(torch.sigmoid(m)) for m in (margin, -margin))
        total = total - (1 - label_smoothing) * right - label_smoothing * wrong
    return total / len(pairs)


PAIRS = [(f'What is {n}?', f'Gladly: {word}!', word) for n, word in enumerate(NUMBERS)]


@pytest.fixture(scope='module')
def two_models():
    settings = FAMILIES['llama'] | {'block_size': 96, 'vocab_size': 259}
    reference, policy = make(settings), make(settings)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return policy, reference


def ours(policy, reference, beta, label_smoothing, tok):
    examples = [rows.encode(tok, ([user(q), assistant(a)], [user(q), assistant(b)], 1), 'dpo', 96)[0] for q, a, b in PAIRS]
    found = rows.fill(np.concatenate(examples), list(map(len, examples)), 'dpo', 96, 256)
    ids, bits = (found % 2**rows.SHIFT).astype(np.int64), found >> rows.SHIFT
    targets = np.full_like(ids, -1)
    targets[:, :-1] = np.where(bits[:, 1:] & rows.TAUGHT, ids[:, 1:], -1)
    x, y, begins = torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(bits & rows.BEGINS > 0)
    assert len(x) < 2 * len(PAIRS)  # several pairs in a row

    from loss import conversation_log_probs
    with torch.no_grad():
        base = conversation_log_probs(reference(x, y, reduction='none', begins=begins), begins, int(begins.sum(1).max()))
    total, rewards = preference(policy(x, y, reduction='none', begins=begins), begins, base, beta, label_smoothing)
    return total / len(PAIRS), rewards / len(PAIRS)


@pytest.mark.parametrize('beta, label_smoothing', [(0.1, 0.0), (0.5, 0.2)])
@pytest.mark.parametrize('chunk', [CHUNK, 10_000])
def test_loss_and_gradient_are_the_papers(two_models, beta, label_smoothing, chunk, monkeypatch):
    import loss
    monkeypatch.setattr(loss, 'CHUNK', chunk)
    policy, reference = two_models
    tok = for_chats(ByteTokenizer())
    pairs = [tuple(encode(tok, [user(q), assistant(a)]) for a in answers) for q, *answers in PAIRS]
    found = []
    how = beta, label_smoothing
    for value in (ours(policy, reference, *how, tok)[0], by_hand(policy, reference, pairs, *how)):
        policy.zero_grad()
        value.backward()
        found.append((value.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)
    value, rewards = ours(reference, reference, beta, label_smoothing, tok)
    assert value.item() == pytest.approx(math.log(2)) and rewards.abs().max() == 0  # the same model twice


def test_loss_and_gradient_are_trls(two_models, tmp_path):
    """Beside the DPO of trl, on models that transformers opened. Its answers go on to their text's end: so must ours."""
    trl, transformers = pytest.importorskip('trl'), pytest.importorskip('transformers')
    datasets = pytest.importorskip('datasets')
    (tmp_path / 'template').write_text(
        "{% for m in messages %}{{ '' if loop.first else '\\n' }}<|im_start|>{{ m['role'] }}\\n{{ m['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}<|im_start|>assistant\\n{% endif %}")
    tok = for_chats(ByteTokenizer().extended(CHATML_TOKENS, {}), str(tmp_path / 'template'))
    theirs = []
    for name, model in zip(('policy', 'reference'), two_models):
        huggingface.write(str(tmp_path / name), model, tok)
        theirs.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name))
    how = trl.DPOConfig(str(tmp_path / 'out'), beta=0.3, per_device_train_batch_size=len(PAIRS), max_length=96, use_cpu=True,
                        report_to=[], bf16=False, gradient_checkpointing=False)
    data = datasets.Dataset.from_list([{'prompt': [user(q)], 'chosen': [assistant(a)], 'rejected': [assistant(b)]}
                                       for q, a, b in PAIRS])
    trainer = trl.DPOTrainer(theirs[0], theirs[1], args=how, train_dataset=data,
                             processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / 'policy'))
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    policy = two_models[0]
    policy.zero_grad()
    value, _ = ours(*two_models, 0.3, 0.0, tok)
    value.backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-5) and abs(value.item() - math.log(2)) > 0.05
    mine = huggingface.to_theirs({name: p.grad for name, p in policy.named_parameters()}, policy.config)
    for name, p in theirs[0].named_parameters():
        assert (mine[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name


def test_chunks_give_the_same_nats():
    x, weight = torch.randn(37, 16, requires_grad=True), torch.randn(301, 16, requires_grad=True)
    targets = torch.randint(301, (37,))
    targets[[0, 9]] = -1
    whole = token_nats(x, weight, targets)
    assert whole[[0, 9]].abs().sum() == 0 and (whole > 0).sum() == 35
    assert whole.sum().item() == pytest.approx(
        torch.nn.functional.cross_entropy(x @ weight.T, targets, ignore_index=-1, reduction='sum').item(), rel=1e-5)


# ---- training

@pytest.mark.slow
def test_sft_learns_to_answer_and_to_stop(place):
    text, _ = run('train.py', *TALK, *SFT, '--max_iters=300', '--batch_size=8', '--learning_rate=1e-2',
                  '--sample_interval=300', '--eval_interval=100',
                  '--out_dir=out/long', cwd=place)
    assert '\n> What is 3?\nIt is three.\n--------' in text and 'python sample.py --out_dir=out/long --chat' in text
    log = read_log(place / 'out' / 'long')
    assert {key for r in log for key in r if key.startswith('val_')} == {'val_loss', 'val_ppl'}
    assert log[-1]['val_loss'] < 0.3 < 3 < log[0]['val_loss']
    process = start('sample.py', '--chat', '--out_dir=out/long', '--temperature=0', cwd=place, stdin=-1)
    out, _ = process.communicate('What is 5?\nAnd 6?\n', timeout=100)
    assert out.split('> ')[1] == 'It is five.\n'


def test_the_vocabulary_grows_and_what_was_there_stays(place):
    run('train.py', *TALK, *SFT, '--max_iters=0', '--out_dir=out/grown', cwd=place)
    before, after = saved(place / 'out' / 'base'), saved(place / 'out' / 'grown')
    assert (before['model_config']['vocab_size'], after['model_config']['vocab_size']) == (257, 259)
    for name, p in before['model'].items():
        assert torch.equal(p, after['model'][name][:len(p)])
    new = after['model']['wte.weight'][257:]
    assert not torch.equal(*new) and 0 < new.norm() < 2 * before['model']['wte.weight'].norm()
    assert tokenizer_from_state(after['tokenizer']).special == {'<|endoftext|>': 256, '<|im_start|>': 257, '<|im_end|>': 258}


@pytest.mark.parametrize('how', [[], ['--optimizer=muon', '--dtype=bfloat16'], ['--dropout=0.1']])
@pytest.mark.parametrize('stage', [SFT, DPO])
def test_interrupted_it_goes_on_exactly(place, stage, how):
    args = [*TALK, *stage, *how, '--max_iters=12', '--eval_interval=4', '--sample_interval=6']
    run('train.py', *args, '--out_dir=out/whole', cwd=place)
    run('train.py', *args, '--out_dir=out/parts', '--max_iters=6', '--lr_decay_iters=12', cwd=place)
    text, _ = run('train.py', '--out_dir=out/parts', '--init_from=resume', '--max_iters=12', cwd=place)
    assert 'computing' not in text  # the reference's log-probabilities are there already
    whole, parts = losses(place / 'out' / 'whole'), losses(place / 'out' / 'parts')
    assert len(whole) == 12 + 4 and {key: whole[key] for key in whole if key != (6, 'val_loss')} == {
        key: parts[key] for key in parts if key != (6, 'val_loss')}
    assert_same(saved(place / 'out' / 'whole')['model'], saved(place / 'out' / 'parts')['model'])


@pytest.mark.parametrize('stage', [SFT, DPO])
def test_two_processes_equal_one(place, stage):
    args = [*TALK, *stage, '--max_iters=6', '--eval_interval=3', '--gradient_accumulation_steps=2']
    run('train.py', *args, '--out_dir=out/two', cwd=place, torchrun=2)
    for path in (place / 'data' / 'pairs').glob('reference*'):
        path.unlink()  # one process computes the other half as well
    run('train.py', *args, '--out_dir=out/one', cwd=place)
    one, two = (read_log(place / 'out' / name) for name in ('one', 'two'))
    assert len(one) == len(two) == 6 + 3
    for a, b in zip(one, two):
        for key in a.keys() - {'time', 'tok_per_sec', 'mfu'}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_dpo_begins_at_log_2_and_overfits_while_the_reference_stays(place):
    before = (place / 'out' / 'sft' / 'ckpt.pt').read_bytes()
    text, _ = run('train.py', *TALK, *DPO, '--max_iters=40', '--learning_rate=3e-3', '--batch_size=16', '--warmup_iters=0',
                  '--out_dir=out/dpo', cwd=place)
    assert 'computing the log-probabilities of out/sft/ckpt.pt' in text
    first, *_, last = [r for r in read_log(place / 'out' / 'dpo') if 'loss' in r]
    assert first['loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(first[key]) for key in ('chosen', 'rejected', 'margin')) < 1e-4
    assert last['accuracy'] == 1 and last['margin'] > 2 and last['chosen'] > last['rejected'] and last['loss'] < 0.2
    evaluations = [r for r in read_log(place / 'out' / 'dpo') if 'val_loss' in r]
    assert set(evaluations[-1]) == {'iter', 'tokens', 'time', 'val_loss', 'val_chosen', 'val_rejected', 'val_accuracy',
                                    'val_margin'}
    assert evaluations[-1]['val_accuracy'] == 1  # the same ten answers
    assert (place / 'out' / 'sft' / 'ckpt.pt').read_bytes() == before
    (train,) = (place / 'data' / 'pairs').glob('reference.train.*.f32')
    kept = train.read_bytes()
    text, _ = run('train.py', *TALK, *DPO, '--max_iters=2', '--out_dir=out/again', cwd=place)
    assert 'computing' not in text and train.read_bytes() == kept

    _, err = run('train.py', '--out_dir=out/again', '--init_from=resume', '--reference=out/base/ckpt.pt', cwd=place, code=2)
    assert "reference='out/base/ckpt.pt' was 'out/sft/ckpt.pt' when the run began, and stays" in err

    # a second round: another model, the same reference
    run('train.py', *TALK, '--stage=dpo', '--dataset=pairs', '--init_from=out/dpo/ckpt.pt', '--reference=out/sft/ckpt.pt',
        '--max_iters=2', '--out_dir=out/second', cwd=place)
    assert read_log(place / 'out' / 'second')[1]['margin'] > 1 and train.read_bytes() == kept


def test_a_reference_that_is_lost_or_damaged(place):
    args = [*TALK, *DPO, '--out_dir=out/dpo']
    run('train.py', *args, '--max_iters=4', cwd=place)
    (train,) = (place / 'data' / 'pairs').glob('reference.train.*.f32')
    kept = train.read_bytes()
    train.write_bytes(kept[:-4])
    resume = ['--out_dir=out/dpo', '--init_from=resume', '--max_iters=6']
    _, err = run('train.py', *resume, cwd=place, code=2)
    assert f'error: data/pairs/{train.name} is damaged' in err and err.rstrip().endswith('remove it, and it is made anew')
    train.unlink()
    text, _ = run('train.py', *resume, cwd=place)
    assert 'computing the log-probabilities of out/sft/ckpt.pt' in text and train.read_bytes() == kept
    train.unlink()
    (place / 'out' / 'sft').unlink()
    (place / 'out' / 'sft').symlink_to(place / 'out' / 'base')
    _, err = run('train.py', *resume, '--max_iters=8', cwd=place, code=2)
    assert "error: reference='out/sft/ckpt.pt' was trained with tokenizer bytes (257 ids)" in err


def test_a_mixture_and_a_mirror(place):
    """Two sets by weight; the copy in the mirror goes on from a bare folder."""
    write_jsonl(place / 'more.jsonl', [{'question': f'Say {word}', 'answer': word} for word in NUMBERS * 2])
    prepare(place, 'more.jsonl', 'sft', '--fields=prompt=question response=answer', '--val_fraction=0.3', size=96)
    args = [*TALK, '--stage=sft', '--dataset=talk:0.7 more:0.3', f'--mirror=file://{place}/mirrored']
    run('train.py', *args, '--init_from=auto:out/base/ckpt.pt', '--max_iters=8', '--out_dir=out/mixed', cwd=place)
    log = read_log(place / 'out' / 'mixed')
    assert 'val_loss/more' in log[0] and 'val_loss/talk' in log[0] and log[-1]['val_loss'] < log[0]['val_loss']
    text, _ = run('train.py', *args, '--init_from=auto:out/base/ckpt.pt', '--max_iters=10', '--out_dir=out/bare', cwd=place)
    assert 'fetched from the mirror, step 8' in text and 'resumed at iter 8' in text


def test_positions_that_are_learned_and_more_than_a_row_has(place):
    """The reference is the model as it was, before its positions are cut; a resume finds it again."""
    pairs = [{'prompt': 'a', 'chosen': word, 'rejected': 'no'} for word in NUMBERS]
    for name, records in (('talk64', [GOOD] * 20), ('pairs64', pairs)):
        write_jsonl(place / f'{name}.jsonl', records)
        prepare(place, f'{name}.jsonl', 'dpo' if name == 'pairs64' else 'sft')
    args = [*TALK, *GPT2, '--block_size=64', '--max_iters=2', '--warmup_iters=0']
    run('train.py', *args, '--block_size=128', '--out_dir=out/long', cwd=place)
    run('train.py', *args, '--stage=sft', '--dataset=talk64', '--init_from=out/long/ckpt.pt', '--out_dir=out/talked', cwd=place)
    prepare(place, 'talk64.jsonl', 'sft', '--overwrite', size=32)
    run('train.py', *args, '--block_size=32', '--stage=sft', '--dataset=talk64', '--init_from=out/talked/ckpt.pt',
        '--out_dir=out/short', cwd=place)
    how = ['--stage=dpo', '--dataset=pairs64', '--init_from=out/talked/ckpt.pt']
    _, err = run('train.py', *args, *how, '--reference=out/short/ckpt.pt', '--out_dir=out/x', cwd=place, code=2)
    assert 'the reference knows 32 positions, fewer than block_size 64' in err
    prepare(place, 'pairs64.jsonl', 'dpo', '--overwrite', size=48)
    run('train.py', *args, *how, '--block_size=48', '--out_dir=out/dpo', cwd=place)
    for path in (place / 'data' / 'pairs64').glob('reference*'):
        path.unlink()
    text, _ = run('train.py', '--init_from=resume', '--max_iters=3', '--out_dir=out/dpo', cwd=place)
    assert 'computing the log-probabilities of out/talked/ckpt.pt' in text


def test_auto_needs_its_model_only_to_begin(place):
    (place / 'model.pt').write_bytes((place / 'out' / 'base' / 'ckpt.pt').read_bytes())
    args = [*TALK, '--stage=sft', '--dataset=talk', '--init_from=auto:model.pt', '--out_dir=out/auto']
    run('train.py', *args, '--max_iters=2', cwd=place)
    (place / 'model.pt').unlink()
    text, _ = run('train.py', *args, '--max_iters=4', cwd=place)
    assert 'resumed at iter 2' in text
    assert "init_from='model.pt' is neither scratch" in refused(place, *args[len(TALK):-1])


def test_tokens_of_the_same_name_have_the_same_ids(place):
    """ChatML's tokens the other way around are another tokenizer."""
    swapped = for_chats(ByteTokenizer().extended(('<|im_end|>', '<|im_start|>'), {}))
    (place / 'swapped.json').write_text(json.dumps(swapped.state()))
    write_jsonl(place / 'other.jsonl', [GOOD] * 9)
    prepare(place, 'other.jsonl', 'sft', '--tokenizer=swapped.json', size=96)
    assert 'whose ids are others' in refused(place, *SFT[:1], '--dataset=other', '--init_from=out/sft/ckpt.pt')


def test_another_template_is_noticed(place):
    (place / 'template').write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")
    write_jsonl(place / 'other.jsonl', [GOOD] * 9)
    write_jsonl(place / 'twos.jsonl', [{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}])
    how = ['--chat_template=template', '--tokenizer=data/talk']
    for file, stage in (('other.jsonl', 'sft'), ('twos.jsonl', 'dpo')):
        prepare(place, file, stage, *how, size=96)
    words = 'was prepared with another chat template than that of'
    assert f'data set twos {words} the model in out/sft/ckpt.pt' in refused(place, *DPO, '--dataset=twos')
    assert f'data set other {words} data set talk' in refused(place, *SFT, '--dataset=talk other')
    (place / 'template').write_text((place / 'template').read_text().replace(': ', ' - '))
    _, err = run('prepare.py', '--source=other.jsonl', '--stage=sft', '--block_size=96', '--val_fraction=0', '--name=other',
                 *how, cwd=place, code=2)
    assert 'data/other exists already, but the chat template is another one now' in err


def test_runs_that_compute_the_same_reference_at_once_do_not_disturb_each_other(place):
    args = [*TALK, *DPO, '--max_iters=2']
    both = [start('train.py', *args, f'--out_dir=out/{name}', cwd=place) for name in 'ab']
    for process in both:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, out + err
    assert losses(place / 'out' / 'a') == losses(place / 'out' / 'b')
    found = sorted(path.name.split('.')[1] for path in (place / 'data' / 'pairs').glob('reference*'))
    assert found == ['train', 'val']


def test_a_manifest_or_a_mask_that_is_wrong(place):
    meta = json.loads((place / 'data' / 'pairs' / 'meta.json').read_text())
    entry = meta['files']['train.bin']

    def changed(**values):
        (place / 'data' / 'pairs' / 'meta.json').unlink()
        (place / 'data' / 'pairs' / 'meta.json').write_text(
            json.dumps(meta | {'files': meta['files'] | {'train.bin': entry | values}}))
        return refused(place, *DPO)

    assert 'its rows are none' in changed(tokens=0) and 'its rows are none' in changed(tokens=entry['tokens'] - 96)
    assert 'its rows are none' in changed(most_in_row=0) and 'its rows are none' in changed(mask=3)
    assert 'train.mask is damaged: row' in changed(most_in_row=1)
    assert 'names no file of its folder' in changed(mask='../../train.mask')
    mask = (place / 'data' / 'pairs' / 'train.mask').read_bytes()
    (place / 'data' / 'pairs' / 'train.mask').unlink()
    (place / 'data' / 'pairs' / 'train.mask').write_bytes(bytes(len(mask)))
    assert 'train.mask has the checksum' in changed()


# ---- out

def test_transformers_gives_the_ids_that_were_trained_on(chats, tmp_path):
    transformers, tok = pytest.importorskip('transformers'), chats
    model = make(FAMILIES['llama'] | {'vocab_size': tok.vocab_size})
    huggingface.write(str(tmp_path), model, tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in ([user('Who are you?'), assistant('I am Pim.\n\nAnd you?')],
                     [{'role': 'system', 'content': ' Be kind. '}, user('a  b\n'), assistant('\n1. c'), user("é, 'tis"),
                      assistant('d')]):
        assert theirs.apply_chat_template(messages, return_dict=False) == encode(tok, messages)[0].tolist()
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == render(tok, messages[:-1])
    config = json.loads((tmp_path / 'generation_config.json').read_text())
    assert config['eos_token_id'] == sorted([tok.eot_id, tok.special['<|im_end|>']])
    again = load_tokenizer(str(tmp_path))
    assert again.stop_ids() == tok.stop_ids() and again.encode('<|im_end|>', special=True) == [tok.special['<|im_end|>']]


def test_an_exported_model_answers_there_as_here(place):
    transformers = pytest.importorskip('transformers')
    run('export.py', '--out_dir=out/sft', '--hf_dir=hf', cwd=place)
    model, tok, _ = load_model(str(place / 'out' / 'sft'))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / 'hf')
    their_tok = transformers.AutoTokenizer.from_pretrained(place / 'hf')
    messages = [user('What is 3?')]
    ids = their_tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=False)
    assert ids[0].tolist() == render(tok, messages)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    card = (place / 'hf' / 'README.md').read_text()
    assert 'conversational' in card and "'content': 'What is 3?'" in card and 'bits per byte' not in card
    other, _, _ = load_model(str(place / 'hf'))
    assert dataclasses.asdict(other.config) == dataclasses.asdict(model.config) and isinstance(other, Transformer)


def test_a_template_with_bos_gives_their_ids_too(tokenizer, tmp_path):
    transformers = pytest.importorskip('transformers')
    (tmp_path / 'template').write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
    tok = for_chats(tokenizer, str(tmp_path / 'template'))
    huggingface.write(str(tmp_path / 'hf'), make(FAMILIES['llama'] | {'vocab_size': tok.vocab_size}), tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    messages = [user('Who are you?'), assistant('Pim.'), user('And I?'), assistant('Ann.')]
    ids, taught = encode(tok, messages)
    assert theirs.apply_chat_template(messages, return_dict=False) == ids.tolist()
    assert ids[0] == (tok.eot_id if tok.bos_id is None else tok.bos_id) and (ids[taught] == tok.eot_id).sum() == 2


def test_the_stops_that_a_tokenizer_has_are_kept():
    stops = ByteTokenizer().extended(('<|eom|>',), {'eos_token_id': [256, 257]})
    assert for_chats(stops).stop_ids() == {256, 257, 259}


# ---- what is refused, or counted

GOOD = {'messages': [user('a'), assistant('b')]}


@pytest.mark.parametrize('stage, record, problem', [
    ('sft', {'messages': [{'role': 'human', 'content': 'a'}, assistant('b')]}, "has a message with the role 'human', which is"),
    ('sft', {'messages': []}, 'holds an empty conversation'),
    ('sft', {'messages': [user('a')]}, 'holds no answer of the assistant'),
    ('sft', {'messages': [user('a'), assistant('  ')]}, 'has an empty message (role assistant)'),
    ('sft', {'messages': [user('a'), assistant(['b'])]}, 'has a message that is no text (role assistant)'),
    ('sft', {'messages': 'a'}, 'holds an empty conversation'),
    ('sft', {'question': 'a'}, 'has no messages or response; its fields are: question, and --fields says which is which'),
    ('sft', ['a'], 'is no object'),
    ('sft', {'prompt': 'a', 'response': None}, 'has no messages or response; its fields are: prompt, response'),
    ('sft', {'prompt': 'a', 'response': ''}, 'has an empty message (role assistant)'),
    ('dpo', {'prompt': 'a', 'chosen': 'b'}, 'has an empty message (role assistant)'),
    ('dpo', {'prompt': 'a', 'response': 'b'}, 'has no chosen; its fields are: prompt, response'),
    ('dpo', {'chosen': [user('a'), assistant('b')], 'rejected': [user('a'), assistant('b'), user('c')]},
     'differs in what is asked, not in what is answered'),
    ('dpo', {'chosen': [user('a'), assistant('b')], 'rejected': [user('c'), assistant('d')]}, 'differs in what is asked')])
def test_a_record_that_is_no_conversation(tmp_path, stage, record, problem):
    good = GOOD if stage == 'sft' else {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}
    write_jsonl(tmp_path / 'a.jsonl', [good, record, good])
    args = ['--source=a.jsonl', f'--stage={stage}', '--block_size=64', '--val_fraction=0', '--name=a']
    _, err = run('prepare.py', *args, cwd=tmp_path, code=2)
    assert f'error: a.jsonl, line 2 {problem}' in err and err.count('\n') == 1 and not (tmp_path / 'data' / 'a').exists()
    text, _ = run('prepare.py', *args, '--skip_broken', cwd=tmp_path)
    assert 'note: 1 records that are not JSON or have no' in text


def test_what_is_left_out_is_counted(tmp_path):
    long = 'x' * 100
    write_jsonl(tmp_path / 'talk.jsonl', [
        GOOD, {'messages': [user('a'), assistant(long)]}, {'messages': [user(long), assistant('b')]},
        {'messages': [user('a <|im_end|>'), assistant('b')]}])
    text = prepare(tmp_path, 'talk.jsonl', 'sft')
    for words in ('were cut at the end of a row', 'were left out, as nothing that is taught, or differs, lies',
                  'were left out, as they spell a special token'):
        assert f'note: 1 conversations {words}' in text, words
    assert '2 conversations in 2 rows of 64 tokens' in text
    data = Rows(str(tmp_path / 'data' / 'talk'), 'train', 64)
    assert all((data.window(k)[1] >= 0).any() for k in range(data.n_windows))
    pairs = [{'prompt': 'a', 'chosen': a, 'rejected': b} for a, b in (('b', 'c'), ('b', 'b'), (long + 'b', long + 'c'))]
    write_jsonl(tmp_path / 'pairs.jsonl', pairs)
    (tmp_path / 'strict').write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    write_jsonl(tmp_path / 'strict.jsonl', [GOOD, {'system': 'x', 'prompt': 'a', 'response': 'b'},
                                            {'prompt': 'half a character: \ud83d', 'response': 'b'}])
    assert 'note: 1 conversations were left out, as the chat template has no form for them' in prepare(
        tmp_path, 'strict.jsonl', 'sft', '--chat_template=strict')
    text = prepare(tmp_path, 'pairs.jsonl', 'dpo')
    for words in ('were left out, as chosen and rejected are the same', 'were left out, as nothing that is taught, or differs'):
        assert f'note: 1 pairs {words}' in text, words
    assert '1 pairs in 2 rows of 64 tokens' in text


def test_every_form_of_a_conversation_gives_the_same_rows(tmp_path):
    parquet, pyarrow = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
    messages = [[{'role': 'system', 'content': 'Be kind.'}, user(f'What is {n}?'), assistant(word)]
                for n, word in enumerate(NUMBERS)]
    write_jsonl(tmp_path / 'a.jsonl', [{'messages': m, 'id': n} for n, m in enumerate(messages)])
    write_jsonl(tmp_path / 'b.jsonl', [{'system': m[0]['content'], 'prompt': m[1]['content'], 'response': m[2]['content']}
                                       for m in messages])
    write_jsonl(tmp_path / 'c.jsonl', [{'s': m[0]['content'], 'q1': m[1]['content'], 'q2': '', 'a': m[2]['content']}
                                       for m in messages])
    parquet.write_table(pyarrow.Table.from_pylist([{'messages': m, 'n': n} for n, m in enumerate(messages)]),
                        tmp_path / 'd.parquet')
    found = set()
    for file, *more in (['a.jsonl'], ['b.jsonl'], ['c.jsonl', '--fields=system=s prompt=q1+q2 response=a'], ['d.parquet']):
        prepare(tmp_path, file, 'sft', *more, size=128)
        data = Rows(str(tmp_path / 'data' / file[0]), 'train', 128)
        found.add(tuple(sorted(tuple(ids[:40]) for k in range(data.n_windows)
                               for ids, _ in conversations_in(*data.window(k)))))
    assert len(found) == 1

    chosen = [[user('a'), assistant(word)] for word in NUMBERS]
    forms = {'e': [{'prompt': 'a', 'chosen': c[1]['content'], 'rejected': 'no'} for c in chosen],
             'f': [{'chosen': c, 'rejected': [user('a'), assistant('no')], 'prompt': 'a'} for c in chosen],
             'g': [{'prompt': [user('a')], 'chosen': c[1:], 'rejected': [assistant('no')]} for c in chosen]}
    found = set()
    for name, records in forms.items():
        write_jsonl(tmp_path / f'{name}.jsonl', records)
        prepare(tmp_path, f'{name}.jsonl', 'dpo')
        data = Rows(str(tmp_path / 'data' / name), 'train', 64)
        windows = [data.window(k) for k in range(data.n_windows)]
        assert all((begins[0] == begins[1]).all() and x.shape == (2, 64) for x, _, begins, _ in windows)
        found.add(tuple(sorted(tuple(ids[:12]) for x, y, begins, _ in windows
                               for ids, _ in conversations_in(x[0], y[0], begins[0]))))
    assert len(found) == 1


def test_a_row_shows_what_is_taught(talks):
    text, _ = run('prepare.py', '--inspect=pairs', cwd=talks)
    assert text.count('\n[[') == text.count('<|im_end|>]]') == 2 and '<|im_start|>assistant\n[[Gladly: ' in text


def refused(place, *args):
    _, err = run('train.py', *TALK, *args, '--out_dir=out/refused', cwd=place, code=2)
    assert err.startswith('error: ') and err.count('\n') == 1 and not (place / 'out' / 'refused').exists()
    return err


def test_what_does_not_belong_together_is_refused(place):
    assert 'data set talk was prepared for --stage=sft' in refused(place, '--dataset=talk')
    assert 'data set tiny was prepared for --stage=pretrain' in refused(place, '--stage=sft')
    assert 'data set pairs was prepared for --stage=dpo' in refused(place, '--stage=sft', '--dataset=pairs')
    assert "stage='dpo' needs a model that answers already" in refused(place, '--stage=dpo', '--dataset=pairs')
    assert 'rows of block_size 96, and here it is 64; use --block_size=96' in refused(place, *SFT, '--block_size=64')
    assert 'stride=3 is for texts' in refused(place, *SFT, '--stride=3')
    assert 'beta=0.0 must be above 0' in refused(place, *DPO, '--beta=0')
    assert 'label_smoothing=0.5 below 0.5' in refused(place, *DPO, '--label_smoothing=0.5')
    assert "criterion='mse' is for stage='pretrain'" in refused(place, *SFT, '--criterion=mse')
    assert 'was trained with tokenizer bytes (257 ids)' in refused(place, *DPO, '--reference=out/base/ckpt.pt')
    base = '--init_from=out/base/ckpt.pt'
    assert 'it has none: --stage=sft comes before dpo' in refused(place, '--stage=dpo', '--dataset=pairs', base)
    assert "reference='none' is neither a checkpoint" in refused(place, *DPO, '--reference=none')
    if os.environ.get('TIKTOKEN_CACHE_DIR'):
        write_jsonl(place / 'other.jsonl', [GOOD])
        prepare(place, 'other.jsonl', 'sft', '--tokenizer=gpt2', size=96)
        assert 'whose ids are others' in refused(place, '--stage=sft', '--dataset=other', base)
    (place / 'text.txt').write_text('Hello')
    for args, problem in ((['--source=text.txt'], 'reads conversations from .jsonl, Parquet or the hub, and text.txt is none'),
                          (['--source=text.txt', '--tokenizer=bpe:300'], 'in the tokenizer of the model that is to learn them'),
                          (['--source=text.txt', '--fields=a=b'], 'a=b is not OURS=THEIRS'),
                          (['--source=text.txt', '--chat_template=none'], "chat_template='none' cannot be read"),
                          (['--source=text.txt', '--parse_special'], "parse_special is for texts, not for stage='sft'"),
                          (['--adopt=data/tiny'], "adopt is for texts, not for stage='sft'"),
                          (['--source=text.txt', '--block_size=16777216'], 'block_size=16777216 is not below')):
        _, err = run('prepare.py', *args, '--stage=sft', '--name=x', cwd=place, code=2)
        assert problem in err and err.count('\n') == 1
