"""
Text ↔ token ids: one face over every kind of tokenizer.

    tokenizer = load_tokenizer('gpt2')
    ids = tokenizer.encode('Hello')              # special tokens in the text are text
    text = tokenizer.decode(ids)

Each has `name`, `vocab_size`, `eot_id` (the end-of-text id, which ends a document), `bos_id` (which begins one, or None
where the tokenizer's convention has none), `encode`, `decode`, `decode_bytes`, and `state()`: all of it as plain data,
from which `tokenizer_from_state` makes it again without a network. Two tokenizers with one `fingerprint()` agree on
every id.
"""

import base64
import codecs
import hashlib
import json
import os
import re

import numpy as np

from configurator import UserError

STATE_FILE = 'tokenizer.state.json'  # beside a data set's tokens
FILES = ['tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja',
         'tokenizer.model']  # of a folder in Hugging Face's form
HUB_ID = r'\w[\w.-]*/\w[\w.-]*'  # owner/name, on the Hugging Face hub
PIECE = 2**20  # characters; a longer text is encoded in pieces
BEFORE_WORD = r'\S(?= )|\S\n(?=\w)'  # ends where no token of a byte-level BPE crosses: before a blank or a line's first word
BEFORE_BLANK = r'\S(?= \w)'  # before a single blank: what follows it gets the dummy prefix in its place


class Tokenizer:
    """What all kinds share. `decode_bytes` is the primitive: a token may hold half a character."""

    bos_id = None
    special = {}  # special token → id, of those that a text may spell where they are asked for
    beside = {}  # what else belongs to it, such as a chat template; no part of what it does with a text
    cut = None  # a pattern: a long text may be cut where a match ends; None: it is encoded whole
    dummy_prefix = False  # whether a text is encoded with a blank put before it (SentencePiece's way)

    def encode_array(self, text, special=False):
        """`encode` as an array of uint32, for prepare.py's speed."""
        return np.array(self.encode(text, special), np.uint32)

    def encode_pieces(self, texts, special=False, begins=True):
        """
        Encodes one long text that comes in pieces of any size; yields (piece, its ids), pieces of about PIECE characters.
        `begins`: whether it is the beginning of a document, or goes on after a cut.

        The text is cut only where no token crosses, so that the ids are those of the whole. (After eight million
        characters without such a place it is cut anywhere; with a dummy prefix it is held until there is one.)
        """
        for text in _recut(texts, self.cut, 8 * PIECE if not self.dummy_prefix else float('inf')):
            # what goes on after a cut begins with a blank, and a dummy prefix would be a second one
            yield text, self.encode_array(text if begins or not self.dummy_prefix else text.removeprefix(' '), special)
            begins = False

    def beginning(self, text=''):
        """The ids of a document that begins with `text`: BOS where there is one, and never none at all."""
        ids = ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)
        return ids or [self.eot_id]

    def decode(self, ids):
        """Ids → text; bytes that are not UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode('utf-8', errors='replace')
        return text.removeprefix(' ') if self.dummy_prefix else text

    def stream(self, begins=False):
        """A function from the next id to the text that it completes: never half a character. `begins`: nothing came before."""
        decoder, waits = codecs.getincrementaldecoder('utf-8')(errors='replace'), begins and self.dummy_prefix

        def text_of(i):
            nonlocal waits
            text = decoder.decode(self.decode_bytes([i]))
            if waits and text:
                waits, text = False, text.removeprefix(' ')
            return text

        return text_of

    def known_ids(self):
        """The ids that stand for something; some vocabularies have gaps."""
        return range(self.vocab_size)

    def stop_ids(self):
        """The ids that end a text: end-of-text, and others where a chat template or a model in Hugging Face's form has some."""
        return {self.eot_id, *self.beside.get('eos_token_id', ())}

    def fingerprint(self):
        state = {key: value for key, value in self.state().items() if key not in ('name', 'beside')}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]

    def spelled(self, which):
        """How a chat template writes 'bos' or 'eos'; without a BOS it is end-of-text, as in an exported model."""
        i = self.eot_id if which == 'eos' or self.bos_id is None else self.bos_id
        return self.beside.get(f'{which}_token') or next((token for token, n in self.special.items() if n == i), '')

    def probes(self):
        """Texts that spell every token, to compare two tokenizers by."""
        tokens = [self.decode_bytes([i]).decode('utf-8', errors='replace') for i in range(self.vocab_size)]
        return [''.join(tokens), ' '.join(reversed(tokens)), '\n'.join(tokens)]

    def agrees_with(self, other):
        """
        Whether both give the same ids: they are one, or do so for texts that spell every token of the other, and for the
        special tokens that both have.
        """
        return self.fingerprint() == other.fingerprint() or all(
            other.special.get(token, i) == i for token, i in self.special.items()) and all(
            self.encode(text) == other.encode(text) for text in other.probes())

    def extended(self, tokens, beside):
        """This tokenizer with more special tokens, whose ids come after its last, and with what is to lie beside it."""
        missing = [token for token in dict.fromkeys(tokens) if token not in self.special]
        added = {token: self.vocab_size + n for n, token in enumerate(missing)}
        return tokenizer_from_state(self._with(added) | {'beside': self.beside | beside})

    def _with(self, added):
        """`state()` with more special tokens (token → id)."""
        return self.state() | {'special': self.state().get('special', {}) | added}

    def _by_parts(self, text):
        """The ids of a text whose special tokens are taken for what they spell, what stands between them encoded alone."""
        if not self.special:
            return self.encode(text)
        parts = re.split(f'({"|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))})', text)
        return [i for n, part in enumerate(parts) if part for i in ([self.special[part]] if n % 2 else self.encode(part))]


