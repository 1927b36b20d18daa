"""
Conversations → rows of tokens: what post-training reads.

A row has `block_size` tokens and holds several conversations, one after the other, filled up with end-of-text. Beside each
token stands what it is: TAUGHT, a target of training, or not, and whether a conversation BEGINS with it, which does not see
those before it. For dpo rows come in pairs: in the first stand the chosen conversations, in the second the rejected ones, each
pair beginning at the same place in both.

A conversation longer than a row is cut at the row's end. What then has nothing taught, or nothing in which chosen and rejected
differ, is left out.
"""

import bisect

import numpy as np

import chat
from configurator import UserError

TAUGHT, BEGINS = 1, 2  # bits of the byte beside a token
SHIFT = 30  # where these bits stand in a uint32 whose lower ones are the id, until rows are written

# what may be done with a conversation, and what is said of it
OUTCOMES = {'cut': 'were cut at the end of a row (block_size)',
            'untaught': 'were left out, as nothing that is taught, or differs, lies within a row (block_size)',
            'same': 'were left out, as chosen and rejected are the same',
            'spelled': 'were left out, as they spell a special token',
            'refused': 'were left out, as the chat template has no form for them'}


def sides(stage):
    """How many rows belong together."""
    return 2 if stage == 'dpo' else 1


def encode(tokenizer, conversation, stage, block_size):
    """
    A conversation of chat.read_conversation, or a pair of chat.read_pair → its ids with their bits above them (uint32; of a
    pair the chosen, then the rejected, of one length), or None if it is left out; and its outcome, '' for nothing to say.
    """
    *texts, shared = conversation if stage == 'dpo' else (conversation, 0)
    if any(token in message['content'] for text in texts for message in text for token in tokenizer.special):
        return None, 'spelled'
    try:
        found = [chat.encode(tokenizer, text, shared) for text in texts]
    except UserError:
        return None, 'refused'
    if stage == 'dpo' and np.array_equal(found[0][0], found[1][0]):
        return None, 'same'
    cut = any(len(ids) > block_size for ids, _ in found)
    found = [(ids[:block_size], taught[:block_size]) for ids, taught in found]
    for _, taught in found:
        taught[0] = False  # what nothing comes before cannot be predicted
    if not all(taught.any() for _, taught in found) or stage == 'dpo' and np.array_equal(found[0][0], found[1][0]):
        return None, 'untaught'
    out = np.full((len(found), max(len(ids) for ids, _ in found)), tokenizer.eot_id, np.uint32)
    for row, (ids, taught) in zip(out, found):
        row[:len(ids)] = ids | taught.astype(np.uint32) * TAUGHT << SHIFT
    out[:, 0] |= BEGINS << SHIFT
    return out.reshape(-1), 'cut' if cut else ''


def pack(lengths, size):
    """
    Items of these lengths → rows of at most `size`, as lists of items: the longest first, each into the fullest row that has
    room (best fit decreasing; Ding et al. 2024 pack training text so).
    """
    rows, space = [], []  # space: (room left, row) of each that has some, sorted
    for item in np.argsort(-np.asarray(lengths, np.int64), kind='stable').tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(space, (length, 0))
        room, row = space.pop(at) if at < len(space) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        if room > length:
            bisect.insort(space, (room - length, row))
    return rows


def fill(ids, lengths, stage, block_size, eot_id):
    """Conversations as `encode` gives them, one after the other in `ids` → their rows (n, block_size), uint32 with bits."""
    n, lengths = sides(stage), np.asarray(lengths, np.int64)
    starts, packed = np.cumsum(lengths) - lengths, pack(lengths // n, block_size)
    out = np.full((len(packed), n, block_size), eot_id, np.uint32)
    for row, items in zip(out, packed):
        at = 0
        for item in items:
            part = ids[starts[item]:starts[item] + lengths[item]].reshape(n, -1)
            row[:, at:at + part.shape[1]] = part
            at += part.shape[1]
    return out.reshape(-1, block_size)
