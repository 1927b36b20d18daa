"""Sampling: greedy is the argmax, the filters keep what they promise, and a checkpoint is all that it needs."""

import shutil

import pytest
import torch
from conftest import ROOT, TINY, run
from test_model import FAMILIES, make

from model import generate, probabilities

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])


def test_temperature():
    assert torch.equal(probabilities(LOGITS, 0), torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]))
    assert torch.allclose(probabilities(LOGITS, 0.5), (2 * LOGITS).softmax(-1))


def test_top_k_keeps_the_k_likeliest():
    p = probabilities(LOGITS, top_k=2)
    assert torch.allclose(p[0], torch.tensor([0.7311, 0.2689, 0, 0]), atol=1e-4)
    assert torch.equal(probabilities(LOGITS, top_k=9), LOGITS.softmax(-1))


def test_top_p_keeps_the_smallest_set_that_holds_p():
    # the first row's probabilities are 0.644, 0.237, 0.087, 0.032
    for top_p, kept in ((0.6, 1), (0.7, 2), (0.88, 2), (0.89, 3), (1.0, 4), (1e-9, 1)):
        p = probabilities(LOGITS[:1], top_p=top_p)
        assert (p > 0).sum() == kept and torch.allclose(p.sum(), torch.tensor(1.0))
        assert torch.allclose(p[0, 1] / p[0, 0], torch.tensor(0.0 if kept == 1 else 0.3679), atol=1e-4)


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_greedy_generation_is_the_argmax_of_the_last_context_and_never_a_padding_id(family):
    model = make(FAMILIES[family])
    idx = torch.randint(0, 96, (2, 5))
    tokens = list(generate(model, idx, 40, temperature=0, vocab_size=90))  # runs past block_size 32
    context = idx
    for token in tokens:
        expected = model(context[:, -32:])[:, -1, :90].argmax(-1)
        assert torch.equal(token, expected)
        context = torch.cat((context, token[:, None]), dim=1)


def test_draws_follow_the_probabilities():
    class Fixed(torch.nn.Module):
        config = make(FAMILIES['gpt2']).config

        def forward(self, idx):
            return LOGITS[:1].expand(len(idx), idx.size(1), 4)

    (drawn,) = generate(Fixed(), torch.zeros(20_000, 1, dtype=torch.int64), 1, top_k=3,
                        generator=torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(found, probabilities(LOGITS[:1], top_k=3)[0], atol=0.01) and found[3] == 0


def test_the_owl_is_recited_from_its_first_words(place):
    """config/mini_owl.py as written, then greedy sampling, from the checkpoint alone."""
    run('train.py', str(ROOT / 'config' / 'mini_owl.py'), '--sample_interval=0', cwd=place, env={'OMP_NUM_THREADS': '2'})
    bare = place / 'elsewhere'  # no data, no log: a checkpoint needs nothing beside it
    bare.mkdir()
    shutil.copy(place / 'out' / 'mini_owl' / 'ckpt.pt', bare / 'owl.pt')
    story = (ROOT / 'data' / 'owl.txt').read_text()
    (bare / 'beginning.txt').write_text('In the bakery')
    greedy = ('--init_from=owl.pt', '--temperature=0')
    for how in ('--prompt=In the bakery', '--prompt_file=beginning.txt'):
        out, _ = run('sample.py', *greedy, how, cwd=bare)
        assert out == story + '\n'  # it begins with the prompt, and ends at end-of-text


def test_seeds_and_several_samples(place):
    run('train.py', *TINY, cwd=place)
    args = ('--out_dir=out/tiny', '--prompt=def ', '--max_new_tokens=30', '--temperature=1.5')
    three, _ = run('sample.py', *args, '--num_samples=3', cwd=place)
    samples = three.split('\n--------\n')
    assert len(samples) == 3 and len(set(samples)) == 3 and all(s.startswith('def ') for s in samples)
    assert run('sample.py', *args, cwd=place)[0].rstrip('\n') == samples[0].rstrip('\n')
    assert run('sample.py', *args, '--seed=1338', cwd=place)[0].rstrip('\n') == samples[1].rstrip('\n')
    assert run('sample.py', *args, '--prompt=', cwd=place)[0]  # from end-of-text
