"""What bad input gets: one clear line that names the setting and the way out, exit code 2, and nothing overwritten."""

import json
import pickle

import pytest
import torch
from conftest import GPT2, TINY, run, write_tokens


def fails(script, *args, cwd, **kwargs):
    """Runs a script that must refuse, with exit code 2; returns its one line."""
    _, err = run(script, *args, cwd=cwd, code=2, **kwargs)
    assert 'Traceback' not in err
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 == len(err.splitlines()), err
    return lines[0]


@pytest.mark.parametrize('args, words', [
    ('--learning_rat=1', 'learning_rat (command line) is not a setting; did you mean learning_rate?'),
    ('--batch_size=lots', "batch_size='lots' (command line): expected a whole number"),
    ('--norm=rmsnrom', "did you mean rmsnorm?"),
    ('config/gpt3.py', 'config/gpt3.py: there is no such config file'),
    ('--n_embd=576 --n_head=10', 'n_embd 576 is not divisible by n_head 10'),
    ('--n_head=4 --n_kv_head=3', 'n_head 4 is not divisible by n_kv_head 3'),
    ('--batch_size=0', 'batch_size=0 is less than 1'),
    ('--eval_interval=0', 'eval_interval=0 is less than 1'),
    ('--learning_rate=-1', 'learning_rate=-1.0 is less than 0'),
    ('--beta2=1', 'beta2=1.0 is not within'),
    ('--n_kv_head=-1', 'n_kv_head -1 is less than 0'),
    ('--init_std=-1', 'init_std -1.0 is less than 0'),
    ('--wsd_decay_iters=99', 'wsd_decay_iters=99 is more than the 20 steps'),
    ('--device=cuda', "device='cuda', but torch") if not torch.cuda.is_available() else ('--seed=-1', 'seed=-1 is less'),
    ('--vocab_size=100', 'vocab_size 100 is less than the 257 of data set tiny'),
    ('--block_size=100000000', 'tokens, but block_size 100000000 needs at least'),
    ('--dataset=nothing', 'data/nothing/meta.json is missing; prepare the data first: python prepare.py --source=PATH'),
    ('--dataset=shakespeare', 'data/shakespeare could not be prepared on its own; run: python prepare.py data/shakespeare.py'),
    ('--dataset=tiny:x', "dataset='tiny:x': a mixture is written"),
    ('--device=cuda:77', "device='cuda:77', but torch"),
    ('--device=tpu', "device='tpu': choose auto, cpu, cuda"),
    ('--optimizer=adamv', "optimizer='adamv' (command line): choose one of adamw, adam, sgd, muon, adamw8bit; did you mean"),
    ('--stage=sft', "stage='sft', but data set tiny was prepared for --stage=pretrain"),
    ('--init_from=resume', "out_dir='out/tiny' holds no ckpt.pt"),
    ('--init_from=resum', "init_from='resum' is neither scratch, nor resume"),
    ('--dataset=tiny:0.7,b:0.3', 'separated by blanks'),
])
def test_train_refuses(place, args, words):
    (place / 'data').unlink()
    (place / 'data').mkdir()
    write_tokens(place / 'data' / 'tiny', [i % 256 for i in range(3000)], [i % 256 for i in range(500)])
    flags = [arg for arg in TINY if arg.split('=')[0] not in [a.split('=')[0] for a in args.split()]]
    out, err = run('train.py', *flags, *args.split(), cwd=place, code=2)
    lines = [line for line in err.splitlines() if 'would have to be fetched' not in line]  # prepare.py's own line
    assert len(lines) == 1 and lines[0].startswith('error: ') and words in lines[0], err
    assert not (place / 'out').exists()


def test_a_truncated_token_file(place):
    write_tokens(place / 'cut', [1, 2, 3] * 100)
    with open(place / 'cut' / 'train.bin', 'r+b') as f:
        f.truncate(301)
    error = fails('train.py', *TINY, f'--dataset={place}/cut', cwd=place)
    assert 'train.bin has 301 bytes, but meta.json says 300 tokens, which is 600 bytes; prepare the data again' in error
    assert not (place / 'out').exists()


def test_a_batch_that_does_not_divide_over_the_processes(place):
    _, err = run('train.py', *TINY, '--batch_size=3', cwd=place, code=1, torchrun=2)  # 1 is torchrun's own code
    assert ('error: batch_size 3 * gradient_accumulation_steps 1 = 3 windows do not divide over 2 processes; '
            'make the product a multiple of 2') in err


