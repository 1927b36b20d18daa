"""Features that are each tested alone, together; every recipe; every setting."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, losses, run
from test_stages import TALK
from test_stages import talks as conversations_and_models
from test_train import assert_same, checkpoint

# every recipe made small by config/small.py, and one step of it
ONE_STEP = ['--max_iters=1', '--warmup_iters=0', '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=1',
            '--sample_tokens=5', '--picture=False', '--device=cpu']
talks = conversations_and_models  # the fixture
RECIPES = sorted(path.name for path in ROOT.glob('config/*.py'))


def test_muon_two_processes_and_a_resume(place):
    args = [*TINY, '--optimizer=muon', '--gradient_accumulation_steps=2', '--dropout=0.1']
    run('train.py', *args, '--out_dir=out/whole', cwd=place, torchrun=2)
    run('train.py', *args, '--max_iters=10', '--lr_decay_iters=20', '--out_dir=out/parts', cwd=place, torchrun=2)
    run('train.py', '--init_from=resume', '--max_iters=20', '--out_dir=out/parts', cwd=place, torchrun=2)
    assert losses(place / 'out' / 'whole') == losses(place / 'out' / 'parts')
    assert_same(checkpoint(place / 'out' / 'whole')['model'], checkpoint(place / 'out' / 'parts')['model'])


def test_a_mixture_and_a_resume(place):
    args = [*TINY, '--dataset=tiny:0.7 owl:0.3', '--eval_interval=20']
    run('train.py', *args, '--out_dir=out/whole', cwd=place)
    run('train.py', *args, '--max_iters=7', '--lr_decay_iters=20', '--out_dir=out/parts', cwd=place)
    run('train.py', '--init_from=resume', '--max_iters=20', '--out_dir=out/parts', cwd=place)
    whole, parts = losses(place / 'out' / 'whole'), losses(place / 'out' / 'parts')
    assert len(whole) == 22 and whole == {key: parts[key] for key in whole}


def test_packed_conversations_and_a_mirror(talks, tmp_path):
    """A run whose folder is lost goes on from the mirror, to the same digits."""
    (tmp_path / 'data').symlink_to(talks / 'data')
    args = [*TALK, '--stage=sft', '--dataset=talk', f'--init_from=auto:{talks}/out/base/ckpt.pt', '--lr_decay_iters=10']
    run('train.py', *args, '--max_iters=10', '--out_dir=out/whole', cwd=tmp_path)
    mirrored = [*args, f'--mirror=file://{tmp_path}/mirrored']
    run('train.py', *mirrored, '--max_iters=5', '--out_dir=out/lost', cwd=tmp_path)
    text, _ = run('train.py', *mirrored, '--max_iters=10', '--out_dir=out/found', cwd=tmp_path)
    assert 'fetched from the mirror, step 5' in text
    whole, found = losses(tmp_path / 'out' / 'whole'), losses(tmp_path / 'out' / 'found')
    assert whole == {key: found[key] for key in whole}


def test_a_padded_vocabulary_is_exported_and_writes_the_same(place):
    transformers = pytest.importorskip('transformers')
    run('train.py', *TINY, '--vocab_size=320', '--max_iters=30', '--learning_rate=1e-2', cwd=place)
    run('export.py', '--out_dir=out/tiny', '--hf_dir=hf/tiny', cwd=place)
    ours, _ = run('sample.py', '--out_dir=out/tiny', '--prompt=def', '--temperature=0', '--max_new_tokens=12',
                  '--dtype=float32', cwd=place)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / 'hf' / 'tiny')
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / 'hf' / 'tiny')
    ids = model.generate(**tokenizer('def', return_tensors='pt'), do_sample=False, max_new_tokens=12)
    assert tokenizer.decode(ids[0]) == ours.rstrip('\n') and model.config.vocab_size == 257


def one_step(recipe, *flags, cwd):
    text, _ = run('train.py', str(ROOT / 'config' / recipe), str(ROOT / 'config' / 'small.py'), *ONE_STEP, *flags, cwd=cwd)
    assert 'done: 1 iters' in text and 'iter 1: val_loss' in text


@pytest.mark.parametrize('recipe', [name for name in RECIPES if not re.search('sft|dpo|finetune', name)])
def test_a_recipe_starts(recipe, place):
    one_step(recipe, '--dataset=tiny', cwd=place)


def test_recipes_that_begin_from_a_model_start(talks, tmp_path):
    """Post-training from a recipe's own base, and fine-tuning from a folder in Hugging Face's form."""
    (tmp_path / 'data').symlink_to(talks / 'data')
    begun = []
    for family in ('minueza32m', 'owl'):
        for part, data in (('base', 'tiny'), ('sft', 'talk'), ('dpo', 'pairs')):
            one_step(f'{family}_{part}.py', f'--dataset={data}', '--block_size=96', cwd=tmp_path)  # as the talk is packed
            begun.append(f'{family}_{part}.py')
    run('export.py', '--out_dir=out/owl_base', '--hf_dir=hf', cwd=tmp_path)
    for recipe in ('finetune_gpt2.py', 'finetune_smollm2.py'):
        one_step(recipe, '--init_from=hf', '--dataset=tiny', '--block_size=96', cwd=tmp_path)
        begun.append(recipe)
    assert {name for name in RECIPES if re.search('sft|dpo|finetune', name)} <= set(begun)


SCRIPTS = sorted(path for path in ROOT.glob('*.py') if re.search('^config = configure', path.read_text(), re.M))


def settings_of(path):
    """{setting: default} of a script: its plain globals before `configure`."""
    code = path.read_text().split('\nconfig = configure(')[0]
    return {node.targets[0].id: node.value.value for node in ast.parse(code).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}


def test_the_page_begins_with_the_settings_of_sample():
    page, sample = settings_of(ROOT / 'app.py'), settings_of(ROOT / 'sample.py')
    shared = page.keys() & sample.keys()
    assert len(shared) > 10 and {name: page[name] for name in shared} == {name: sample[name] for name in shared}


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_every_setting_is_read_and_spoken_of(path):
    """In code, beyond its definition; and in a test, a recipe or a page, by its name."""
    code = path.read_text().split('\nconfig = configure(')[1]
    code += ''.join((ROOT / name).read_text() for name in ('model.py', 'generation.py'))  # whose dataclasses take settings
    pages = [ROOT / 'README.md', ROOT / 'LOG.md', *ROOT.glob('docs/*.md'), *ROOT.glob('tests/*.py'), *ROOT.glob('config/*.py'),
             *ROOT.glob('data/*.py')]
    words = '\n'.join([page.read_text() for page in pages] + [other.read_text().split('"""')[1] for other in SCRIPTS])
    names = settings_of(path)
    assert len(names) > 3
    assert [name for name in names if not re.search(rf'\b{name}\b', code)] == []
    assert [name for name in names if not re.search(rf'\b{name}\b', words)] == []


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_help_waits_for_no_import_of_torch(path, tmp_path):
    (tmp_path / 'torch.py').write_text('raise RuntimeError("torch was imported")')
    done = subprocess.run([sys.executable, str(path), '--help'], text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0 and ' = ' in done.stdout, done.stderr

