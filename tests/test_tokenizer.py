"""Every kind of tokenizer: the text comes back, a faster route gives the same ids, and a checkpoint or folder keeps it."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import CACHE

from configurator import UserError
from tokenizer import LLAMA3_WORDS, HuggingFaceTokenizer, as_tiktoken, load_tokenizer, tokenizer_from_state, train_bpe

ODD = ['', 'plain words', 'naïve café — 日本語のテキスト 🍞👩‍🍳', '\x00\x01 control\r\nlines\r', '<|endoftext|> is text here',
       '1234567890' * 5 + ' 1 22 333 4444 ½ Ⅷ ٣ 1,000.5', ' ' * 50 + '\n\n\n\t x', "it's we'll  they'd IT'S 'sam 'ſ",
       'e\u0301 combining', '\ufffd\ufffd left of what was no text \ufffd', ' lead', 'trail ', '</s> <s> <unk> [INST]',
       '\xa0\u3000\u2028 other blanks \u200b',
       'a' * 3000, ' ' * 3000, '!?' * 1500, '\n' * 500 + ' x' + ' \n' * 500, '🍞' * 700]
EVERY_CHARACTER = ''.join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
IN_CONTEXT = ''.join(f"a {c}b '{c} 1{c}  {c}\n{c}" for c in EVERY_CHARACTER[:0x3000])  # beside letters, blanks, digits, ...


def gpt2_files():
    """(vocabulary, merges) of GPT-2, from the two files that tiktoken keeps."""
    if not CACHE.is_dir():
        pytest.skip(f'the BPE files of gpt2 are not at hand: no {CACHE}')
    files = sorted((path.read_text(encoding='utf-8') for path in CACHE.iterdir()), key=lambda text: text.startswith('{'))
    merges = [tuple(line.split()) for line in files[0].splitlines() if line and not line.startswith('#version')]
    return json.loads(files[1]), merges


def gpt2_json():
    tokenizers = pytest.importorskip('tokenizers')
    vocab, merges = gpt2_files()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(['<|endoftext|>'])
    return bpe.to_str()


def mistral_model():
    mistral_common = pytest.importorskip('mistral_common')
    pytest.importorskip('sentencepiece')
    return str(Path(mistral_common.__file__).parent / 'data' / 'tokenizer.model.v1')


def some_text():
    return ''.join(Path(module.__file__).read_text(encoding='utf-8') for module in (json, os, pytest)) + ''.join(ODD)


def trained(**changes):
    """The text of a tokenizer.json trained on a little text, parts of it changed."""
    pytest.importorskip('tokenizers')
    spec = json.loads(train_bpe([some_text()], 1500, ['<|endoftext|>']))
    return json.dumps(spec | changes)


KINDS = ['bytes', 'gpt2', 'gpt2 as tokenizer.json', 'trained', 'mistral', 'mistral as tokenizer.json']


@pytest.fixture(params=KINDS, scope='module')
def tokenizer(request, tmp_path_factory):
    if request.param in ('bytes', 'gpt2'):
        if request.param == 'gpt2' and not os.environ.get('TIKTOKEN_CACHE_DIR'):
            pytest.skip(f'the BPE file of gpt2 is not at hand: no TIKTOKEN_CACHE_DIR, and no {CACHE}')
        return load_tokenizer(request.param)
    if request.param == 'mistral':
        return load_tokenizer(mistral_model())
    folder = tmp_path_factory.mktemp('tokenizer')
    text = {'trained': trained, 'gpt2 as tokenizer.json': gpt2_json, 'mistral as tokenizer.json': mistral_json}[request.param]()
    (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
    return load_tokenizer(str(folder))


def mistral_json():
    """Mistral's SentencePiece model in the form that its Hugging Face repository has."""
    tokenizers = pytest.importorskip('tokenizers')
    sentencepiece = pytest.importorskip('sentencepiece')
    sp = sentencepiece.SentencePieceProcessor(model_file=mistral_model())
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    # the merges that a piece can come from, those of the best score first
    merges = [(sp.get_score(i), piece[:n], piece[n:]) for piece, i in vocab.items() for n in range(1, len(piece))
              if not (sp.is_byte(i) or sp.is_control(i)) and piece[:n] in vocab and piece[n:] in vocab]
    merges = [pair for _, *pair in sorted(merges, key=lambda m: -m[0])]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(map(tuple, merges)), unk_token='<unk>',
                                                     fuse_unk=True, byte_fallback=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    bpe.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(' ', 1, 0)])
    bpe.add_special_tokens(['<unk>', '<s>', '</s>'])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return bpe.to_str()


def test_text_survives_a_round_trip(tokenizer):
    for text in ODD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot_id not in ids
        assert max(ids, default=0) < tokenizer.vocab_size
        assert tokenizer.encode_array(text).tolist() == ids
        stream = tokenizer.stream(begins=True)
        assert ''.join(stream(i) for i in ids) == text


