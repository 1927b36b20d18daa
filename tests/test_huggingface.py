"""A model from Hugging Face opens here, and a model from here opens there, exactly: logits, ids, text, bytes."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from conftest import GPT2, ROOT, TINY, run, write_tokens
from test_errors import Evil, fails
from test_model import FAMILIES, make
from test_tokenizer import KINDS, ODD, gpt2_json, mistral_json, mistral_model, trained

import checkpoint
import huggingface
from configurator import UserError
from model import Transformer
from tokenizer import HuggingFaceTokenizer, load_tokenizer

transformers = pytest.importorskip('transformers')
safetensors = pytest.importorskip('safetensors.torch')

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
SMALL_GPT2 = dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
THEIRS = {
    'gpt2': ('GPT2', {}), 'gpt2, wider inside, other epsilon': ('GPT2', {'n_inner': 72, 'layer_norm_epsilon': 1e-3}),
    'gpt2, untied': ('GPT2', {'tie_word_embeddings': False}),
    'llama': ('Llama', {}), 'llama, tied': ('Llama', {'tie_word_embeddings': True}),
    'llama, all heads': ('Llama', {'num_key_value_heads': 4}), 'llama, one head': ('Llama', {'num_key_value_heads': 1}),
    'llama, theta and epsilon': ('Llama', {'rope_theta': 500.0, 'rms_norm_eps': 1e-2}),
    'llama, biases': ('Llama', {'attention_bias': True, 'mlp_bias': True}),
    'llama, rope linear': ('Llama', {'rope_scaling': {'rope_type': 'linear', 'factor': 2.5}}),
    'llama, rope llama3': ('Llama', {'rope_scaling': LLAMA3, 'rope_theta': 300.0}),
    'mistral, window': ('Mistral', {'sliding_window': 9}), 'mistral, no window': ('Mistral', {'sliding_window': None}),
    'mistral, window beyond': ('Mistral', {'sliding_window': 4096, 'rope_theta': 1e6}),
}


def their_model(kind, changes):
    """A model of transformers' with random weights, biases and norms away from their 0 and 1."""
    torch.manual_seed(1)
    config = getattr(transformers, f'{kind}Config')(**(SMALL_GPT2 if kind == 'GPT2' else SMALL) | changes)
    model = getattr(transformers, {'GPT2': 'GPT2LMHeadModel'}.get(kind, f'{kind}ForCausalLM'))(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def add_tokenizer(folder, text=None):
    """A tokenizer.json beside the weights; of the 96 tokens that the small models know, if none is given."""
    (folder / 'tokenizer.json').write_text(text or small_tokenizer(), encoding='utf-8')


def small_tokenizer():
    tokenizers = pytest.importorskip('tokenizers')
    letters = {chr(33 + i): i for i in range(94)} | {'Ġ': 94, '<|endoftext|>': 95}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(['<|endoftext|>'])
    return bpe.to_str()


@torch.no_grad()
def difference(ours, theirs, vocab_size, T=64):
    """The largest difference of logits, float32."""
    idx = torch.randint(0, vocab_size, (2, T), generator=torch.Generator().manual_seed(5))
    return (ours(idx)[..., :vocab_size] - theirs(idx).logits[..., :vocab_size]).abs().max().item()


@pytest.mark.parametrize('name, form', [*((name, form) for name in THEIRS for form in ('one file', 'shards')),
                                        ('gpt2', "the hub's")])
def test_their_model_opens_here_with_the_same_logits(tmp_path, name, form):
    theirs = their_model(*THEIRS[name])
    if form == "the hub's":  # without a prefix
        weights = {key.removeprefix('transformer.'): p for key, p in theirs.state_dict().items() if key != 'lm_head.weight'}
        weights |= {f'h.{i}.attn.bias': torch.ones(1, 1, 64, 64).tril() for i in range(3)}  # the mask that older files have
        theirs.config.save_pretrained(tmp_path)
        safetensors.save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    else:
        theirs.save_pretrained(tmp_path, max_shard_size='20KB' if form == 'shards' else '5GB')
        assert (len(list(tmp_path.glob('*.safetensors'))) > 2) == (form == 'shards')
    add_tokenizer(tmp_path)
    ours, _, _ = checkpoint.load_model(str(tmp_path))
    assert difference(ours, theirs, 96) < 1e-5
    assert ours.count_parameters() == theirs.num_parameters()


def test_the_window_and_the_scaling_are_felt():
    """What the parity above shows would be nothing if these switches did not change the logits."""
    base = make(FAMILIES['llama'])
    idx = torch.randint(0, 96, (1, 32))
    for change in ({'sliding_window': 9}, {'rope_scaling': 'linear:2'}, {'rope_scaling': 'llama3:8,1,4,16'}):
        other = Transformer(dataclasses.replace(base.config, **change)).eval()
        other.load_state_dict(base.state_dict())
        assert (other(idx) - base(idx)).abs().max() > 1e-3
    windowed = Transformer(dataclasses.replace(base.config, n_layer=1, sliding_window=9)).eval()
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 96
    moved = (windowed(idx) - windowed(changed)).abs().amax(-1)[0]
    assert (moved[10:19] > 0).all() and (moved[19:] == 0).all() and (moved[:10] == 0).all()  # 9 queries see it, its own too


OURS = FAMILIES | {
    'gpt2 without biases': FAMILIES['gpt2'] | {'bias': False}, 'llama with biases': FAMILIES['llama'] | {'bias': True},
    'mistral': FAMILIES['llama'] | {'sliding_window': 9}, 'gpt2 untied': FAMILIES['gpt2'] | {'tie_weights': False},
    'llama, linear': FAMILIES['llama'] | {'rope_scaling': 'linear:1.5', 'rope_theta': 500.0},
    'llama, llama3': FAMILIES['llama'] | {'rope_scaling': 'llama3:8,1,4,16', 'norm_eps': 1e-3, 'dropout': 0.1,
                                          'init_std': 0.03}}


def byte_model(family, vocab_size=257, **changes):
    return make(OURS[family] | {'vocab_size': vocab_size} | changes)


@pytest.mark.parametrize('family', OURS)
def test_our_model_opens_there_with_the_same_logits_and_greedy_text(tmp_path, family):
    tok = load_tokenizer('bytes')
    ours = byte_model(family, vocab_size=320)  # 63 rows of padding
    huggingface.write(str(tmp_path), ours, tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32 and theirs.config.vocab_size == 257 == len(theirs.get_output_embeddings().weight)
    assert type(theirs).__name__ == {'gpt': 'GPT2LMHeadModel', 'mis': 'MistralForCausalLM'}.get(family[:3], 'LlamaForCausalLM')
    assert difference(ours, theirs, 257, T=32) < 1e-5

    with torch.no_grad():
        for name, p in [*ours.named_parameters(), *theirs.named_parameters()]:
            p.mul_(1 if 'wte' in name or 'embed' in name else 6)  # so that the text does not repeat itself
        prompt = expected = torch.tensor([tok.encode('In the be')])
        for _ in range(20):
            expected = torch.cat((expected, ours(expected)[:, -1:, :257].argmax(-1)), dim=1)
    found = theirs.generate(prompt, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=256)
    assert torch.equal(found, expected) and len(set(expected[0, 9:].tolist())) > 2


@pytest.mark.parametrize('family', OURS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_export_import_export_changes_no_byte(tmp_path, family, dtype):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
    huggingface.write(str(tmp_path / 'a'), byte_model(family, vocab_size=320), load_tokenizer('bytes'), dtype)
    model, tokenizer, _ = checkpoint.load_model(str(tmp_path / 'a'))
    huggingface.write(str(tmp_path / 'b'), model, tokenizer, dtype)
    files = sorted(os.listdir(tmp_path / 'a'))
    assert files == sorted(os.listdir(tmp_path / 'b')) and len(files) == 5
    for file in files:
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes(), file


@pytest.fixture(params=[*KINDS, 'like cl100k'], scope='module')
def tokenizer(request, tmp_path_factory):
    kind = request.param
    if kind == 'like cl100k':
        import tiktoken_ext.openai_public as known

        from tokenizer import TiktokenTokenizer
        gpt2, patch = load_tokenizer('gpt2'), pytest.MonkeyPatch()
        with patch.context() as p:  # its words and specials, on the ranks of GPT-2, which are at hand
            p.setattr(known, 'load_tiktoken_bpe', lambda *args, **kwargs: gpt2.ranks)
            made = known.cl100k_base()
        return TiktokenTokenizer('cl100k', made['pat_str'], gpt2.ranks, {'<|endoftext|>': 50300, '<|fim|>': 50256})
    if kind in ('bytes', 'gpt2'):
        if kind == 'gpt2' and not os.environ.get('TIKTOKEN_CACHE_DIR'):
            pytest.skip('the BPE file of gpt2 is not at hand: no TIKTOKEN_CACHE_DIR')
        return load_tokenizer(kind)
    if kind == 'mistral':
        return load_tokenizer(mistral_model())
    folder = tmp_path_factory.mktemp('tokenizer')
    text = {'trained': trained, 'gpt2 as tokenizer.json': gpt2_json, 'mistral as tokenizer.json': mistral_json}[kind]()
    (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
    return load_tokenizer(str(folder))


@pytest.mark.filterwarnings('ignore')
def test_every_tokenizer_gives_the_same_ids_there(tokenizer, tmp_path):
    model = make(FAMILIES['llama'] | {'vocab_size': tokenizer.vocab_size})
    huggingface.write(str(tmp_path), model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text_only = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    texts = [*ODD, *tokenizer.probes()]
    for text in texts:
        assert text_only.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        if '<' not in text:
            assert theirs(text)['input_ids'] == [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]),
                                                 *tokenizer.encode(text)]
            ids = tokenizer.encode(text)
            assert theirs.decode(ids) == tokenizer.decode(ids) == text or tokenizer.dummy_prefix and text[:1] == ' '
    assert (theirs.eos_token_id, max(theirs.get_vocab().values())) == (tokenizer.eot_id, tokenizer.vocab_size - 1)
    assert theirs.bos_token_id == (tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id)
    spelled = f'one{theirs.eos_token}two'
    assert theirs.encode(spelled, add_special_tokens=False).count(tokenizer.eot_id) == 1
    again = load_tokenizer(str(tmp_path))
    assert (again.eot_id, again.bos_id) == (tokenizer.eot_id, tokenizer.bos_id)
    assert again.agrees_with(tokenizer) and tokenizer.agrees_with(again)
    (tmp_path / 'again').mkdir()
    huggingface.write(str(tmp_path / 'again'), model, again)
    for file in os.listdir(tmp_path / 'again'):
        assert (tmp_path / 'again' / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_a_probe_tells_two_tokenizers_apart(tokenizer):
    bytes_ = load_tokenizer('bytes')
    assert tokenizer.agrees_with(bytes_) == bytes_.agrees_with(tokenizer) == (tokenizer.name == 'bytes')
    if tokenizer.name.endswith('gpt2'):
        spec = json.loads(gpt2_json())
        spec['pre_tokenizer']['add_prefix_space'] = True
        assert not tokenizer.agrees_with(HuggingFaceTokenizer('spaced', json.dumps(spec), 50256))


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_other_sentencepiece_models_go_out_too(tmp_path, kind):
    """Trained here, with SentencePiece's defaults: text normalised, blanks put together; and with a symbol of one's own."""
    sentencepiece = pytest.importorskip('sentencepiece')
    text = tmp_path / 'text.txt'
    text.write_text((ROOT / 'data' / 'owl.txt').read_text() * 20 + 'ﬁne ½ ＡＢＣ naïve\n' * 20)
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / 'uni'), vocab_size=400,
                                             byte_fallback=True, minloglevel=2, user_defined_symbols=['<|im_start|>'],
                                             model_type=kind)
    tok = load_tokenizer(str(tmp_path / 'uni.model'))
    huggingface.write(str(tmp_path), make(FAMILIES['llama'] | {'vocab_size': 600}), tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ('In the bakery, the  owl', 'ﬁne ½ ＡＢＣ', 'x <|im_start|>y <|im_start|> z', 'a 🍞', *tok.probes()):
        assert theirs(text)['input_ids'] == tok.beginning(text), text
    assert load_tokenizer(str(tmp_path)).agrees_with(tok)


@pytest.mark.parametrize('kind', ['GPT2', 'Llama'])
def test_a_tied_model_may_be_stored_by_its_output_layer_alone(tmp_path, kind):
    """As safetensors' own save_model stores it; and rope_theta null, which is the default."""
    theirs = their_model(kind, {'tie_word_embeddings': True})
    theirs.config.save_pretrained(tmp_path)
    safetensors.save_model(theirs, str(tmp_path / 'model.safetensors'))
    assert 'lm_head.weight' in safetensors.load_file(tmp_path / 'model.safetensors')
    break_config(tmp_path, rope_parameters=None, rope_theta=None)
    add_tokenizer(tmp_path)
    ours, _, _ = checkpoint.load_model(str(tmp_path))
    assert difference(ours, theirs, 96) < 1e-5


def test_the_ids_of_config_and_generation_config_are_taken_and_handed_on(tmp_path):
    """An end of text that only config.json names; several of them; what batches need."""
    their_model('Llama', {'eos_token_id': 90}).save_pretrained(tmp_path / 'a')
    spec = json.loads(small_tokenizer())
    spec['model']['vocab'].pop('<|endoftext|>')
    spec['model']['vocab']['<END>'], spec['added_tokens'][0]['content'] = 95, '<END>'
    add_tokenizer(tmp_path / 'a', json.dumps(spec))
    (tmp_path / 'a' / 'generation_config.json').write_text('{"eos_token_id": [90, 95]}')
    (tmp_path / 'a' / 'tokenizer_config.json').write_text('{"pad_token": "<END>"}')
    model, tok, _ = checkpoint.load_model(str(tmp_path / 'a'))
    assert tok.eot_id == 90
    huggingface.write(str(tmp_path / 'b'), model, tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
    assert theirs.generation_config.eos_token_id == [90, 95]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'b').pad_token == '<END>'


def test_a_chat_template_is_handed_on(tmp_path):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    for n, place in enumerate(('tokenizer_config.json', 'chat_template.jinja')):
        folder = tmp_path / str(n)
        folder.mkdir()
        add_tokenizer(folder)
        text = json.dumps({'chat_template': template}) if place.endswith('json') else template
        (folder / place).write_text(text)
        tok = load_tokenizer(str(folder))
        assert tok.fingerprint() == HuggingFaceTokenizer('x', small_tokenizer(), 95).fingerprint()
        out = tmp_path / f'out{n}'
        out.mkdir()
        huggingface.write(str(out), make(FAMILIES['llama']), tok)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False) == '<user>Hi'


GPT2_AS_PUBLISHED = {
    'model_type': 'gpt2', 'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'], 'attn_pdrop': 0.1,
    'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256, 'initializer_range': 0.02, 'layer_norm_epsilon': 1e-5,
    'n_ctx': 1024, 'n_positions': 1024, 'resid_pdrop': 0.1, 'summary_type': 'cls_index', 'vocab_size': 50257}
LLAMA_AS_PUBLISHED = {
    'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'hidden_act': 'silu',
    'initializer_range': 0.02, 'pretraining_tp': 1, 'rms_norm_eps': 1e-5, 'rope_scaling': None, 'tie_word_embeddings': False,
    'torch_dtype': 'bfloat16', 'use_cache': True, 'vocab_size': 32000, 'max_position_embeddings': 4096}


def llama(width, inner, layers, heads, kv, **more):
    return LLAMA_AS_PUBLISHED | {'hidden_size': width, 'intermediate_size': inner, 'num_hidden_layers': layers,
                                 'num_attention_heads': heads, 'num_key_value_heads': kv} | more


PUBLISHED = {  # configuration, parameters, and what our model makes of the rest
    'gpt2': (GPT2_AS_PUBLISHED | {'n_embd': 768, 'n_layer': 12, 'n_head': 12}, 124_439_808, {'dropout': 0.1}),
    'gpt2-medium': (GPT2_AS_PUBLISHED | {'n_embd': 1024, 'n_layer': 24, 'n_head': 16}, 354_823_168, {'block_size': 1024}),
    'gpt2-large': (GPT2_AS_PUBLISHED | {'n_embd': 1280, 'n_layer': 36, 'n_head': 20}, 774_030_080, {'tie_weights': True}),
    'gpt2-xl': (GPT2_AS_PUBLISHED | {'n_embd': 1600, 'n_layer': 48, 'n_head': 25}, 1_557_611_200, {'n_inner': 6400}),
    'SmolLM2-135M': (llama(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True, rope_theta=100000,
                           max_position_embeddings=8192), 134_515_008, {'rope_theta': 100000.0, 'block_size': 8192}),
    'TinyLlama-1.1B': (llama(2048, 5632, 22, 32, 4, max_position_embeddings=2048), 1_100_048_384, {'rope_theta': 10000.0}),
    'Llama-2-7b': (llama(4096, 11008, 32, 32, 32), 6_738_415_616, {'n_kv_head': 32}),
    'Llama-3.2-1B': (llama(2048, 8192, 16, 32, 8, head_dim=64, vocab_size=128256, tie_word_embeddings=True, rope_theta=500000.0,
                           max_position_embeddings=131072, mlp_bias=False, rope_scaling={
                               'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'rope_type': 'llama3',
                               'original_max_position_embeddings': 8192}),
                     1_235_814_400, {'rope_scaling': 'llama3:32,1,4,8192'}),
    'Mistral-7B-v0.1': (llama(4096, 14336, 32, 32, 8, model_type='mistral', sliding_window=4096, max_position_embeddings=32768),
                        7_241_732_096, {'sliding_window': 4096}),
    'Mistral-7B-v0.2': (llama(4096, 14336, 32, 32, 8, model_type='mistral', sliding_window=None, rope_theta=1000000.0,
                              max_position_embeddings=32768), 7_241_732_096, {'sliding_window': 0, 'rope_theta': 1e6}),
    'Minueza-32M': (llama(312, 1092, 10, 12, 4, model_type='mistral', sliding_window=1024, vocab_size=32002, rms_norm_eps=1e-6,
                          max_position_embeddings=2048), 32_792_760, {'sliding_window': 1024, 'norm_eps': 1e-6}),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configurations_have_the_published_number_of_parameters(tmp_path, name):
    """SmolLM2-135M's 134,515,008 among them; and transformers counts the same."""
    about, n, settings = PUBLISHED[name]
    (tmp_path / 'config.json').write_text(json.dumps(about))
    config = huggingface.read_config(str(tmp_path))
    with torch.device('meta'):
        ours = Transformer(config)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert ours.count_parameters() == theirs.num_parameters() == n
    assert {key: getattr(config, key) for key in settings} == settings


# ---- bad input

def break_config(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    path = folder / 'model.safetensors'
    weights = safetensors.load_file(path)
    change(weights)
    safetensors.save_file(weights, path)


def only_a_pickle(folder):
    (folder / 'model.safetensors').unlink()
    torch.save({'x': Evil()}, folder / 'pytorch_model.bin')


def shards_without_one(folder):
    names = list(safetensors.load_file(folder / 'model.safetensors'))
    os.rename(folder / 'model.safetensors', folder / 'model-00001-of-00002.safetensors')
    index = {'weight_map': {name: f'model-0000{1 + (name == names[0])}-of-00002.safetensors' for name in names}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


def twice(folder):
    shards_without_one(folder)
    shutil.copy(folder / 'model-00001-of-00002.safetensors', folder / 'model-00002-of-00002.safetensors')


Q = 'model.layers.1.self_attn.q_proj.weight'
BAD = {
    'no config': (lambda f: (f / 'config.json').unlink(), 'holds neither ckpt.pt nor config.json'),
    'config is noise': (lambda f: (f / 'config.json').write_text('{'), 'config.json cannot be read'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'holds no weights: neither model.safetensors nor'),
    'a pickle': (only_a_pickle, 'pytorch_model.bin, a pickle, which can execute code and is never loaded'),
    'a shard is missing': (shards_without_one, 'model-00002-of-00002.safetensors is missing (1 of 2 shards are)'),
    'a tensor in two shards': (twice, 'and so does'),
    'weights cut short': (lambda f: os.truncate(f / 'model.safetensors', 9000), 'is not a safetensors file, or is damaged'),
    'an index without a map': (lambda f: (f / 'model.safetensors').rename(f / 'x') and
                               (f / 'model.safetensors.index.json').write_text('{}'), 'has no weight_map'),
    'another shape': (lambda f: rewrite(f, lambda w: w.update({Q: torch.zeros(3, 3)})),
                      f'{Q} is (3, 3) there, but (32, 32) by config.json'),
    'a tensor is missing': (lambda f: rewrite(f, lambda w: w.pop(Q)), f'{Q} is absent there, but (32, 32)'),
    'a tensor too many': (lambda f: rewrite(f, lambda w: w.update(score=torch.zeros(2))),
                          'model.score is (2,) there, but absent'),
    'not finite': (lambda f: rewrite(f, lambda w: w.update({Q: torch.full((32, 32), torch.nan)})), 'not finite numbers'),
    'fewer layers': (lambda f: break_config(f, num_hidden_layers=2), 'model.layers.2.input_layernorm.weight is (32,) there, '
                     'but absent by config.json, and 8 more tensors do not fit'),
    'tied by config only': (lambda f: break_config(f, tie_word_embeddings=True), 'lm_head.weight is not the embedding'),
    'another architecture': (lambda f: break_config(f, model_type='qwen2'),
                             "model_type 'qwen2' is none of gpt2, llama, mistral"),
    'twice': (lambda f: rewrite(f, lambda w: w.update({Q[6:]: w[Q].clone()})), 'twice, with and without'),
    'whole numbers': (lambda f: rewrite(f, lambda w: w.update({Q: w[Q].to(torch.int8)})), f'{Q} is torch.int8; what can be'),
    'a width in words': (lambda f: break_config(f, hidden_size='wide'), "hidden_size 'wide' is no int"),
    'no heads': (lambda f: break_config(f, num_attention_heads=0), 'n_head 0 is less than 1'),
    'half a layer': (lambda f: break_config(f, num_hidden_layers=1.5), 'num_hidden_layers 1.5 is no int'),
    'rope in words': (lambda f: break_config(f, rope_parameters='linear'), "rope scaling 'linear' is no object"),
    'a factor in words': (lambda f: break_config(f, rope_parameters={'rope_type': 'linear', 'factor': 'two'}),
                          "rope scaling 'linear' wants numbers, not factor 'two'"),
    'another rope': (lambda f: break_config(f, rope_parameters={'rope_type': 'yarn', 'factor': 4.0}),
                     "rope scaling 'yarn' is none of default, linear, llama3"),
    'half a rope': (lambda f: break_config(f, rope_parameters={'rope_type': 'llama3', 'factor': 4.0}),
                    "rope scaling 'llama3' wants numbers, not low_freq_factor None"),
    'part of a head': (lambda f: break_config(f, partial_rotary_factor=0.5), 'partial_rotary_factor is set'),
    'another activation': (lambda f: break_config(f, hidden_act='gelu'), "hidden_act 'gelu' is not 'silu'"),
    'biases here and there': (lambda f: break_config(f, attention_bias=True), 'attention_bias True and mlp_bias'),
    'wide heads': (lambda f: break_config(f, head_dim=16), 'head_dim 16 is not hidden_size 32 / num_attention_heads 4'),
    'heads that do not divide': (lambda f: break_config(f, num_attention_heads=5, head_dim=6),
                                 'n_embd 32 is not divisible by n_head 5'),
    'quantised': (lambda f: break_config(f, quantization_config={'bits': 4}), 'quantised weights cannot be loaded'),
    'code of its own': (lambda f: break_config(f, auto_map={'AutoModel': 'x.Y'}), 'a model with code of its own'),
    'no width': (lambda f: break_config(f, hidden_size=None), 'hidden_size is missing'),
    "another model's tokenizer": (lambda f: add_tokenizer(f, trained()), 'has ids up to 1499, but the model knows 96;'),
    'no tokenizer': (lambda f: (f / 'tokenizer.json').unlink(), 'holds neither a tokenizer.json nor a tokenizer.model'),
}


@pytest.fixture(scope='module')
def their_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('theirs') / 'llama'
    their_model('Llama', {}).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize('what', BAD)
def test_what_cannot_be_loaded_is_refused_with_the_reason(their_folder, tmp_path, monkeypatch, what):
    shutil.copytree(their_folder, tmp_path / 'hf')
    monkeypatch.chdir(tmp_path)
    do, words = BAD[what]
    do(tmp_path / 'hf')
    with pytest.raises(UserError) as e:
        checkpoint.load_model('hf')
    assert words in str(e.value) and '\n' not in str(e.value)
    assert not os.path.exists('executed')


@pytest.mark.parametrize('change, words', [
    ({'activation_function': 'gelu'}, "activation_function 'gelu' is not 'gelu_new'"),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx True is not False')])
def test_gpt2s_own_variants_are_refused(tmp_path, change, words):
    their_model('GPT2', change).save_pretrained(tmp_path)
    with pytest.raises(UserError) as e:
        huggingface.load(str(tmp_path))
    assert words in str(e.value)


@pytest.mark.parametrize('changes, words', [
    (FAMILIES['gpt2'] | {'norm': 'rmsnorm'}, "norm='rmsnorm', mlp='gelu', pos='learned' is neither GPT-2"),
    (FAMILIES['gpt2'] | {'n_kv_head': 2}, "Hugging Face's GPT-2 has neither grouped queries"),
    (FAMILIES['llama'] | {'bias': True, 'sliding_window': 9}, "Hugging Face's Mistral has no biases")])
def test_a_mixture_that_they_have_no_name_for_is_not_exported(tmp_path, changes, words):
    with pytest.raises(UserError) as e:
        huggingface.write(str(tmp_path), make(changes | {'vocab_size': 257}), load_tokenizer('bytes'))
    assert words in str(e.value) and os.listdir(tmp_path) == []


def test_a_name_that_is_nowhere(tmp_path):
    for script, name, words in (
            ('sample.py', 'nobody/nothing', "init_from='nobody/nothing': there is no such file or folder here, and the Hu"),
            ('sample.py', 'gpt2', "init_from='gpt2': there is no such"), ('sample.py', 'gpt3', "init_from='gpt3' is neither a"),
            ('sample.py', './hf/x', "init_from='./hf/x' is neither a checkpoint nor a folder that is there"),
            ('export.py', 'out/x/best.pt', 'out/x/best.pt: there is no checkpoint'),
            ('train.py', 'gpt2-small', "init_from='gpt2-small' is neither scratch, nor resume, nor auto, nor a checkpoint")):
        error = fails(script, f'--init_from={name}', cwd=tmp_path)
        assert words in error
    assert os.listdir(tmp_path) == []


# ---- the scripts

@pytest.mark.slow
def test_a_model_from_there_is_sampled_fine_tuned_and_exported(place):
    """GPT-2 with its own tokenizer, of another context, on data that prepare.py made with tiktoken's gpt2."""
    pytest.importorskip('tokenizers')
    theirs = their_model('GPT2', {'vocab_size': 50257})
    theirs.save_pretrained(place / 'gpt2hf')
    add_tokenizer(place / 'gpt2hf', gpt2_json())
    out, _ = run('sample.py', '--init_from=gpt2hf', '--prompt=In the', '--temperature=0', '--max_new_tokens=8',
                 '--dtype=float32', cwd=place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / 'gpt2hf')
    ids = theirs.generate(tokenizer('In the', return_tensors='pt').input_ids, do_sample=False, max_new_tokens=8)
    assert out == tokenizer.decode(ids[0]) + '\n'
    (place / 'data').unlink()
    run('prepare.py', str(ROOT / 'data' / 'owl.py'), '--tokenizer=gpt2', '--val_fraction=0.2', cwd=place)
    args = (str(ROOT / 'config' / 'finetune_gpt2.py'), '--init_from=gpt2hf', '--dataset=owl', '--block_size=32',
            '--batch_size=2', '--gradient_accumulation_steps=1', '--max_iters=6', '--eval_interval=3', '--dtype=float32',
            '--out_dir=out/tuned')
    out, _ = run('train.py', *args, cwd=place)
    assert 'iter 6: val_loss' in out
    # the first validation loss is that of transformers' model on the same tokens
    from dataset import Split, val_batches
    losses = []
    for batch in val_batches(Split(str(place / 'data' / 'owl'), 'val', 32, 32), 1000, 1, 0, 1):
        x, y = map(torch.from_numpy, batch)
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()))
    first = next(json.loads(line) for line in open(place / 'out' / 'tuned' / 'log.jsonl') if 'val_loss' in line)
    assert abs(first['val_loss'] - torch.stack(losses).mean().item()) < 1e-4
    error = fails('train.py', *args, '--out_dir=out/longer', '--block_size=65', cwd=place)
    assert 'block_size is 65 (command line), but the model in gpt2hf has 64' in error
    run('train.py', '--init_from=resume', '--out_dir=out/tuned', '--max_iters=8', cwd=place)
    run('export.py', '--out_dir=out/tuned', '--dtype=bfloat16', '--license=mit', '--language=en', cwd=place)
    hf = place / 'hf' / 'tuned'
    again = transformers.AutoModelForCausalLM.from_pretrained(hf)
    assert again.dtype == torch.bfloat16 and again.config.n_positions == 32
    ours, _, loaded = checkpoint.load_model(str(place / 'out' / 'tuned'))
    assert loaded['iter'] == 8 and difference(ours, again.float(), 50257, T=32) < 0.05
    card = (hf / 'README.md').read_text()
    for words in ('license: "mit"', 'language: "en"', 'library_name: "transformers"', f'A GPT-2 of {again.num_parameters():,} ',
                  'trained on from gpt2hf with sourdough', '| owl |', '| tokens seen | 512 (8 steps, the last of 64', '1 x ',
                  '| validation loss |',
                  '![losses by tokens seen](loss.png)', "name = 'tuned'", 'must not be trusted with'):
        assert words in card, words
    assert str(place) not in card  # nobody's folders are published
    assert "'out/tuned' holds no exported model, and --overwrite would destroy it" in fails(
        'export.py', '--out_dir=out/tuned', '--hf_dir=out/tuned', '--overwrite', cwd=place)
    assert "hf_dir='hf/tuned' is there already; --overwrite replaces it" in fails('export.py', '--out_dir=out/tuned', cwd=place)
    run('export.py', '--init_from=hf/tuned', '--hf_dir=hf/again', '--dtype=bfloat16', cwd=place)
    assert len(os.listdir(hf)) == 7 == len(os.listdir(place / 'hf' / 'again'))
    for file in os.listdir(hf):
        assert (hf / file).read_bytes() == (place / 'hf' / 'again' / file).read_bytes()
    assert sorted(os.listdir(place / 'hf')) == ['again', 'tuned']  # nothing half-written


def test_a_special_token_beyond_the_embedding_does_not_stop_fine_tuning(place):
    """[PAD], which many fine-tuned models have added to the tokenizer only."""
    their_model('Llama', {}).save_pretrained(place / 'hf')
    spec = json.loads(small_tokenizer())
    spec['added_tokens'].append(spec['added_tokens'][0] | {'id': 96, 'content': '[PAD]'})
    add_tokenizer(place / 'hf', json.dumps(spec))
    (place / 'data').unlink()
    (place / 'a.txt').write_text('some words of text. ' * 100)
    run('prepare.py', '--source=a.txt', '--tokenizer=hf', '--name=pad', '--val_fraction=0.2', cwd=place)
    run('train.py', '--init_from=hf', '--dataset=pad', '--block_size=16', '--max_iters=2', '--sample_tokens=5', cwd=place)


def test_an_export_is_replaced_and_nothing_else(place):
    run('train.py', *TINY, '--max_iters=4', '--eval_interval=2', cwd=place)
    export = ('export.py', '--out_dir=out/tiny')
    run(*export, '--hf_dir=hf/x/', cwd=place)
    before = (place / 'hf' / 'x' / 'model.safetensors').read_bytes()
    run(*export, '--hf_dir=hf/x/', '--overwrite', cwd=place)
    (place / 'link').symlink_to(place / 'hf' / 'x')
    run(*export, '--hf_dir=link', '--overwrite', '--init_from=hf/x', cwd=place)
    assert (place / 'hf' / 'x' / 'model.safetensors').read_bytes() == before and (place / 'link').is_symlink()
    (place / 'mine').mkdir()
    (place / 'mine' / 'note.txt').write_text('precious')
    (place / 'file').write_text('precious')
    for target in ('mine', 'out/tiny', '.', 'file'):
        assert 'holds no exported model' in fails(*export, f'--hf_dir={target}', '--overwrite', cwd=place)
    assert 'cannot be written' in fails(*export, '--hf_dir=/proc/nothing', cwd=place)
    assert sorted(os.listdir(place / 'hf')) == ['x'] and (place / 'mine' / 'note.txt').exists()
    assert (place / 'out' / 'tiny' / 'ckpt.pt').exists()


def test_the_card_of_a_checkpoint_in_the_middle_of_a_resumed_run(place):
    run('train.py', *TINY, '--max_iters=20', '--keep_every=10', cwd=place)
    run('train.py', *TINY, '--init_from=resume', '--max_iters=30', '--batch_size=8', cwd=place)
    run('export.py', '--init_from=out/tiny/ckpt_10.pt', '--hf_dir=hf/middle', cwd=place)
    run('export.py', '--out_dir=out/tiny', '--hf_dir=hf/end', cwd=place)
    middle, end = ((place / 'hf' / name / 'README.md').read_text() for name in ('middle', 'end'))
    logged = [json.loads(line) for line in open(place / 'out' / 'tiny' / 'log.jsonl')]
    for card, it, tokens, size in ((middle, 10, 10 * 64, 64), (end, 30, 20 * 64 + 10 * 128, 128)):
        assert f'| tokens seen | {tokens:,} ({it} steps, the last of {size}) |' in card and 'trained from nothing' in card
        assert tokens == next(record['tokens'] for record in logged if record['iter'] == it and 'val_loss' in record)
        val = next(record['val_loss'] for record in logged if record['iter'] == it and 'val_loss' in record)
        assert f'| validation loss | {val:.4f} nats per token (step {it}) |' in card
    assert ', then ' not in end  # the same machine


def test_a_former_versions_checkpoint_still_opens(place):
    run('train.py', *TINY, '--max_iters=10', cwd=place)
    path = place / 'out' / 'tiny' / 'ckpt.pt'
    old = torch.load(path, weights_only=True)
    del old['hardware'], old['tokens']
    old['data'] = {'tiny': {'train.bin': 'checksum'}}
    torch.save(old, path)
    run('export.py', '--out_dir=out/tiny', cwd=place)
    card = (place / 'hf' / 'tiny' / 'README.md').read_text()
    assert '| hardware | not recorded |' in card and '| tokens seen | 640 (' in card
    out, _ = run('train.py', *TINY, '--init_from=resume', '--max_iters=12', cwd=place)
    assert 'resumed at iter 10' in out and 'token files' not in out


def test_a_run_begins_from_a_folder_under_torchrun(place):
    (place / 'hf').mkdir()
    huggingface.write(str(place / 'hf'), byte_model('llama'), load_tokenizer('bytes'))
    keep = [flag for flag in TINY if flag.split('=')[0] not in
            ('--n_layer', '--n_head', '--n_kv_head', '--n_embd', '--out_dir')]
    losses = []
    for n in (0, 2):
        run('train.py', *keep, '--init_from=hf', f'--out_dir=out/{n}', cwd=place, torchrun=n)
        losses.append([json.loads(line).get('loss', 0) for line in open(place / 'out' / str(n) / 'log.jsonl')])
    assert all(abs(a - b) < 1e-4 for a, b in zip(*losses)) and len(losses[0]) == len(losses[1]) > 15


def test_data_of_another_tokenizer_is_refused_with_the_command(place):
    folder = place / 'hf'
    their_model('Llama', {}).save_pretrained(folder)
    add_tokenizer(folder)
    write_tokens(place / 'bytes', range(90), range(90))
    error = fails('train.py', '--init_from=hf', f'--dataset={place}/bytes', '--out_dir=out/x', '--block_size=16', cwd=place)
    assert 'whose ids are others; prepare the data again with --tokenizer=hf' in error
    assert not (place / 'out').exists()


def test_export_refuses_what_it_must(place):
    run('train.py', *TINY, *GPT2, '--norm=rmsnorm', '--max_iters=1', cwd=place)
    assert 'Hugging Face has no name for it' in fails('export.py', '--out_dir=out/tiny', cwd=place)
    assert not (place / 'hf').exists()
    assert 'did you mean hf_dir?' in fails('export.py', '--hfdir=x', cwd=place)
