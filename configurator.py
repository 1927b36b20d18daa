"""
Settings: a script's plain globals are its defaults; files and flags override them.

    python train.py config/gpt2.py --batch_size=8     # a file first, a flag on top of it
    python train.py --help                            # every setting, its value and where that came from

A script writes its settings as globals, one to a line, each with a comment, and then calls
`config = configure(globals())`. From there on each setting is an ordinary variable.

- A config file is Python (so run only files that you trust). Its assignments override the defaults; it may import,
  define functions, compute one setting from another, and keep helper variables whose names begin with `_`.
- A flag is `--key=value`, split at the first `=` only. `--key` alone switches a True/False setting on.
- Later beats earlier, and a name that no default has is an error in a file as much as on the command line.
- A comment that begins with alternatives, `# adamw | sgd: ...`, is also the check: only these values are accepted.
- Where it begins with `# auto, or ...`, a number may also be `auto`: it stays what it was, and its name is in `config.auto`.
"""

import ast
import builtins
import difflib
import glob
import os
import re
import sys
import traceback
import types

AUTO = ['auto']  # the choices of a number that may be 'auto'


class UserError(Exception):
    """A mistake the user can mend. `configure` has it shown as one line, without a traceback, and with exit code 2."""

    def __str__(self):  # one line whatever a broken file has put into it, and nothing that a terminal would obey
        text = super().__str__()
        text = text if len(text) <= 2000 else text[:1000] + ' ... ' + text[-500:]
        return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Config(dict):
    """The resolved settings, name → value. `source[name]` says where each came from: default, a file, command line."""

    def __init__(self, settings):
        super().__init__(settings)
        self.source = dict.fromkeys(settings, 'default')
        self.auto = set()  # names of numbers that are 'auto'
        self.positional = []  # arguments that are no settings, where a script takes some


def configure(settings, inherits=None, positional=False):
    """
    Resolves `settings` (a script's `globals()`) against sys.argv, writes the values back, and returns them as a Config. With
    `inherits`, the name of a script beside it, that script's settings are this one's too, where it has none of that name.
    `positional`: arguments without -- are no config files, but for the script, in `config.positional`.

    Raises UserError for a name that has no default, a value of another type, or a file that cannot be read.
    """
    sys.excepthook = _show
    sys.stdout.reconfigure(errors='replace')  # generated text may hold what a terminal's encoding does not
    script = settings['__file__']
    own = {k: v for k, v in settings.items() if _is_setting(k, v)}
    with open(script, encoding='utf-8') as f:
        entries = _read_comments(f.read(), own)
    config = Config(own)
    if inherits:
        with open(os.path.join(os.path.dirname(os.path.abspath(script)), inherits), encoding='utf-8') as f:
            code = f.read()
        theirs = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(code).body
                  if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}
        entries += [entry for entry in _read_comments(code, theirs) if entry[0] not in own]
        config = Config(own | {name: theirs[name] for name, _ in entries if name not in own and name in theirs})
    choices = {name: _choices(comment) for name, comment in entries if name}

    wants_help = False
    for arg in sys.argv[1:]:
        if arg in ('--help', '-h'):
            wants_help = True
        elif arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            value = _parse(key, text, equals, config, choices.get(key))
            _set(config, key, value, 'command line', choices)
        elif arg.startswith('-'):
            raise UserError(f'{arg}: a setting is written --key=value')
        elif positional:
            config.positional.append(arg)
        else:
            _run_file(arg, config, choices)
    settings.update(config)
    if wants_help:
        _print_help(settings['__doc__'], entries, config)
        raise SystemExit(0)
    return config


def at_least(config, least, *names):
    """Raises UserError for those of the settings that are below `least`."""
    for name in names:
        if config[name] < least:
            raise UserError(f'{name}={config[name]} is less than {least}; choose {least} or more')


def _is_setting(name, value):
    return not name.startswith('_') and isinstance(value, (bool, int, float, str))


def _run_file(path, config, choices):
    """Runs a config file and takes over the settings that it assigns."""
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, glob.glob('config/*.py') + glob.glob('data/*.py'), 1, 0.5)
        hint = f'did you mean {near[0]}?' if near else 'settings are written --key=value'
        raise UserError(f'{path}: there is no such config file; {hint}')
    # The file reads the settings so far as if they were builtins, so that its own namespace holds what it assigns.
    namespace = {'__builtins__': {**vars(builtins), **config}, '__file__': path, '__name__': 'config'}
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), namespace)
    except SyntaxError as e:
        raise UserError(f'{path}, line {e.lineno}: {e.msg}') from None
    except Exception as e:  # whatever the file's own code does wrong
        line = next((f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if f.filename == path), '?')
        raise UserError(f'{path}, line {line}: {type(e).__name__}: {e}') from None
    for key, value in namespace.items():
        if not key.startswith('_') and not callable(value) and not isinstance(value, types.ModuleType):
            _set(config, key, value, path, choices)