def test_a_stream_never_shows_half_a_character():
    stream = load_tokenizer('bytes').stream()
    assert [stream(i) for i in '🍞é'.encode()] == ['', '', '', '🍞', '', 'é']


def test_a_tokenizer_survives_in_a_checkpoint(tokenizer):
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
    assert all(again.encode(text) == tokenizer.encode(text) for text in ODD)
    assert again.fingerprint() == tokenizer.fingerprint() and again.vocab_size == tokenizer.vocab_size
    assert (again.eot_id, again.bos_id) == (tokenizer.eot_id, tokenizer.bos_id)


def test_a_long_text_is_cut_where_it_changes_no_id(tokenizer, monkeypatch):
    """Encoded in pieces, of which several go into a text of 100,000 characters, the ids are those of the whole."""
    monkeypatch.setattr('tokenizer.PIECE', 5000)
    gaps = (' ', '  ', '\n\n ', '\n', '', ' \t', ' ', '\n')
    text = ''.join(f'{word}{gap}' for i in range(2000) for word, gap in
                   zip((f'word{i}', '日本語', '...', "it's", '🍞' * 3, str(i * 7919), 'Ende', '/x'), gaps))
    text += ' '  # ends with a blank, as a piece may
    for step in (700, 5000, 12_345):
        pieces = list(tokenizer.encode_pieces(text[i:i + step] for i in range(0, len(text), step)))
        assert ''.join(piece for piece, _ in pieces) == text
        assert [i for _, ids in pieces for i in ids.tolist()] == tokenizer.encode(text)
        assert len(pieces) > 5


def test_gpt2_by_tiktoken_and_by_tokenizers_gives_the_same_ids():
    theirs = pytest.importorskip('tokenizers').Tokenizer.from_str(gpt2_json())
    theirs.encode_special_tokens = True
    ours, from_json = load_tokenizer('gpt2'), HuggingFaceTokenizer('gpt2', gpt2_json(), 50256)
    assert from_json.tiktoken is not None
    for text in (*ODD, EVERY_CHARACTER, IN_CONTEXT, some_text()):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids and from_json.encode(text) == ids


def digits_apart():
    p = pytest.importorskip('tokenizers').pre_tokenizers
    return p.Sequence([p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)])


