"""Generation: cached equals uncached, a batch equals one by one, and what is drawn and shown is what was asked for."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from test_model import FAMILIES, make

from attention import KVCache
from configurator import UserError
from generation import (
    Sampling,
    Writer,
    draw,
    generate,
    logits_after,
    penalize,
    prefill,
    probabilities,
    until_stop,
    window_start,
)
from tokenizer import ByteTokenizer

FAMILIES = FAMILIES | {'mistral': FAMILIES['llama'] | {'sliding_window': 9}}
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
GREEDY = Sampling(max_new_tokens=70, temperature=0)


def lively(family):
    """A model whose greedy text does not repeat itself."""
    model = make(FAMILIES[family])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if 'wte' in name else 4)
    return model


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def naive_greedy(model, ids, n, vocab_size=None):
    """The oracle: no cache, the whole context read for every token. n ids that follow."""
    ids, size = list(ids), model.config.block_size
    for _ in range(n):
        start = 0
        while len(ids) - start > size:
            start += size // 4
        ids.append(model(torch.tensor([ids[start:]]))[0, -1, :vocab_size].argmax().item())
    return ids[-n:]


@pytest.mark.parametrize('family', FAMILIES)
def test_cached_logits_equal_uncached(family):
    model = make(FAMILIES[family])
    idx = torch.randint(0, 96, (2, 32))
    expected = model(idx)
    for pieces in ((32,), (1,) * 32, (7, 1, 1, 12, 5, 1, 5)):
        cache = KVCache(model.config, 2, 32)
        found = torch.cat([model(piece, cache=cache) for piece in idx.split(pieces, dim=1)], dim=1)
        assert (found - expected).abs().max() < 1e-5
        with pytest.raises(ValueError, match='32 tokens and 1 more are beyond the 32 slots'):
            model(idx[:, :1], cache=cache)


def test_grouped_heads_are_cached_once():
    cache = KVCache(make(FAMILIES['llama']).config, 2, 32)
    assert {tuple(part.shape) for part in cache.k + cache.v} == {(2, 2, 32, 8)}  # of four query heads


@pytest.mark.parametrize('family', FAMILIES)
def test_greedy_with_cache_equals_greedy_without_past_the_block_size(family):
    model = lively(family)
    prompts = [torch.randint(0, 90, (n,)).tolist() for n in (5, 1, 31, 32, 33, 50)]
    expected = [naive_greedy(model, prompt, 70, vocab_size=90) for prompt in prompts]
    assert all(len(set(ids)) > 15 for ids in expected)  # worth comparing
    unknown = torch.arange(96) >= 90
    for prompt, ids in zip(prompts, expected):
        assert [i for (i,) in generate(model, [prompt], GREEDY, generators(0), unknown)] == ids
    together = list(generate(model, prompts, GREEDY, generators(*range(6)), unknown))
    assert [list(row) for row in zip(*together)] == expected


@pytest.mark.parametrize('family', FAMILIES)
def test_padding_changes_no_logits(family):
    """Prompts of different lengths in one batch: logits of the first token and of one after it."""
    model = make(FAMILIES[family])
    contexts = [torch.randint(0, 96, (n,)).tolist() for n in (3, 17, 31)]
    logits, cache = prefill(model, contexts, 32)
    after = model(torch.tensor([[7], [8], [9]]), cache=cache)[:, 0]
    for row, (context, new) in enumerate(zip(contexts, (7, 8, 9))):
        expected = model(torch.tensor([context + [new]]))[0]
        assert (logits[row] - expected[-2]).abs().max() < 1e-5
        assert (after[row] - expected[-1]).abs().max() < 1e-5


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'mistral'])
def test_a_sample_does_not_depend_on_its_batch(family):
    model = make(FAMILIES[family])
    sampling = Sampling(max_new_tokens=45, temperature=1.3, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    prompts = [[1, 2, 3], [4] * 20, [1, 2, 3], [5, 6]]
    together = [list(row) for row in zip(*generate(model, prompts, sampling, generators(1, 2, 3, 4)))]
    for prompt, seed, ids in zip(prompts, (1, 2, 3, 4), together):
        assert [i for (i,) in generate(model, [prompt], sampling, generators(seed))] == ids
    assert together[0] != together[2]  # the same prompt, another seed


def test_equal_prompts_are_read_once(monkeypatch):
    model, read = make(FAMILIES['llama']), []
    hidden = model.hidden
    monkeypatch.setattr(model, 'hidden', lambda idx, *rest: read.append(tuple(idx.shape)) or hidden(idx, *rest))
    list(generate(model, [[1, 2, 3]] * 4, Sampling(max_new_tokens=3), generators(1, 2, 3, 4)))
    assert read == [(1, 3), (4, 1), (4, 1)]


def test_the_context_drops_its_oldest_quarter_when_it_is_full():
    starts = [window_start(n, 32) for n in range(100)]
    assert starts[:33] == [0] * 33 and starts[33:41] == [8] * 8 and starts[41] == 16
    assert all(n - start <= 32 for n, start in enumerate(starts))
    assert all(n - start > 24 for n, start in enumerate(starts) if start)
    assert [window_start(n, 2) for n in range(6)] == [0, 0, 0, 1, 2, 3]
    assert [window_start(n, 1) for n in range(4)] == [0, 0, 1, 2]


# ---- what is drawn

def test_temperature():
    assert torch.equal(probabilities(LOGITS, 0), torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]))
    assert torch.allclose(probabilities(LOGITS, 0.5), (2 * LOGITS).softmax(-1))
    assert torch.equal(probabilities(LOGITS, 1e-40)[0], torch.tensor([1.0, 0, 0, 0]))  # no overflow


def test_top_k_keeps_the_k_likeliest():
    p = probabilities(LOGITS, top_k=2)
    assert torch.allclose(p[0], torch.tensor([0.7311, 0.2689, 0, 0]), atol=1e-4)
    assert torch.equal(probabilities(LOGITS, top_k=9), probabilities(LOGITS))


def test_top_p_keeps_the_smallest_set_that_holds_p():
    # the first row's probabilities are 0.644, 0.237, 0.087, 0.032
    for top_p, kept in ((0.6, 1), (0.7, 2), (0.88, 2), (0.89, 3), (1.0, 4), (1e-9, 1)):
        p = probabilities(LOGITS[:1], top_p=top_p)
        assert (p > 0).sum() == kept and torch.allclose(p.sum(), torch.tensor(1.0))
        assert torch.allclose(p[0, 1] / p[0, 0], torch.tensor(0.0 if kept == 1 else 0.3679), atol=1e-4)


@pytest.mark.parametrize('settings', [
    dict(temperature=0.7), dict(top_k=5), dict(top_p=0.3), dict(top_p=0.999), dict(min_p=0.1),
    dict(temperature=1.7, top_k=40, top_p=0.8, min_p=0.02)])
def test_the_filters_are_those_of_transformers(settings):
    processors = pytest.importorskip('transformers').generation.logits_process
    torch.manual_seed(0)
    logits = torch.randn(3, 5000) * 2
    theirs = processors.LogitsProcessorList(
        kind(settings[name]) for name, kind in (('temperature', processors.TemperatureLogitsWarper),
                                                ('top_k', processors.TopKLogitsWarper),
                                                ('top_p', processors.TopPLogitsWarper),
                                                ('min_p', processors.MinPLogitsWarper)) if name in settings)
    expected = theirs(None, logits.clone()).softmax(-1)
    found = probabilities(logits, **settings)
    assert torch.equal(found > 0, expected > 0)
    assert (found - expected).abs().max() < 1e-6


def test_the_repetition_penalty_is_that_of_transformers():
    processors = pytest.importorskip('transformers').generation.logits_process
    logits, ids = torch.randn(2, 50), torch.tensor([[1, 2, 3], [4, 4, 49]])
    seen = torch.zeros(2, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.allclose(penalize(logits, seen, 1.3), expected)


def test_what_came_before_is_penalized_in_prompt_and_answer():
    """Beside a loop with transformers' own penalty, on a text whose plain continuation repeats itself."""
    penalty = pytest.importorskip('transformers').generation.logits_process.RepetitionPenaltyLogitsProcessor(1.5)
    model, ids = make(FAMILIES['llama']), [1, 2, 3]
    with torch.no_grad():
        for _ in range(25):
            idx = torch.tensor([ids])
            ids.append(penalty(idx, model(idx)[:, -1]).argmax().item())
    found = generate(model, [[1, 2, 3]], Sampling(max_new_tokens=25, temperature=0, repetition_penalty=1.5), generators(0))
    assert [i for (i,) in found] == ids[3:]
    assert ids[3:] != naive_greedy(model, [1, 2, 3], 25)


