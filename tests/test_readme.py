"""The commands of README and docs are real: each one's settings exist, its files are there, and the quick start runs."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run

README = (ROOT / 'README.md').read_text()
PAGES = [README, *(path.read_text() for path in ROOT.glob('docs/*.md'))]
BLOCKS = [block for page in PAGES for block in re.findall(r'```sh\n(.*?)```', page, re.S)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if 'python ' in line or 'torchrun ' in line]
DOCSTRINGS = [line.split('  #')[0].strip() for path in [*ROOT.glob('*.py'), *ROOT.glob('config/*.py'), *ROOT.glob('data/*.py')]
              for line in path.read_text().split('"""')[1].replace('\\\n', '').splitlines()
              if re.match(r'    (python|torchrun) ', line)]


@pytest.mark.parametrize('command', [*COMMANDS, *sorted(set(DOCSTRINGS) - set(COMMANDS))])
def test_commands_name_files_and_settings_that_exist(command):
    words = shlex.split(re.sub(r'.*&& ', '', command), comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith('.py'))
    done = subprocess.run([sys.executable, *words[script:], '--help'], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_nothing_waits_to_be_filled_in():
    assert [page[:80] for page in [*PAGES, (ROOT / 'LOG.md').read_text()] if '@@' in page or 'TODO' in page] == []


def test_files_it_names_exist():
    names = set(re.findall(r'`((?:config|data|tests)/[\w/]+\.\w+|\w+\.py|requirements[\w-]*\.txt)`|\]\(([\w./]+)\)', README))
    names = {a or b for a, b in names}
    assert len(names) > 15 and [name for name in names if not (ROOT / name).exists()] == []


def test_the_files_section_lists_every_script():
    table = README.split('## The files')[1].split('## ')[0]
    assert {path.name for path in ROOT.glob('*.py')} == set(re.findall(r'`(\w+\.py)`', table))


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path):
    """`python train.py` and `python sample.py` from nothing, cut short."""
    assert 'python train.py' in COMMANDS
    short = ('--max_iters=30', '--eval_interval=15', '--eval_iters=2', '--sample_interval=15', '--sample_tokens=20')
    text, _ = run('train.py', *short, cwd=tmp_path)
    assert 'data/stdlib is not there yet: preparing it' in text and '--------\ndef ' in text
    assert (tmp_path / 'out' / 'stdlib' / 'best.pt').exists()
    text, _ = run('sample.py', '--prompt=class ', '--max_new_tokens=50', cwd=tmp_path)
    assert text.startswith('class ') and len(text) > 10


def test_the_tests_it_names_exist():
    sources = {path.name: path.read_text() for path in (ROOT / 'tests').glob('*.py')}
    for line in '\n'.join(PAGES).splitlines():
        files = re.findall(r'`tests/(test_\w+\.py)`', line)
        for name in re.findall(r'`(test_\w+)`', line):
            assert any(f'def {name}(' in sources[file] for file in files), name
    assert 'test_two_trainers_cannot_write_one_folder' in README
