"""
Files of torch.save, read as data: nothing in them is executed, and nothing is made that they do not hold.

    data = read('out/stdlib/ckpt.pt')

Such a file is a zip archive. `data.pkl` is a pickle of everything but the tensors' bytes; these are records of their own,
stored as they are, each with its CRC-32. torch.load looks at no checksum, and even with `weights_only=True` it lets a pickle
call a hundred functions, `bytearray(10**12)` and `torch.Tensor(10**11)` among them. The reader below knows the 30 of
pickle's 68 opcodes that plain data takes, and of functions only the one that makes a tensor of a record.
"""

import math
import pickletools
import re
import struct
import zipfile
import zlib
from typing import NamedTuple

import torch

OPCODES = 2**20  # in a pickle, at most; the checkpoint of a GPT-2 XL has 50 thousand, and each makes a hundred bytes or so
DEPTH = 16  # dictionaries and lists within each other, at most; ours are 6 deep
RECORDS = r'[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)'
DTYPES = {f'torch {kind}Storage': dtype for kind, dtype in (
    ('Float', torch.float32), ('Double', torch.float64), ('Half', torch.float16), ('BFloat16', torch.bfloat16),
    ('Byte', torch.uint8), ('Char', torch.int8), ('Short', torch.int16), ('Int', torch.int32), ('Long', torch.int64),
    ('Bool', torch.bool))}
DICT, TENSOR = 'collections OrderedDict', 'torch._utils _rebuild_tensor_v2'


class NotPlain(Exception):
    """The file holds what is no plain data: something to execute, or what could not be kept within bounds."""


class Damaged(Exception):
    """The file is not as torch.save wrote it: cut off, or of another kind. The message says how."""


class BadChecksum(Damaged):
    """The file's content has changed since it was written."""


class Function(NamedTuple):
    name: str


class Storage(NamedTuple):
    elements: torch.Tensor  # all of a record, one after the other


def read(path, tensors=True, checksums=True):
    """
    What was saved: dictionaries, lists, tuples, text, numbers, True, False, None, and tensors on the CPU. Without `tensors`
    they have their shape and no content (torch's meta device); without `checksums` theirs are not looked at either.

    Raises NotPlain or Damaged for a file that is not of this kind, and OSError if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _records(archive)
            if _bytes(archive, records.pop('byteorder', None)) not in (b'', b'little'):
                raise Damaged('its numbers have their bytes in the other order')
            made, storages = _run(_bytes(archive, records.pop('data.pkl')), archive, records, tensors)
            for key in storages if checksums and not tensors else ():
                _bytes(archive, records[key], keep=False)
            return made
    except zipfile.BadZipFile as e:
        raise (BadChecksum if 'CRC' in str(e) else Damaged)(str(e)) from None
    except (EOFError, KeyError, ValueError, NotImplementedError, RuntimeError, struct.error, zlib.error) as e:
        raise Damaged(f'{type(e).__name__}: {e}') from None  # of zipfile, for what is no such archive


def _records(archive):
    """The archive's records by their names, without the folder that all are in."""
    found = {}
    for info in archive.infolist():
        name = info.filename.partition('/')[2]
        if not re.fullmatch(RECORDS, info.filename) or name in found or info.filename.split('/')[0] != \
                archive.infolist()[0].filename.split('/')[0]:
            raise NotPlain(f'a record {info.filename[:80]!r}')
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise NotPlain(f'{info.filename[:80]!r} is compressed')
        found[name] = info
    if 'data.pkl' not in found:
        raise Damaged('it has no data.pkl')
    archive.fp.seek(0, 2)
    if sum(info.file_size for info in found.values()) > archive.fp.tell():  # then they lie one over the other
        raise Damaged('its records are larger than the file')
    return found


def _bytes(archive, info, keep=True, into=None):
    """The bytes of a record, or none if they are not kept, or `into` a memory of their size; BadZipFile by a wrong checksum."""
    if info is None:
        return b''
    with archive.open(info) as f:
        if keep and into is None:
            return f.read()
        at = 0
        while part := f.read(2**20):  # a size that stays in the processor's cache between checksum and copy
            if into is not None:
                into[at:at + len(part)] = part
            at += len(part)
        if at != info.file_size:
            raise Damaged('it is cut off')