def test_draws_follow_the_probabilities_and_never_hit_a_zero():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]]).expand(20_000, 6)
    drawn = draw(p, generators(*range(20_000)))
    found = torch.bincount(drawn, minlength=6) / 20_000
    assert torch.allclose(found, p[0], atol=0.015) and (found[p[0] == 0] == 0).all()


def test_the_ends_of_the_scale_hit_no_zero(monkeypatch):
    for chance in (0.0, 1 - 2**-53):
        monkeypatch.setattr(torch, 'rand', lambda *a, chance=chance, **k: torch.tensor([chance], dtype=torch.float64))
        for first, last in ((1, 3), (0, 4), (2, 2)):
            p = torch.zeros(1, 5)
            p[0, first], p[0, last] = 0.7, 0.1
            assert draw(p, [None]).item() == (first if chance == 0 else last)


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn():
    class Gaps(ByteTokenizer):
        def known_ids(self):
            return set(range(90)) - {5, 6, 7} | {256}  # and the model has 96

    writer = Writer(make(FAMILIES['gpt2']), Gaps())
    assert writer.unknown.nonzero().flatten().tolist() == [5, 6, 7, *range(90, 96)]
    sampling = Sampling(max_new_tokens=3000, temperature=1e6)  # nearly uniform
    drawn = {i for (i,) in generate(writer.model, [[1]], sampling, generators(0), writer.unknown)}
    assert drawn == set(range(90)) - {5, 6, 7}


