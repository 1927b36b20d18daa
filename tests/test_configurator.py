"""Settings: files are checked as strictly as flags, text is taken as it is, and a mistake is told what was meant."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = '''"""
Does something.

    python script.py
"""
from configurator import configure
# ---- first group
name = 'a#b'  # a name
steps = 10  # how many
rate = 0.5  # how fast
flag = False
kind = 'plain'  # plain | fancy: how it looks
mode = 'auto'  # auto | True | False: a third way
# ----
config = configure(globals())
print(dict(config), {k: v for k, v in config.source.items() if v != 'default'})
assert all(globals()[k] == v for k, v in config.items())
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)

    def call(*args, code=0):
        done = subprocess.run([sys.executable, 'script.py', *args], cwd=tmp_path, text=True, capture_output=True,
                              env={'PYTHONPATH': str(ROOT), 'PATH': ''})
        assert done.returncode == code, done.stderr
        assert 'Traceback' not in done.stderr
        return done.stdout if code == 0 else done.stderr

    call.folder = tmp_path
    return call


def test_defaults_files_and_flags_override_each_other_in_this_order(script):
    (script.folder / 'c.py').write_text('import math\n_half = steps // 2\nsteps = _half + 1\nrate = 3\n'
                                        'def helper():\n    pass\n')
    assert script('c.py', '--rate=4') == (
        "{'name': 'a#b', 'steps': 6, 'rate': 4.0, 'flag': False, 'kind': 'plain', 'mode': 'auto'} "
        "{'steps': 'c.py', 'rate': 'command line'}\n")


@pytest.mark.parametrize('flag, result', [
    ('--name=x=y=z', "'name': 'x=y=z'"), ('--name=', "'name': ''"), ('--name=12', "'name': '12'"),
    ('--name=[1', "'name': '[1'"), ('--rate=2', "'rate': 2.0"), ('--rate=1e-3', "'rate': 0.001"),
    ('--steps=1_000', "'steps': 1000"), ('--steps=-5', "'steps': -5"), ('--flag=True', "'flag': True"),
    ('--flag', "'flag': True"), ('--kind=fancy', "'kind': 'fancy'"), ('--mode=False', "'mode': False")])
def test_flags(script, flag, result):
    assert result in script(flag)


@pytest.mark.parametrize('flag, words', [
    ('--stepz=5', 'stepz (command line) is not a setting; did you mean steps?'),
    ('--zzz=5', '--help lists them'), ('--steps=2.5', 'expected a whole number, such as 10'),
    ('--steps=many', 'expected a whole number'), ('--steps=True', 'expected a whole number'),
    ('--steps', '--steps needs a value, written with = and no blank: --steps=10'), ('--flag=yes', 'expected True or False'),
    ('--flag=1', 'expected True or False'), ('--rate=fast', 'expected a number, such as 0.5'),
    ('--kind=fency', 'choose one of plain, fancy; did you mean fancy?'), ('--mode=2', 'choose one of auto, True, False'),
    ('-x', 'written --key=value'), ('nothing.py', 'there is no such config file'), ('steps=5', '--key=value')])
def test_mistakes_on_the_command_line_get_one_line(script, flag, words):
    error = script(flag, code=2)
    assert words in error and error.count('\n') == 1 and error.startswith('error: ')


@pytest.mark.parametrize('code, words', [
    ('stepz = 5', 'stepz (c.py) is not a setting; did you mean steps?'), ('steps = 2.5', 'expected a whole number'),
    ('steps = None', 'expected a whole number'),
    ("name = 'a", 'c.py, line 1: unterminated'), ('\nsteps = 1 // 0', 'c.py, line 2: ZeroDivisionError'),
    ('import numppy', "No module named 'numppy'"),
    ('steps = stepz', "name 'stepz' is not defined"),
    ("kind = 'odd'", 'choose one of plain, fancy')])
def test_mistakes_in_a_file_get_one_line(script, code, words):
    (script.folder / 'c.py').write_text(code + '\n')
    error = script('c.py', code=2)
    assert words in error and error.count('\n') == 1


def test_a_number_may_be_auto_and_a_script_may_take_over_anothers_settings(tmp_path):
    (tmp_path / 'base.py').write_text('from configurator import configure\n# ---- sizes\nbatch = 16  # auto, or how many\n'
                                      "name = 'base'  # a name\n# ----\nconfig = configure(globals())\nboom = 1 / 0\n")
    (tmp_path / 'top.py').write_text("from configurator import configure\nname = 'top'  # its own\n# ----\n"
                                     "config = configure(globals(), inherits='base.py')\nprint(dict(config), config.auto)\n")

    def call(*args, code=0):
        done = subprocess.run([sys.executable, 'top.py', *args], cwd=tmp_path, text=True, capture_output=True,
                              env={'PYTHONPATH': str(ROOT), 'PATH': ''})
        assert done.returncode == code and 'Traceback' not in done.stderr, done.stderr
        return done.stdout + done.stderr

    (tmp_path / 'auto.py').write_text("batch = 'auto'\n")
    assert call() == "{'name': 'top', 'batch': 16} set()\n"
    assert call('--batch=auto') == call('auto.py') == "{'name': 'top', 'batch': 16} {'batch'}\n"
    assert call('auto.py', '--batch=8') == "{'name': 'top', 'batch': 8} set()\n"
    assert call('--batch=8', 'auto.py') == "{'name': 'top', 'batch': 8} {'batch'}\n"
    assert "batch='many' (command line): expected a whole number, such as 16" in call('--batch=many', code=2)
    assert 'batch = 16' in call('--help') and 'auto, or how many' in call('--help') and 'its own' in call('--help')


def test_help_shows_comment_value_and_source(script):
    (script.folder / 'c.py').write_text('steps = 7\n')
    text = script('c.py', '--rate=1', '--help')
    for words in ('Does something.', 'first group', 'a name', "name = 'a#b'"):
        assert words in text
    lines = {line.split()[0]: line for line in text.splitlines() if ' = ' in line and '(' not in line and line[4:5] != ' '}
    assert lines['steps'].split() == 'steps = 7 how many [c.py]'.split()
    assert lines['rate'].split() == 'rate = 1.0 how fast [command line]'.split()
    assert lines['kind'].split() == "kind = 'plain' plain | fancy: how it looks".split()


@pytest.mark.parametrize('name', ['train.py', 'prepare.py', 'sample.py'])
def test_help_lists_every_setting_of_a_script_with_its_comment(name):
    text = subprocess.run([sys.executable, str(ROOT / name), '--help'], text=True, capture_output=True, check=True).stdout
    listed = {line.split()[0] for line in text.splitlines() if line.startswith('    ') and ' = ' in line}
    assert {'train.py': {'out_dir', 'learning_rate', 'n_kv_head', 'seed'}, 'prepare.py': {'source', 'val_fraction'},
            'sample.py': {'prompt', 'top_p'}}[name] <= listed
    assert [line for line in text.splitlines() if re.fullmatch(r'    \w+ = \S*\s*', line)] == []  # each has a comment