def _parse(key, text, equals, config, choices):
    """The value that `--key=text` stands for: text as it is where the default is text, else a Python literal."""
    default = config.get(key)
    if not equals:
        if isinstance(default, bool) or True in (choices or ()) or key not in config:
            return True  # `_set` has the better message for an unknown name
        raise UserError(f'--{key} needs a value, written with = and no blank: --{key}={default}')
    if isinstance(default, str) and not (choices and text in map(str, choices)):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        return text  # words for a number: `_set` says what it wants instead


def _set(config, key, value, source, choices):
    """Checks one assignment against the setting's default and makes it."""
    if key not in config:
        near = difflib.get_close_matches(key, config, 1, 0.6)
        hint = f'did you mean {near[0]}?' if near else '--help lists them'
        raise UserError(f'{key} ({source}) is not a setting; {hint}')
    allowed, default = choices.get(key), config[key]
    config.auto.discard(key)
    if allowed == AUTO and value == 'auto':
        config.auto.add(key)
        return
    if allowed and allowed != AUTO:
        value = next((c for c in allowed if str(c) == str(value)), value)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), map(str, allowed), 1, 0.6)
            hint = f'; did you mean {near[0]}?' if near else ''
            raise UserError(f'{key}={value!r} ({source}): choose one of {", ".join(map(str, allowed))}{hint}')
    elif isinstance(default, float) and type(value) is int and abs(value) < 1e38:
        value = float(value)
    elif type(value) is not type(default):
        kind = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[type(default)]
        raise UserError(f'{key}={value!r} ({source}): expected {kind}, such as {default!r}')
    most = 2**64 if type(value) is int else 1e38  # what a machine can hold; nor is it infinite, or no number at all
    if type(value) in (int, float) and not abs(value) < most:
        raise UserError(f'{key}={value!r} ({source}): expected a number within -{most:g} and {most:g}, such as {default!r}')
    config[key] = value
    config.source[key] = source


def _read_comments(code, config):
    """
    The script's settings in the order of its source, as (name, comment); (None, text) is a heading.

    A heading is a comment line of its own; a comment may go on over indented comment lines below its setting.
    """
    entries, done = [], False
    for line in code.splitlines():
        if line.startswith('config = configure('):
            done = True
        if done:
            break
        setting = re.match(r'(\w+) = (.*)', line)
        if setting and setting[1] in config:
            entries.append((setting[1], _comment(setting[2])))
        elif line.startswith('# ') and line.strip('# -'):
            entries.append((None, line.strip('# -')))
        elif entries and entries[-1][0] and re.match(r' +# ', line):
            entries[-1] = (entries[-1][0], entries[-1][1] + ' ' + line.strip(' #'))
    return entries


def _comment(text):
    """The comment of `value  # comment`; a '#' within quotes belongs to the value."""
    return re.sub(r"""^('[^']*'|"[^"]*"|[^'"#])*#?\s*""", '', text, count=1)


def _choices(comment):
    """`a | b | c: what it means` → ['a', 'b', 'c'], with True, False and numbers as such; no alternatives → None."""
    if comment.startswith('auto, or '):
        return AUTO
    words = re.match(r'[\w.-]+( \| [\w.-]+)+', comment)
    if not words:
        return None
    literal = {'True': True, 'False': False}
    return [literal.get(w, int(w) if w.isdigit() else w) for w in words[0].split(' | ')]


def _print_help(doc, entries, config):
    print((doc or '').strip() + '\n\nSettings, each with its source where that is not the default:')
    for name, comment in entries:
        if name is None:
            print(f'\n  {comment}')
        else:
            source = config.source[name]
            left = f'{name} = {"auto" if name in config.auto else repr(config[name])}'
            print(f'    {left:<36}  {comment}' + (f'  [{source}]' if source != 'default' else ''))


def _show(kind, error, trace):
    """sys.excepthook: one line for what the user can mend (exit 2) or interrupted (130); the rest as ever (exit 1)."""
    if issubclass(kind, UserError):
        print(f'error: {error}', file=sys.__stderr__, flush=True)  # torch.distributed holds sys.stderr back meanwhile
        sys.exit(2)
    if issubclass(kind, KeyboardInterrupt):
        print('\ninterrupted', file=sys.__stderr__, flush=True)
        sys.exit(130)
    if issubclass(kind, BrokenPipeError):  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.__excepthook__(kind, error, trace)