def _recut(texts, cut, most):
    """The pieces of a text, cut anew where the pattern `cut` allows or `most` characters are held; None: put together."""
    held, size = [], 0
    until_last = cut and re.compile(f'(?s:.*)(?:{cut})')
    for text in texts:
        held.append(text)
        size += len(text)
        if cut and size >= PIECE:
            # look for a place in what came last; only if there is none, in all that is held
            last = until_last.match(text) or until_last.match(''.join(held))
            if last or size > most:
                whole = ''.join(held)
                end = len(whole) - (len(last.string) - last.end()) if last else len(whole)
                yield whole[:end]
                held = [whole[end:]]
                size = len(held[0])
    if size:
        yield ''.join(held)


def _whole_characters(text):
    """Half a surrogate pair, as broken JSON and pipes have it, becomes '?'."""
    return text.encode('utf-8', errors='replace').decode()


class ByteTokenizer(Tokenizer):
    """UTF-8's 256 bytes, an end-of-text, and what special tokens it is given."""

    name, eot_id = 'bytes', 256
    cut = r'(?s:.)'

    def __init__(self, special=(), beside=()):
        self.added, self.beside = dict(special), dict(beside)
        self.special = {'<|endoftext|>': self.eot_id, **self.added}
        self.vocab_size = _count_ids([*range(257), *self.added.values()], self.name)

    def encode(self, text, special=False):
        return self.encode_array(text, special).tolist()

    def encode_array(self, text, special=False):
        if special:
            return np.array(self._by_parts(text), np.uint32)
        return np.frombuffer(_whole_characters(text).encode(), np.uint8)

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)

    def state(self):
        more = {'special': self.added, 'beside': self.beside}
        return {'kind': 'bytes', 'name': self.name} | {key: value for key, value in more.items() if value}


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding run by tiktoken."""

    cut = BEFORE_WORD

    def __init__(self, name, pattern, ranks, special, beside=()):
        """`ranks`: token bytes → id; `special`: special token → id, '<|endoftext|>' among them."""
        self.name, self.beside = name, dict(beside)
        self.pattern, self.ranks, self.special = pattern, ranks, special
        self.eot_id = special['<|endoftext|>']
        self.vocab_size = _count_ids([*ranks.values(), *special.values()], name)
        self.encoding = _tiktoken_encoding(name, pattern, ranks, special)
        self.text_ids = set(ranks.values())  # not the specials, nor the gaps that some vocabularies have

    def encode(self, text, special=False):
        return self.encoding.encode(text, allowed_special='all') if special else self.encoding.encode_ordinary(text)

    def encode_array(self, text, special=False):
        return self.encoding.encode_to_numpy(text, allowed_special='all' if special else set(), disallowed_special=())

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([i for i in ids if i in self.text_ids])

    def known_ids(self):
        return self.text_ids | set(self.special.values())

    def state(self):
        # tiktoken's own file format: a line for each token, its bytes in base64 and its id
        lines = (f'{base64.b64encode(token).decode()} {i}' for token, i in sorted(self.ranks.items(), key=lambda t: t[1]))
        return {'kind': 'tiktoken', 'name': self.name, 'pattern': self.pattern, 'ranks': '\n'.join(lines),
                'special': dict(self.special)} | ({'beside': self.beside} if self.beside else {})


def _tiktoken_encoding(name, pattern, ranks, special):
    import tiktoken
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


class HuggingFaceTokenizer(Tokenizer):
    """
    A byte-pair encoding as `tokenizer.json` describes it: on bytes, as GPT-2, SmolLM2 and Llama 3 have it, or on
    characters with '▁' for the blank, as Llama 2 and Mistral have it. Encoded by `tokenizers`, or by tiktoken where
    that gives the same ids for certain.
    """

    def __init__(self, name, text, eot_id, bos_id=None, beside=()):
        """
        `text`: of tokenizer.json; `beside`: what came with it and is handed on, such as a chat template (`_beside`).
        Raises UserError for kinds of tokenizer that do not give the text back.
        """
        self.name, self.json, self.eot_id, self.bos_id, self.beside = name, text, eot_id, bos_id, dict(beside)
        spec = json.loads(text)
        model, kinds = spec['model'], _kinds(spec['decoder'])
        if model.get('type', 'BPE') != 'BPE' or not kinds & {'ByteLevel', 'ByteFallback', 'Metaspace'}:
            raise UserError(f"tokenizer='{name}' is a {model.get('type')} with the decoder {' '.join(sorted(kinds)) or 'none'};"
                            ' what can be used is a BPE on bytes, or one with byte fallback')
        added = {token['id']: token for token in spec['added_tokens']}
        self.vocab_size = _count_ids([*model['vocab'].values(), *added], name)
        self.bytes_of = [b''] * self.vocab_size  # what each id stands for; special tokens stand for nothing
        alphabet = byte_alphabet()
        for token, i in model['vocab'].items():
            if 'ByteLevel' in kinds:
                self.bytes_of[i] = bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
            else:
                byte = re.fullmatch('<0x([0-9A-F]{2})>', token)
                self.bytes_of[i] = bytes([int(byte[1], 16)]) if byte else token.replace('▁', ' ').encode()
        for i, token in added.items():
            self.bytes_of[i] = b'' if token['special'] else token['content'].encode()
        self.special = {token['content']: i for i, token in added.items() if token['special']}
        self.known = added.keys() | model['vocab'].values()
        self.tiktoken = self.slow = None
        fast = as_tiktoken(spec)
        if fast:
            self.tiktoken, self.cut = _tiktoken_encoding(name, *fast, {}), BEFORE_WORD
        elif 'ByteLevel' not in kinds:
            first = self.encode('a')[:1]
            self.dummy_prefix = bool(first) and self.bytes_of[first[0]].startswith(b' ')
            if _kinds(spec['normalizer']) <= {'Prepend', 'Replace'} and not _blank_within(model['vocab']):
                self.cut = BEFORE_BLANK

    def encode(self, text, special=False):
        if self.tiktoken and not special:
            return self.tiktoken.encode_ordinary(text)
        if self.slow is None:
            self.slow = tokenizers_package(self.name).Tokenizer.from_str(self.json)
            self.slow.no_truncation()
            self.slow.no_padding()
        self.slow.encode_special_tokens = not special
        return self.slow.encode_batch_fast([_whole_characters(text)], add_special_tokens=False)[0].ids

    def encode_array(self, text, special=False):
        if self.tiktoken and not special:
            return self.tiktoken.encode_to_numpy(text, disallowed_special=())
        return super().encode_array(text, special)

    def decode_bytes(self, ids):
        return b''.join(self.bytes_of[i] for i in ids)

    def known_ids(self):
        return self.known

    def _with(self, added):
        spec = json.loads(self.json)
        plain = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
        spec['added_tokens'] += [{'id': i, 'content': token, 'special': True, **plain} for token, i in added.items()]
        return self.state() | {'json': json.dumps(spec, ensure_ascii=False)}

    def state(self):
        return {'kind': 'huggingface', 'name': self.name, 'json': self.json, 'eot_id': self.eot_id, 'bos_id': self.bos_id,
                'beside': self.beside}


def tokenizers_package(name):
    """The package `tokenizers`, which the tokenizer called `name` needs."""
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')  # prepare.py has processes enough
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"tokenizer='{name}' needs a package: pip install tokenizers") from None
    return tokenizers


def _kinds(part):
    """The types within a pre-tokenizer, decoder or normalizer of tokenizer.json."""
    if not part:
        return set()
    inner = [part[key] for key in ('pretokenizers', 'decoders', 'normalizers', 'processors') if key in part]
    return set().union(*map(_kinds, inner[0])) if inner else {part['type']}


def _blank_within(vocab):
    """Whether a token goes on from one word into the next: then no place is safe to cut at."""
    return any(re.search('[^▁]▁', token) for token in vocab)


def byte_alphabet():
    """The characters by which tokenizer.json writes the 256 bytes: as GPT-2 does (Radford et al. 2019, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


# How text falls into words before it is encoded, for tiktoken. All leave no character unmatched.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# digits one by one and apart from everything else, as SmolLM2's tokenizer has them: blanks before one stay together
SINGLE_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$|\s++(?=\p{N})|\s+(?!\S)|\s"
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")


def _words(pre_tokenizer):
    """tiktoken's pattern for a pre-tokenizer of tokenizer.json, or None for one that is not known to be the same."""
    parts = pre_tokenizer['pretokenizers'] if pre_tokenizer['type'] == 'Sequence' else [pre_tokenizer]
    *before, last = parts
    if last['type'] != 'ByteLevel' or last.get('add_prefix_space'):
        return None
    if last.get('use_regex', True):
        if not before:
            return GPT2_WORDS
        single_digits = len(before) == 1 and before[0]['type'] == 'Digits' and before[0]['individual_digits']
        return SINGLE_DIGITS if single_digits else None
    llama3 = len(before) == 1 and before[0]['type'] == 'Split' and before[0]['behavior'] == 'Isolated' and \
        not before[0]['invert'] and before[0]['pattern'] == {'Regex': LLAMA3_WORDS}
    return LLAMA3_WORDS if llama3 else None


def as_tiktoken(spec):
    """
    The pattern and ranks with which tiktoken gives the same ids as this tokenizer.json; None where that is not certain.

    The two differ in what they merge: tokenizers the listed pairs, in the order listed; tiktoken any neighbours whose
    bytes together are a token, the lowest id first, and a word that is a token at once. They agree if the ids rise in
    the order of the merges, and if each token's bytes, merged by all pairs listed before its own, come down to just the
    two halves of its own: then neighbours that tiktoken would merge are always a listed pair, since what lies between
    two places that no merge has crossed was merged as if it stood alone.
    """
    model, alphabet = spec['model'], byte_alphabet()
    if spec['normalizer'] or not spec['pre_tokenizer'] or not _words(spec['pre_tokenizer']) or model.get('dropout') or \
            model.get('continuing_subword_prefix') or model.get('end_of_word_suffix') or model.get('byte_fallback') or \
            not all(token['special'] for token in spec['added_tokens']):
        return None
    special = {token['content'] for token in spec['added_tokens']}
    vocab = {token: i for token, i in model['vocab'].items() if token not in special}
    merges = [tuple(merge.split(' ')) if isinstance(merge, str) else tuple(merge) for merge in model['merges']]
    made = [a + b for a, b in merges]
    order = [vocab.get(token, -1) for token in made]
    if -1 in order or order != sorted(set(order)) or vocab.keys() != alphabet.keys() | set(made):
        return None
    rank_of = {pair: i for pair, i in zip(merges, order)}
    for pair, own in rank_of.items():
        parts = list(pair[0] + pair[1])
        while len(parts) > 1:
            best, at = min((rank_of.get(two, own), at) for at, two in enumerate(zip(parts, parts[1:])))
            if best >= own:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if tuple(parts) != pair:
            return None
    return _words(spec['pre_tokenizer']), {bytes(alphabet[c] for c in token): i for token, i in vocab.items()}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, such as Llama 2's or Mistral's `tokenizer.model`. Its BOS, if any, begins each document."""

    def __init__(self, name, model, special=(), beside=()):
        """`model`: the file's bytes; `special`: tokens beyond it (token → id)."""
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"tokenizer='{name}' needs a package: pip install sentencepiece") from None
        self.name, self.model, self.added, self.beside = name, model, dict(special), dict(beside)
        try:
            self.processor = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"tokenizer='{name}' is neither a tokenizer.json nor a SentencePiece model") from None
        self.eot_id = sp.eos_id()
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        if self.eot_id < 0:
            raise UserError(f"tokenizer='{name}' has no end-of-sequence id, which is to end each document")
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        self.bytes_of = [b'' if sp.is_control(i) else bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else
                         ' ⁇ '.encode() if sp.is_unknown(i) else piece.replace('▁', ' ').encode()
                         for i, piece in enumerate(pieces)]
        self.special = {piece: i for i, piece in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)} | self.added
        self.vocab_size = _count_ids([*range(len(pieces)), *self.added.values()], name)
        self.bytes_of += [b''] * (self.vocab_size - len(pieces))
        self.dummy_prefix = sp.normalize('a').startswith('▁')
        if sp.normalize('  a ﬁ').endswith('▁▁a▁ﬁ') and not _blank_within(pieces):
            self.cut = BEFORE_BLANK

    def encode(self, text, special=False):
        return self._by_parts(text) if special else self.processor.encode(_whole_characters(text))

    def decode_bytes(self, ids):
        return b''.join(self.bytes_of[i] for i in ids)

    def state(self):
        more = {'special': self.added, 'beside': self.beside}
        return {'kind': 'sentencepiece', 'name': self.name, 'model': base64.b64encode(self.model).decode()} | {
            key: value for key, value in more.items() if value}


