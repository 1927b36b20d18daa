"""The model is GPT-2 and Llama, exactly: sizes, logits and gradients beside Hugging Face's, and no look into the future."""

import runpy

import pytest
import torch
from conftest import ROOT

from attention import attention_in_blocks
from huggingface import to_ours, to_theirs
from model import ModelConfig, Transformer

TINY_GPT2 = dict(block_size=32, vocab_size=96, n_layer=3, n_head=4, n_embd=32, bias=True)
TINY_LLAMA = dict(block_size=32, vocab_size=96, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=80, bias=False,
                  norm='rmsnorm', mlp='swiglu', pos='rope', norm_eps=1e-5)
FAMILIES = {'gpt2': TINY_GPT2, 'llama': TINY_LLAMA, 'llama untied': TINY_LLAMA | {'tie_weights': False},
            'llama, all heads': TINY_LLAMA | {'n_kv_head': 4}}


def make(settings):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms away from their 0 and 1, so that a mix-up shows
            p.add_(torch.randn_like(p) * 0.05)
    return model


def reference(model):
    """Hugging Face's model of the same shape with the same weights."""
    transformers = pytest.importorskip('transformers')
    c = model.config
    if c.pos == 'learned':
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    else:
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
            rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tie_weights))
    theirs = to_theirs(model.state_dict(), c)
    assert theirs.keys() == dict(hf.named_parameters()).keys()  # every parameter of theirs, and each once
    hf.load_state_dict(theirs, strict=not c.tie_weights)
    return hf.eval()


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_and_gradients_equal_hugging_faces(family):
    model = make(FAMILIES[family])
    hf = reference(model)
    idx = torch.randint(0, 96, (3, 32))
    assert torch.allclose(model(idx), hf(idx).logits, atol=1e-4, rtol=0)
    targets = idx.roll(-1, dims=1)
    targets[0, 5:] = targets[2, -1] = -1
    model(idx, targets).backward()
    hf_loss = torch.nn.functional.cross_entropy(hf(idx).logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    hf_loss.backward()
    gradients = to_ours({name: p.grad for name, p in hf.named_parameters()}, model.config)
    for name, p in model.named_parameters():  # to a ten-thousandth of the largest entry, in every parameter
        assert torch.allclose(p.grad, gradients[name], atol=1e-4 * gradients[name].abs().max(), rtol=0), name


@pytest.mark.parametrize('recipe, n', [
    ('gpt2', 124_439_808), ('gpt51m_bookcorpus', 51_008_512), ('llamacraft437m', 437_584_896),
    ('smollm135m', 134_515_008), ('minueza32m_base', 32_792_760)])
def test_recipes_have_the_published_number_of_parameters(recipe, n):
    settings = _defaults()
    settings |= {k: v for k, v in runpy.run_path(str(ROOT / 'config' / f'{recipe}.py')).items() if k in settings}
    with torch.device('meta'):
        model = Transformer(ModelConfig(**settings))
    assert model.count_parameters() == n


def _defaults():
    """The model settings of train.py, as written there."""
    import ast
    import dataclasses
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    tree = ast.parse((ROOT / 'train.py').read_text())
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in names}


@pytest.mark.parametrize('family', FAMILIES)
def test_the_future_does_not_change_past_logits(family):
    model = make(FAMILIES[family])
    idx = torch.randint(0, 96, (2, 32))
    before = model(idx)
    for t in (1, 13, 31):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + torch.randint(0, 95, changed[:, t:].shape)) % 96
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])


@pytest.mark.parametrize('nh, nkv, T', [(4, 4, 32), (6, 2, 40), (3, 1, 16), (2, 2, 5)])
def test_attention_in_blocks_is_attention(nh, nkv, T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 8, dtype=torch.float64, requires_grad=True) for heads in (nh, nkv, nkv))
    attention = torch.nn.functional.scaled_dot_product_attention
    results = [attention_in_blocks(q, k, v, size=16), attention(q, k, v, is_causal=True, enable_gqa=True)]
    there = torch.randn_like(results[0])
    for ours, theirs in zip(*[(y, *torch.autograd.grad(y, (q, k, v), there)) for y in results]):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_training_in_bfloat16_has_the_loss_and_gradients_of_float32(family):
    model = make(FAMILIES[family])
    idx = torch.randint(0, 96, (4, 33))
    losses, gradients = [], []
    for bfloat16 in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            loss = model(idx[:, :-1], idx[:, 1:])
        losses.append(loss)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert losses[0] != losses[1] and torch.allclose(*losses, rtol=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_ignored_targets_neither_count_nor_teach(family):
    model = make(FAMILIES[family])
    idx, targets = torch.randint(0, 96, (2, 2, 32))
    targets[:, 20:] = -1
    loss = model(idx, targets)
    assert torch.allclose(loss, model(idx[:, :20], targets[:, :20]))
    assert torch.allclose(model(idx, targets, reduction='sum'), loss * 40)
    model.zero_grad()
    (gradient,) = torch.autograd.grad(model(idx, torch.where(targets < 0, targets, -1), reduction='sum'),
                                      model.wte.weight)
    assert gradient.abs().max() == 0


def test_rotary_embeddings_see_distances_only():
    model = make(TINY_LLAMA)
    rotation = model.positions.rotation(slice(0, 32))
    q, k = (model.positions.rotate(x.expand(32, 1, 8), rotation)[:, 0] for x in torch.randn(2, 8))  # (T, hs)
    products = q @ k.T  # (query position, key position)
    for distance in (0, 1, 9):
        diagonal = products.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)
    assert (products[9, 0] - products[0, 0]).abs() > 1e-3


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_init_scales_what_writes_into_the_residual_stream(family):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**FAMILIES[family] | {'n_embd': 256, 'n_layer': 8, 'init_std': 0.05}))
    for name, p in model.named_parameters():
        if name.endswith('c_proj.weight'):
            assert abs(p.std() / (0.05 / 4) - 1) < 0.05, name
        elif p.dim() == 2:
            assert abs(p.std() / 0.05 - 1) < 0.05, name
        elif name.endswith('bias'):
            assert p.abs().max() == 0
        else:
            assert (p == 1).all(), name


@pytest.mark.parametrize('settings, words', [
    (dict(n_embd=576, n_head=10), ('n_embd 576', 'n_head 10')),
    (dict(n_head=12, n_kv_head=5), ('n_head 12', 'n_kv_head 5')),
    (dict(n_embd=36, n_head=12, pos='rope'), ('n_embd 36', 'heads of 3')),
    (dict(dropout=1.5), ('dropout 1.5',)),
    (dict(norm='batchnorm'), ('batchnorm', 'rmsnorm')),
    (dict(n_layer=0), ('n_layer 0',)),
])
def test_impossible_shapes_are_refused_with_both_numbers(settings, words):
    with pytest.raises(ValueError) as e:
        ModelConfig(**settings)
    assert all(word in str(e.value) for word in words)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match='33 tokens.*block_size 32'):
        make(TINY_GPT2)(torch.zeros(1, 33, dtype=torch.int64))