def _run(pickle, archive, records, tensors):
    """Runs a pickle's opcodes (pickletools says what each means) → what it makes, and the names of the records in it."""
    stack, marks, memo, storages = [], [], {}, {}

    def storage(kind, dtype, key, _, n):
        """All elements of a record."""
        if (kind, type(dtype), type(key), type(n)) != ('storage', Function, str, int):
            raise NotPlain('a reference to something else than a record')
        info, dtype = records.get(f'data/{key}'), DTYPES.get(dtype.name)
        if info is None or dtype is None or n * dtype.itemsize != info.file_size:
            raise NotPlain('a tensor whose content is not in the file')
        if f'data/{key}' not in storages:
            content = torch.empty(info.file_size, dtype=torch.uint8, device='cpu' if tensors else 'meta')
            if tensors:
                _bytes(archive, info, into=memoryview(content.numpy()))
            storages[f'data/{key}'] = dtype, Storage(content.view(dtype))
        if storages[f'data/{key}'][0] != dtype:
            raise NotPlain('a record of two types')
        return storages[f'data/{key}'][1]

    def tensor(storage, offset, size, stride, *_):
        """A tensor within a storage: what torch's own reader would enlarge, or repeat by a stride of 0, is refused."""
        whole = type(size) is type(stride) is tuple and len(size) == len(stride) <= 8 and all(
            type(n) is int and 0 <= n < 2**48 for n in (offset, *size, *stride))
        if not (whole and type(storage) is Storage):
            raise NotPlain('a tensor of no shape')
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if all(size) else 0
        if max(reach, math.prod(size)) > len(storage.elements):
            raise NotPlain(f'a tensor {size} that is larger than what is stored of it')
        return torch.as_strided(storage.elements, size, stride, offset)

    def pop_mark():
        above = stack[marks[-1]:]
        del stack[marks.pop():]
        return above

    def put(target, items):
        if type(target) is not dict or not all(type(key) in (str, int) for key in items[::2]):
            raise NotPlain('a dictionary whose keys are neither text nor whole numbers')  # which could all have one hash
        target.update(zip(items[::2], items[1::2], strict=True))

    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(pickle)):
            if count > OPCODES:
                raise NotPlain(f'more than {OPCODES} opcodes')
            match opcode.name:
                case 'BINGET' | 'LONG_BINGET':
                    found = memo[arg]
                    # what has parts may stand in one place only, or a few bytes make a tree of any size, or one without end
                    if type(found) in (dict, list) or type(found) is tuple and not (
                            len(found) <= 8 and all(type(part) in (str, int, float, bool) for part in found)):
                        raise NotPlain('one container in several places')
                    stack.append(found)
                case 'BINPUT' | 'LONG_BINPUT':
                    memo[arg] = stack[-1]
                case 'BINUNICODE' | 'BININT' | 'BININT1' | 'BININT2' | 'BINFLOAT':
                    stack.append(arg)
                case 'LONG1':
                    if not -2**63 <= arg < 2**64:
                        raise NotPlain('a number of more than 64 bits')
                    stack.append(arg)
                case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                    stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[opcode.name])
                case 'EMPTY_DICT' | 'EMPTY_LIST' | 'EMPTY_TUPLE':
                    stack.append({'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}[opcode.name]())
                case 'MARK':
                    marks.append(len(stack))
                case 'TUPLE':
                    stack.append(tuple(pop_mark()))
                case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                    marks.append(len(stack) - int(opcode.name[-1]))
                    stack.append(tuple(pop_mark()))
                case 'APPEND' | 'SETITEM':
                    marks.append(len(stack) - (1 if opcode.name == 'APPEND' else 2))
                    items = pop_mark()
                    stack[-1].append(*items) if opcode.name == 'APPEND' else put(stack[-1], items)
                case 'APPENDS':
                    items = pop_mark()
                    stack[-1].extend(items)
                case 'SETITEMS':
                    items = pop_mark()
                    put(stack[-1], items)
                case 'GLOBAL':
                    if arg not in (DICT, TENSOR, *DTYPES):
                        raise NotPlain(f'{arg[:80]!r}')
                    stack.append(Function(arg))
                case 'BINPERSID':
                    stack.append(storage(*stack.pop()))
                case 'REDUCE':
                    arguments, function = stack.pop(), stack.pop()
                    if type(function) is not Function or type(arguments) is not tuple:
                        raise NotPlain('a call of something else')
                    stack.append({DICT: lambda: {}, TENSOR: tensor}[function.name](*arguments))
                case 'BUILD':  # attributes of an ordered dictionary, which a state_dict has for torch's own modules
                    stack.pop()
                case 'PROTO' | 'STOP':
                    pass
                case _:
                    raise NotPlain(f'the opcode {opcode.name}')
        made, = stack
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise NotPlain(f'no pickle of torch.save ({type(e).__name__}: {e})') from None
    level = [made]
    for _ in range(DEPTH + 1):
        level = [part for whole in level if type(whole) in (dict, list, tuple)
                 for part in (whole.values() if type(whole) is dict else whole)]
        if any(type(part) in (Function, Storage) for part in level):
            raise NotPlain('parts of a tensor')
    if level:
        raise NotPlain(f'more than {DEPTH} containers within each other')
    return made, storages