@pytest.mark.parametrize('setting, rule', [
    (dict(temperature=-1), 'temperature=-1 must be 0 or more'), (dict(temperature=float('nan')), 'temperature=nan must be'),
    (dict(top_k=-1), 'top_k=-1 must be'), (dict(top_p=0), 'top_p=0 must be above 0 and at most 1'),
    (dict(top_p=1.1), 'top_p=1.1'), (dict(min_p=-0.1), 'min_p=-0.1'), (dict(repetition_penalty=0), 'repetition_penalty=0'),
    (dict(max_new_tokens=-1), 'max_new_tokens=-1 must be 0 or more')])
def test_settings_out_of_range_are_refused(setting, rule):
    with pytest.raises(UserError, match=rule):
        Sampling(**setting)


# ---- what is shown

def shown(ids, stops=()):
    """[(text, ended) of each id] as a writer shows them."""
    text_of = until_stop(ByteTokenizer().stream(), stops)
    return [text_of(i) for i in ids]


def test_half_a_character_is_never_shown():
    ids = list('aé€🦉'.encode())
    texts = [text for text, _ in shown(ids)]
    assert ''.join(texts) == 'aé€🦉' and texts == ['a', '', 'é', '', '', '€', '', '', '', '🦉']
    assert ''.join(text for text, _ in shown(ids[:-1])) == 'aé€'


def test_a_stop_ends_the_text_and_no_part_of_it_is_shown():
    steps = shown(b'one. User: two', stops=('User:', 'zzz'))
    end = next(n for n, (_, ended) in enumerate(steps) if ended)
    assert ''.join(text for text, _ in steps[:end + 1]) == 'one. ' and end == len('one. User:') - 1
    assert ''.join(text for text, _ in shown(b'one. Us and', stops=('User:',))) == 'one. Us and'  # held back, then shown
    assert shown(b'aab', stops=('aab', 'ab'))[-1] == ('', True)  # the one that begins first
    text_of = until_stop(ByteTokenizer().stream(), ('User:',))
    assert [text_of(i) for i in b'Us'] == [('', False)] * 2 and text_of(None) == ('Us', True)  # the text ended there


def test_rows_end_by_themselves(monkeypatch):
    """At end-of-text, at a stop, or at the last token; each with all of its text."""
    writer = Writer(make(FAMILIES['gpt2'] | {'vocab_size': 257}), ByteTokenizer())
    rows = [[*b'ab', 256, *b'xxxxx'], [*b'a STOP b'], [*'aé'.encode(), *b'S' * 5]]
    monkeypatch.setattr('generation.generate', lambda *_: (list(ids) for ids in zip(*rows)))
    sampling = Sampling(max_new_tokens=8, stop=('STOP',))
    texts, counts, ends = ['', '', ''], [0, 0, 0], [0, 0, 0]
    for row, text, ended in writer.write([[1]] * 3, sampling, seeds=[1, 2, 3]):
        texts[row] += text
        counts[row] += 1
        ends[row] += ended
    assert texts == ['ab', 'a ', 'aéSSSSS'] and counts == [3, 6, 8] and ends == [1, 1, 1]