def test_a_backend_that_does_not_serve_the_device(place):
    error = fails('train.py', *TINY, '--backend=nccl', cwd=place, env={'RANK': '0', 'WORLD_SIZE': '1'})
    assert "backend='nccl' serves CUDA only, and device is cpu; use --backend=auto" in error


def test_a_folder_that_holds_a_run_is_not_overwritten(place):
    run('train.py', *TINY, cwd=place)
    files = {path: path.read_bytes() for path in (place / 'out' / 'tiny').iterdir()}
    assert "out_dir='out/tiny' holds a run already; continue it with --init_from=resume" in fails('train.py', *TINY, cwd=place)
    assert 'holds a run already' in fails('train.py', *TINY, '--init_from=out/tiny/best.pt', cwd=place)
    assert 'max_iters=5 is less than the 20 steps' in fails('train.py', *TINY, '--init_from=resume', '--max_iters=5', cwd=place)
    error = fails('train.py', *TINY, '--init_from=resume', '--n_layer=3', cwd=place)
    assert 'n_layer is 3 (command line), but the model in out/tiny/ckpt.pt has 2' in error
    error = fails('train.py', *TINY, '--init_from=out/tiny/ckpt.pt', *GPT2, '--out_dir=out/next', cwd=place)
    assert 'but the model in out/tiny/ckpt.pt has' in error
    (place / 'file').write_text('')
    assert "out_dir='file' is a file" in fails('train.py', *TINY, '--out_dir=file', cwd=place)
    assert files == {path: path.read_bytes() for path in (place / 'out' / 'tiny').iterdir()}
    assert not (place / 'out' / 'next').exists()


class Evil:
    def __reduce__(self):
        return (open, ('executed', 'w'))


@pytest.mark.parametrize('what, words', [
    ('text', 'is not a checkpoint: the file is damaged or of another kind'),
    ('empty', 'is not a checkpoint: the file is damaged or of another kind'),
    ('truncated', 'is not a checkpoint: the file is damaged or of another kind'),
    ('evil pickle', 'is not a checkpoint'),
    ('evil torch', 'is not a checkpoint: it holds more than plain data, which is never loaded'),
    ('other torch', 'is not a checkpoint of sourdough: it lacks'),
    ('no shape', 'its model_config is no shape'), ('no tokenizer', 'of the kind None'), ('not finite', 'not finite numbers'),
    ('other shape', "holds a model of another shape: h.0.attn.c_attn.weight is (3, 3) there and (64, 32) here"),
    ('missing', 'there is no checkpoint')])
