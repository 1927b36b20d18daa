"""
Text ↔ token ids: one face over every kind of tokenizer.

    tokenizer = load_tokenizer('gpt2')
    ids = tokenizer.encode('Hello')              # special tokens in the text are text
    text = tokenizer.decode(ids)

Each has `name`, `vocab_size`, `eot_id` (the end-of-text id, which separates documents), `encode`, `decode`,
`decode_bytes`, and `state()`: all of it as plain data, from which `tokenizer_from_state` makes it again without a
network. Two tokenizers with one `fingerprint()` agree on every id.
"""

import base64
import codecs
import hashlib
import json

from configurator import UserError


class Tokenizer:
    """What all kinds share. `decode_bytes` is the primitive: a token may hold half a character."""

    def decode(self, ids):
        """Ids → text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def stream(self):
        """A function from the next id to the text that it completes: never half a character."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda i: decoder.decode(self.decode_bytes([i]))

    def fingerprint(self):
        return hashlib.sha256(json.dumps(self.state(), sort_keys=True).encode()).hexdigest()[:16]


class ByteTokenizer(Tokenizer):
    """UTF-8's 256 bytes and an end-of-text."""

    name, vocab_size, eot_id = 'bytes', 257, 256

    def encode(self, text):
        return list(text.encode('utf-8', errors='replace'))  # half a surrogate pair, as broken JSON has it, becomes '?'

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)

    def state(self):
        return {'kind': 'bytes', 'name': self.name}


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding run by tiktoken."""

    def __init__(self, name, pattern, ranks, special):
        """`ranks`: token bytes → id; `special`: special token → id, '<|endoftext|>' among them."""
        import tiktoken
        self.name = name
        self.pattern, self.ranks, self.special = pattern, ranks, special
        self.eot_id = special['<|endoftext|>']
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self.encoding.n_vocab
        self.text_ids = set(ranks.values())  # not the specials, nor the gaps that some vocabularies have

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([i for i in ids if i in self.text_ids])

    def state(self):
        # tiktoken's own file format: a line for each token, its bytes in base64 and its id
        lines = (f'{base64.b64encode(token).decode()} {i}' for token, i in sorted(self.ranks.items(), key=lambda t: t[1]))
        return {'kind': 'tiktoken', 'name': self.name, 'pattern': self.pattern, 'ranks': '\n'.join(lines),
                'special': dict(self.special)}


def load_tokenizer(name):
    """The tokenizer called `name`: 'bytes', or one of tiktoken's ('gpt2', ...). Raises UserError if it can't be had."""
    if name == 'bytes':
        return ByteTokenizer()
    import tiktoken
    known = [n for n in tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(f"tokenizer='{name}' is not known; choose bytes, {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:
        raise UserError(f"tokenizer='{name}': tiktoken could not fetch its file ({type(e).__name__}); connect once, or "
                        'point TIKTOKEN_CACHE_DIR to a folder that has it') from None
    return TiktokenTokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def tokenizer_from_state(state):
    """The tokenizer that `state()` described, without a network."""
    kind = state.get('kind')
    if kind == 'bytes':
        return ByteTokenizer()
    if kind == 'tiktoken':
        pairs = (line.split() for line in state['ranks'].splitlines())
        ranks = {base64.b64decode(token): int(i) for token, i in pairs}
        return TiktokenTokenizer(state['name'], state['pattern'], ranks, state['special'])
    raise UserError(f"this file's tokenizer is of the kind {kind!r}, which this version does not know")