def load_tokenizer(name, eot_token='', eot_id=None):
    """
    The tokenizer called `name`: 'bytes', one of tiktoken's ('gpt2', ...), a tokenizer.json or SentencePiece model, a
    folder that holds one, or the id of a Hugging Face repository. `eot_token` ends documents where that is not the
    tokenizer's own end-of-sequence, `eot_id` where it names none. Raises UserError if it can't be had.
    """
    import tiktoken
    known = tiktoken.list_encoding_names()
    if eot_token and (name == 'bytes' or name in known):
        raise UserError(f"eot_token='{eot_token}' is for a tokenizer.json, and tokenizer='{name}' has an end of text already")
    if name == 'bytes':
        return ByteTokenizer()
    if name in known:
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as e:
            raise UserError(f"tokenizer='{name}': tiktoken could not fetch its file ({type(e).__name__}); connect once, or "
                            'point TIKTOKEN_CACHE_DIR to a folder that has it') from None
        return TiktokenTokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)
    if name.startswith('bpe:'):
        raise UserError(f"tokenizer='{name}' is trained by prepare.py; a data set's folder holds the one trained for it, and "
                        'can be given as the tokenizer')
    if not os.path.exists(name) and name[:1] in ('/', '.', '~'):
        raise UserError(f"tokenizer='{name}': there is no such file or folder")
    if not os.path.exists(name) and not re.fullmatch(HUB_ID, name):
        raise UserError(f"tokenizer='{name}' is not known; choose bytes, {', '.join(known)}, bpe:SIZE, the path of a "
                        'tokenizer.json or SentencePiece model, or a Hugging Face id such as HuggingFaceTB/cosmo2-tokenizer')
    path = _tokenizer_file(name if os.path.exists(name) else from_hub(name, FILES, f"tokenizer='{name}'"))
    try:
        with open(path, 'rb') as f:
            data = f.read()
    except OSError as e:
        raise UserError(f"tokenizer='{name}' cannot be read ({e.strerror})") from None
    if not data.lstrip().startswith(b'{'):
        if eot_token:
            raise UserError(f"eot_token='{eot_token}' is for a tokenizer.json, and tokenizer='{name}' is a SentencePiece model")
        return SentencePieceTokenizer(name, data)
    try:
        spec = json.loads(data)
        if 'kind' in spec:
            return tokenizer_from_state(spec)
        model = os.path.join(os.path.dirname(path), 'tokenizer.model')
        if spec['model'].get('type') == 'Unigram' and os.path.isfile(model):  # which is read from SentencePiece's own file
            return load_tokenizer(model)
        eot_id, bos_id = _document_ids(name, spec, os.path.join(os.path.dirname(path), 'tokenizer_config.json'), eot_token,
                                       eot_id)
        return HuggingFaceTokenizer(name, data.decode(), eot_id, bos_id, _beside(os.path.dirname(path)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"tokenizer='{name}' is not a tokenizer.json ({type(e).__name__}: {e})") from None


def _tokenizer_file(path):
    """The file itself, or the one within a folder."""
    if os.path.isfile(path):
        return path
    for file in (STATE_FILE, 'tokenizer.json', 'tokenizer.model'):
        if os.path.isfile(os.path.join(path, file)):
            return os.path.join(path, file)
    raise UserError(f"tokenizer='{path}': the folder holds neither a tokenizer.json nor a tokenizer.model")


def from_hub(repository, files, what):
    """The folder that holds `files` (patterns) of a Hugging Face repository, from the cache or the network."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f'{what} is on the Hugging Face hub, which needs a package: pip install tokenizers') from None
    try:
        return huggingface_hub.snapshot_download(repository, allow_patterns=files, ignore_patterns=['*/*', 'consolidated*'])
    except (OSError, ValueError) as e:  # its own errors are of these kinds, and so are those of the network
        raise UserError(f'{what}: there is no such file or folder here, and the Hugging Face hub did not give it '
                        f'({type(e).__name__}); check the name and the network, and for a gated one log in: hf auth '
                        'login') from None


def _beside(folder):
    """
    What lies beside a tokenizer.json and is handed on as it is: chat_template, bos_token, pad_token, unk_token, eos_token_id
    where it is a list, and SentencePiece's own model (tokenizer.model, in base64).
    """
    def read(file):
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            return b''
        with open(path, 'rb') as f:
            return f.read()

    config, generation = (json.loads(read(file) or '{}') for file in ('tokenizer_config.json', 'generation_config.json'))
    stops = generation.get('eos_token_id')
    bos = config.get('bos_token')
    found = {key: config.get(key) for key in ('chat_template', 'pad_token', 'unk_token')}
    found['bos_token'] = bos['content'] if isinstance(bos, dict) else bos
    found |= {'chat_template': read('chat_template.jinja').decode() or found['chat_template'],
              'eos_token_id': stops if isinstance(stops, list) and all(type(i) is int for i in stops) else None,
              'tokenizer.model': base64.b64encode(read('tokenizer.model')).decode()}
    return {key: value for key, value in found.items() if value}


def _document_ids(name, spec, config_path, eot_token, eot_id):
    """(end-of-text id, BOS id or None) by a tokenizer.json, and by the tokenizer_config.json beside it, if any."""
    if spec['model'].get('type', 'BPE') != 'BPE':
        raise UserError(f"tokenizer='{name}' is a {spec['model']['type']}; what can be used is a BPE")
    ids = spec['model']['vocab'] | {token['content']: token['id'] for token in spec['added_tokens']}
    config = {}
    if os.path.isfile(config_path):
        with open(config_path, encoding='utf-8') as f:
            config = json.load(f)
    eos = config.get('eos_token')
    usual = ('<|endoftext|>', '</s>', '<|end_of_text|>', '<eos>')
    wanted = [eot_token] if eot_token else [eos['content'] if isinstance(eos, dict) else eos, *usual]
    found = [ids[token] for token in wanted if token in ids] + ([] if eot_id is None else [eot_id])
    if not found:
        raise UserError(f"tokenizer='{name}' has no {eot_token or 'end-of-text token that is known here'}; name the one that "
                        'ends a document with --eot_token')
    # what the tokenizer's own convention puts before a text
    tokenizers = tokenizers_package(name)
    try:
        first = tokenizers.Tokenizer.from_str(json.dumps(spec)).encode('a').ids[:1]
    except Exception as e:  # the package has no other kind
        raise UserError(f"tokenizer='{name}' is not a tokenizer.json that the package tokenizers can read ({e})") from None
    special = {token['id'] for token in spec['added_tokens'] if token['special']}
    return found[0], first[0] if special.issuperset(first) and first else None


def train_bpe(texts, vocab_size, special_tokens):
    """
    Trains a byte-level BPE with GPT-2's words on an iterator over texts; returns the text of its tokenizer.json.

    `vocab_size` counts the 256 bytes and `special_tokens`, which get the first ids and must hold '<|endoftext|>'.
    """
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
    tokenizers = tokenizers_package(f'bpe:{vocab_size}')
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return bpe.to_str()


def tokenizer_from_state(state):
    """The tokenizer that `state()` described, without a network. Raises UserError where that is no such description."""
    kind = state.get('kind') if isinstance(state, dict) else None
    if kind not in ('bytes', 'tiktoken', 'huggingface', 'sentencepiece'):
        raise UserError(f"this file's tokenizer is of the kind {kind!r:.80}, which this version does not know")
    try:
        tokenizer = _from_state(kind, state)
        tokenizer.encode('a')
        ends = tokenizer.eot_id, tokenizer.bos_id or 0
        fits = type(tokenizer.name) is str and all(type(i) is int for i in (*ends, *tokenizer.stop_ids())) and \
            0 <= min(ends) <= max(ends) < tokenizer.vocab_size
    except UserError:
        raise
    except BaseException as e:  # a panic in the packages' Rust is no Exception
        if isinstance(e, (KeyboardInterrupt, SystemExit)):
            raise
        raise UserError(f"this file's tokenizer, of the kind {kind!r}, is damaged ({type(e).__name__}: {e})") from None
    if not fits:
        raise UserError(f"this file's tokenizer, of the kind {kind!r}, is damaged: its name or its end of text is none")
    return tokenizer


def _from_state(kind, state):
    special, beside = state.get('special', {}), state.get('beside', {})
    if kind == 'bytes':
        return ByteTokenizer(special, beside)
    if kind == 'tiktoken':
        pairs = (line.split() for line in state['ranks'].splitlines())
        ranks = {base64.b64decode(token): int(i) for token, i in pairs}
        return TiktokenTokenizer(state['name'], state['pattern'], ranks, special, beside)
    if kind == 'huggingface':
        return HuggingFaceTokenizer(state['name'], state['json'], state['eot_id'], state['bos_id'], beside)
    return SentencePieceTokenizer(state['name'], base64.b64decode(state['model']), special, beside)


def _count_ids(ids, name):
    """One more than the largest id. A list of what each stands for is made, so that few may stand for nothing."""
    if not all(type(i) is int and 0 <= i < len(ids) + 2**20 for i in ids):
        raise UserError(f"tokenizer='{name}' has {len(ids)} tokens, but not all of their ids are numbers in that range")
    return max(ids) + 1