def test_what_is_not_a_checkpoint_is_refused_and_never_executed(place, what, words):
    run('train.py', *TINY, '--max_iters=1', cwd=place)
    path = place / 'out' / 'tiny' / 'ckpt.pt'
    whole = path.read_bytes()
    good = torch.load(path, weights_only=True)
    {'text': lambda: path.write_text('hello'), 'empty': lambda: path.write_bytes(b''),
     'truncated': lambda: path.write_bytes(whole[:len(whole) // 2]),
     'evil pickle': lambda: path.write_bytes(pickle.dumps(Evil())),
     'evil torch': lambda: torch.save(good | {'iter': Evil()}, path),
     'no shape': lambda: torch.save(good | {'model_config': {'n_embd': 'wide'}}, path),
     'no tokenizer': lambda: torch.save(good | {'tokenizer': {}}, path),
     'not finite': lambda: torch.save(
         good | {'model': {name: p * torch.nan for name, p in good['model'].items()}}, path),
     'other torch': lambda: torch.save({'state_dict': {}}, path), 'missing': path.unlink,
     'other shape': lambda: torch.save(
         good | {'model': good['model'] | {'h.0.attn.c_attn.weight': torch.zeros(3, 3)}}, path)}[what]()
    assert words in fails('sample.py', '--out_dir=out/tiny', cwd=place)
    if what != 'missing':
        assert words in fails('train.py', *TINY, '--init_from=out/tiny/ckpt.pt', '--out_dir=out/next', cwd=place)
    assert not (place / 'executed').exists()


def test_a_run_is_not_continued_on_another_tokenizers_data(place):
    run('train.py', *TINY, '--max_iters=1', cwd=place)
    write_tokens(place / 'other', range(200), range(100))
    meta = json.loads((place / 'other' / 'meta.json').read_text())
    meta['tokenizer'] = {'name': 'gpt2', 'fingerprint': 'another'}
    (place / 'other' / 'meta.json').write_text(json.dumps(meta))
    error = fails('train.py', *TINY, '--init_from=resume', f'--dataset={place}/other', cwd=place)
    assert 'was trained with tokenizer bytes' in error and 'gpt2' in error
    assert 'a mixture needs one tokenizer' in fails('train.py', *TINY, f'--dataset=tiny {place}/other', '--out_dir=out/mix',
                                                    cwd=place)


@pytest.mark.parametrize('args, words', [
    ('--temperature=-1', 'temperature=-1.0 must be 0 or more'), ('--top_p=0', 'top_p=0.0 must be above 0'),
    ('--top_k=-1', 'top_k=-1 must be 0 or more'), ('--num_samples=0', 'num_samples=0 must be above 0'),
    ('--prompt_file=none.txt', "prompt_file='none.txt' cannot be read"),
    ('--prompt=a --prompt_file=b', 'both given'), ('--min_p=2', 'min_p=2.0 must be from 0 to 1'),
    ('--repetition_penalty=0', 'repetition_penalty=0.0 must be from 0.01 to 100'), ('--chat --compare=x', 'both given'),
    ('--compare=out/none/*.pt', "compare='out/none/*.pt' matches no checkpoint"), ('--dtype=int9', "dtype='int9'"),
    ('--chat --prompt=x', 'chat and a prompt are both given'), ('--num_samples=1000000000000', 'must be above 0 and below'),
    ('--prompts_file=empty', "prompts_file='empty' holds no prompt"),
    ('--out_dir=out/none', 'out/none/ckpt.pt: there is no checkpoint'),
    ('--promt=a', 'did you mean prompt?')])
def test_sample_refuses(tmp_path, args, words):
    (tmp_path / 'empty').write_text('\n')
    assert words in fails('sample.py', *args.split(), cwd=tmp_path)


@pytest.mark.parametrize('args, words', [
    ('--rounds=0', 'rounds=0 is less than 1'), ('--prompt_tokens=10', 'prompt_tokens 10 + max_new_tokens 12 are more than'),
    ('--vs=nothing', "vs='nothing': there is no nothing/model.py"), ('--dtype=int8 --compile=True', 'int8\' is not compiled')])
def test_bench_refuses(place, args, words):
    run('train.py', *TINY, '--max_iters=1', cwd=place)
    assert words in fails('bench.py', '--task=sample', '--init_from=out/tiny', '--device=cpu', '--max_new_tokens=12',
                          '--prompt_tokens=2', *args.split(), cwd=place)


@pytest.mark.parametrize('args, words', [
    ('', "source='' and name='' must both be given"), ('--source=x.txt --name=../x', "name='../x' may have letters"),
    ('--source=none.txt --name=x', "source='none.txt' is neither a file nor a folder"),
    ('--source=empty --name=x', "source='empty': no text in 0 files"), ('--source=blank.txt --name=x', 'no text in 1 files'),
    ('--source=a.jsonl --name=x', "a.jsonl, line 2 has no text in the field text_field='text'; its fields are: body, id"),
    ('--source=b.jsonl --name=x', 'b.jsonl, line 1 is not JSON'), ('--source=c.jsonl --name=x', 'it is no object'),
    ('--source=a.txt --name=x --val_fraction=1', 'val_fraction=1.0 is not within'),
    ('--source=a.txt --name=x --tokenizer=gpt9', "tokenizer='gpt9' is not known"),
    ('--source=a.txt --name=there', 'there exists already, but it has no record of how it was made; --overwrite replaces'),
    ('--source=https://localhost/x.txt --name=x --allow_network=False', 'would have to be fetched'),
    ('--source=http://127.0.0.1:9/x.txt --name=x', 'could not be fetched')])
def test_prepare_refuses(tmp_path, args, words):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'data' / 'there').mkdir(parents=True)
    for name, text in (('blank.txt', ''), ('a.txt', 'text'), ('a.jsonl', '{"text": "a"}\n{"id": 1, "body": "b"}\n'),
                       ('b.jsonl', '{"text": \n'), ('c.jsonl', '[1]\n')):
        (tmp_path / name).write_text(text)
    assert words in fails('prepare.py', *args.split(), cwd=tmp_path).replace(str(tmp_path), '')
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['there']  # nothing half-written