def llama3_words():
    tokenizers = pytest.importorskip('tokenizers')
    p, words = tokenizers.pre_tokenizers, tokenizers.Regex(LLAMA3_WORDS)
    return p.Sequence([p.Split(words, 'isolated'), p.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize('words', [digits_apart, llama3_words])
@pytest.mark.parametrize('ignore_merges', [False, True])
def test_other_words_by_tiktoken_and_by_tokenizers_give_the_same_ids(words, ignore_merges):
    """SmolLM2's and Llama 3's ways to part words, with merges trained here."""
    tokenizers = pytest.importorskip('tokenizers')
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer, bpe.decoder = words(), tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([some_text()], tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=['<|endoftext|>'], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    ours = HuggingFaceTokenizer('trained', bpe.to_str(), 0)
    assert ours.tiktoken is not None
    bpe.encode_special_tokens = True
    for text in (*ODD, EVERY_CHARACTER, IN_CONTEXT, some_text()):
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids


def test_tiktoken_is_not_used_where_it_would_merge_otherwise():
    """'b c' comes before 'a b', so that 'abc' is 'a bc'; tiktoken would take 'abc', which is a token, at once."""
    spec = json.loads(trained())
    vocab = {token: i for token, i in spec['model']['vocab'].items() if i < 257}
    spec['model'] |= {'vocab': vocab | {'bc': 257, 'ab': 258, 'abc': 259}, 'merges': [['b', 'c'], ['a', 'b'], ['ab', 'c']]}
    ours = HuggingFaceTokenizer('odd', json.dumps(spec), 0)
    assert ours.tiktoken is None and ours.encode('abc') == [vocab['a'], 257]
    assert as_tiktoken(json.loads(trained()))
    # 'cd' may not be merged on the way to 'bcd', which comes before it
    spec['model'] |= {'vocab': vocab | {'bc': 257, 'bcd': 258, 'cd': 259}, 'merges': [['b', 'c'], ['bc', 'd'], ['c', 'd']]}
    assert HuggingFaceTokenizer('even', json.dumps(spec), 0).encode('bcd cd') == [258, vocab['Ġ'], 259]
    for change in ({'normalizer': {'type': 'NFC'}},
                   {'added_tokens': [{'id': 1500, 'content': '    ', 'special': False, 'single_word': False, 'lstrip': False,
                                      'rstrip': False, 'normalized': False}]}):
        assert as_tiktoken(json.loads(trained(**change))) is None
    spaced = HuggingFaceTokenizer('spaced', trained(**change), 0)
    assert spaced.encode('a    b').count(1500) == 1 and spaced.decode(spaced.encode('a    b')) == 'a    b'


def test_mistral_by_sentencepiece_and_by_tokenizers_gives_the_same_ids():
    ours, theirs = load_tokenizer(mistral_model()), HuggingFaceTokenizer('mistral', mistral_json(), 2, 1)
    assert (ours.vocab_size, ours.bos_id, ours.eot_id) == (32000, 1, 2)
    texts = [text for text in ODD if '<' not in text]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    mistrals = SentencePieceTokenizer(mistral_model())
    assert all(ours.beginning(text) == mistrals.encode(text, bos=True, eos=False) for text in texts)
    assert ours.beginning() == [1]


def test_special_tokens_are_text_unless_asked_for(tokenizer):
    text = 'before <|endoftext|> after'
    assert tokenizer.eot_id not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    if 'mistral' in tokenizer.name and '.model' in tokenizer.name:
        ids = tokenizer.encode(text.replace('<|endoftext|>', '</s>'), special=True)
        assert ids.count(tokenizer.eot_id) == 1 and tokenizer.encode(text, special=True) == tokenizer.encode(text)
    elif tokenizer.bos_id is None:
        ids = tokenizer.encode(text, special=True)
        assert ids.count(tokenizer.eot_id) == 1 and tokenizer.decode(ids) == 'before  after'
        assert tokenizer.eot_id not in tokenizer.encode(text)


def test_a_trained_tokenizer_is_the_same_each_time_and_a_convention_is_found(tmp_path):
    text = trained()
    assert text == trained()
    tok = HuggingFaceTokenizer('t', text, 0)
    assert tok.vocab_size == 1500 and tok.eot_id == 0 and tok.tiktoken is not None
    spec = json.loads(text)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': {'content': 'de'}}))
    assert load_tokenizer(str(tmp_path)).eot_id == spec['model']['vocab']['de']
    assert load_tokenizer(str(tmp_path), eot_token='re').eot_id == spec['model']['vocab']['re']
    assert load_tokenizer(str(tmp_path)).beginning() == [spec['model']['vocab']['de']]


def test_half_a_surrogate_pair_is_no_reason_to_stop(tokenizer):
    assert tokenizer.decode(tokenizer.encode('a\ufffdb')) == 'a\ufffdb'
    assert tokenizer.decode(tokenizer.encode('a\ud800b', special=True)) in ('a?b', 'a\ufffdb')
    assert load_tokenizer('bytes').decode(load_tokenizer('bytes').encode('a\ud800b')) == 'a?b'


@pytest.mark.parametrize('name, words', [
    ('gpt3', "tokenizer='gpt3' is not known; choose bytes, .*gpt2"), ('bpe:100', 'trained by prepare.py'),
    ('nobody/nothing', 'the Hugging Face hub did not give it'), ('empty', 'holds neither a tokenizer.json nor'),
    ('noise', 'neither a tokenizer.json nor a SentencePiece model'), ('half.json', 'is not a tokenizer.json'),
    ('other.json', 'is not a tokenizer.json'), ('wordpiece.json', 'is a WordPiece'),
    ('unigram.json', 'is a Unigram'), ('odd.json', 'not a tokenizer.json'), ('no_eot.json', '--eot_token')])
def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'noise').write_bytes(bytes(range(256)))
    spec = json.loads(trained())
    (tmp_path / 'half.json').write_text(json.dumps(spec)[:5000])
    (tmp_path / 'other.json').write_text('{"model": "gpt2"}')
    (tmp_path / 'wordpiece.json').write_text(json.dumps(spec | {
        'model': {'type': 'WordPiece', 'vocab': spec['model']['vocab'], 'unk_token': 'a', 'continuing_subword_prefix': '##',
                  'max_input_chars_per_word': 100}, 'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True}}))
    unigram = {'type': 'Unigram', 'vocab': [['a', -1.0]], 'unk_id': 0}
    (tmp_path / 'unigram.json').write_text(json.dumps(spec | {'model': unigram}))
    (tmp_path / 'odd.json').write_text(json.dumps(spec | {'added_tokens': [{'id': 0, 'content': '</s>', 'special': True}]}))
    model = spec['model'] | {'vocab': {t: i for t, i in spec['model']['vocab'].items() if i}}
    (tmp_path / 'no_eot.json').write_text(json.dumps(spec | {'added_tokens': [], 'model': model}))
    with pytest.raises(UserError, match=words):
        load_tokenizer(name)


def test_a_missing_package_is_named(monkeypatch):
    path, text = mistral_model(), trained()
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    with pytest.raises(UserError, match='pip install sentencepiece'):
        load_tokenizer(path)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    fast = HuggingFaceTokenizer('trained', text, 0)  # tiktoken encodes it
    with pytest.raises(UserError, match='pip install tokenizers'):
        fast.encode('x', special=True)