def test_a_prompt_that_the_model_cannot_read_is_refused():
    writer = Writer(make(FAMILIES['gpt2']), ByteTokenizer())
    with pytest.raises(UserError, match='token 104 of the tokenizer bytes, and the model knows only the ids below 96'):
        list(writer.write([list(b'h')], Sampling(), seeds=[1]))


# ---- what makes it fast

compiles = pytest.mark.skipif(not shutil.which('g++') or not Path(sysconfig.get_path('include'), 'Python.h').exists(),
                              reason="torch.compile needs a C++ compiler and Python's headers")


def wide(family):
    """A model whose layers are large enough to be laid out anew."""
    return make(FAMILIES[family] | {'n_embd': 512, 'n_inner': 1024, 'n_layer': 2, 'vocab_size': 600})


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'llama untied'])
@pytest.mark.parametrize('dtype, close', [('float32', 1e-5), ('bfloat16', 0.03), ('int8', 0.15), ('float16', 0.005)])
def test_weights_made_ready_give_the_same_logits(family, dtype, close):
    model, idx = wide(family), torch.randint(0, 600, (2, 20))
    with torch.no_grad():
        expected = model(idx)
        writer = Writer(model, ByteTokenizer(), dtype=dtype)
        found = writer.model(idx).float()
        replaced = not any(type(module) is torch.nn.Linear for module in writer.model.modules())
        assert replaced == (dtype != 'float16') or dtype == 'bfloat16' and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert (found - expected).std() < close * expected.std()
        cache = KVCache(model.config, 2, 32)
        cached = torch.cat([writer.model(piece, cache=cache) for piece in idx.split((12, 1, 7), dim=1)], dim=1)
        assert (cached - found).std() < close * expected.std()


@pytest.mark.slow
@compiles
@pytest.mark.parametrize('family', ['gpt2', 'mistral'])
def test_compiled_equals_uncompiled(family, capfd):
    expected = list(generate(lively(family), [[1, 2, 3]], GREEDY, generators(0)))
    writer = Writer(lively(family), ByteTokenizer(), compile=True)
    found = list(generate(writer.model, [[1, 2, 3]], GREEDY, generators(0), step=writer.step))
    assert found == expected
    assert 'does not work here' not in capfd.readouterr().err  # it did not go on without


@compiles
def test_two_compiled_models_are_told_apart(capfd):
    for norm_eps in (1e-5, 0.5):
        settings = FAMILIES['llama'] | {'norm_eps': norm_eps, 'n_layer': 1}
        expected = list(generate(make(settings), [[1, 2, 3]], Sampling(max_new_tokens=9, temperature=0), generators(0)))
        writer = Writer(make(settings), ByteTokenizer(), compile=True)
        assert list(generate(writer.model, [[1, 2, 3]], Sampling(max_new_tokens=9, temperature=0), generators(0),
                             step=writer.step)) == expected
    assert 'does not work here' not in capfd.readouterr().err


@pytest.mark.parametrize('temperature', [1.0, 0.0])
def test_logits_that_are_no_numbers_are_said(temperature):
    model = make(FAMILIES['gpt2'])
    with torch.no_grad():
        model.norm_f.weight.fill_(float('nan'))
    with pytest.raises(UserError, match='logits are not finite numbers'):
        next(generate(model, [[1]], Sampling(temperature=temperature), generators(0)))


@pytest.mark.parametrize('family', FAMILIES)
def test_shapes_that_never_change_give_the_same(family):
    model, shapes = lively(family), set()

    def step(model, idx, where, mask, cache):
        shapes.add((idx.shape, where.shape, mask.shape, cache.reach))
        return logits_after(model, idx, where, mask, cache)

    for prompts in ([[1, 2, 3]], [[1, 2, 3], [5] * 30, [7] * 9]):
        shapes.clear()
        seeds = range(len(prompts))
        expected = list(generate(model, prompts, GREEDY, generators(*seeds)))
        assert list(generate(model, prompts, GREEDY, generators(*seeds), step=step)) == expected
        assert len(shapes) == 1
