"""
Trains a GPT-2 or a Llama on token files, on a CPU, one GPU, or many.

    python train.py                                                # a small Llama on Python's own source, minutes on a CPU
    python train.py config/gpt2.py --batch_size=8                  # a recipe, one setting changed
    python train.py config/gpt2.py --init_from=resume              # goes on where that run stopped, exactly
    torchrun --nproc_per_node=8 train.py config/gpt2.py            # 8 GPUs, the same batches
    python train.py --help                                         # every setting

The defaults below are the first of these; a file in config/ and --key=value override them (see configurator.py).
"""

from configurator import UserError, at_least, configure

# ---- the run
out_dir = 'out/stdlib'  # checkpoints and log.jsonl go here
init_from = 'scratch'  # scratch, resume (what out_dir holds), auto (resume if out_dir holds a run, else scratch), or what
                       # gives its weights to a new run: a checkpoint's path, a folder in Hugging Face's form, or a model's
                       # id on its hub (gpt2, HuggingFaceTB/SmolLM2-135M);
                       # with --schedule=wsd a checkpoint of a wsd run on the same data goes on and decays to max_iters;
                       # auto:MODEL begins with that model where auto would from scratch
eval_interval = 300  # steps between evaluations
eval_iters = 20  # batches of batch_size in an evaluation, always the same ones
log_interval = 10  # steps between lines of the log
checkpoint_interval = 0  # steps between checkpoints; 0 = at every evaluation
checkpoint_minutes = 0.0  # minutes after which one is saved in any case; 0 = by steps only
keep_last = 2  # latest checkpoints: ckpt.pt, and before it ckpt.1.pt, which a resume takes if ckpt.pt is damaged
keep_every = 0  # also keep ckpt_<iter>.pt where iter is a multiple of this and a checkpoint is saved; 0 = none
mirror = ''  # copy checkpoints, log and settings there as well: s3://bucket/run, or any other URL that fsspec knows
sample_interval = 300  # steps between samples of text; 0 = none
sample_prompt = 'def '  # what the samples continue, '' = a new document; or, of sft and dpo, the message they answer
sample_tokens = 200  # their length
picture = True  # draw the losses at the end, in loss.png in out_dir, where matplotlib is there
wandb_log = False  # log to Weights & Biases as well
wandb_project = 'sourdough'  # the project there
wandb_run_name = ''  # the run's name there; '' = out_dir
# ---- data
stage = 'pretrain'  # pretrain | sft | dpo: on every token of a text, on a conversation's answers, or on pairs of answers
beta = 0.1  # dpo: how much a difference of log-probabilities is worth; smaller lets the model go further from the reference
label_smoothing = 0.0  # dpo: the share of pairs that are taken to be the wrong way around
reference = ''  # dpo: the model that answers are measured against; '' = the one that the run begins from
dataset = 'stdlib'  # data/<name>, or a mixture with weights: 'a:0.7 b:0.3'
block_size = 256  # context, tokens
stride = 0  # tokens between the starts of two training windows; 0 = block_size, they do not overlap
batch_size = 16  # auto, or windows in a micro-batch; auto = as many as fit, in steps of as many windows as without it
gradient_accumulation_steps = 1  # times batch_size = windows in a step, over all processes together
# ---- model (model.py); the defaults are a small Llama
vocab_size = 0  # 0 = the data's, or of init_from's model; more pads the embedding
n_layer = 4  # blocks
n_head = 4  # query heads
n_kv_head = 2  # key/value heads; 0 = n_head
n_embd = 128  # channels
n_inner = 0  # width of the feed-forward; 0 = 4 * n_embd for gelu, about 8/3 * n_embd for swiglu
norm = 'rmsnorm'  # layernorm | rmsnorm
norm_eps = 1e-5  # added under the norms' square root
mlp = 'swiglu'  # gelu | swiglu
pos = 'rope'  # learned | rope
rope_theta = 10000.0  # rope's base
rope_scaling = ''  # linear:FACTOR or llama3:FACTOR,LOW,HIGH,CONTEXT: rope slowed down to reach further; '' = as it is
sliding_window = 0  # tokens that attention reaches back; 0 = the whole block
bias = False  # biases in the linear layers and in layernorm
tie_weights = True  # the output layer shares the token embedding's matrix
dropout = 0.0  # share of activations zeroed while training
init_std = 0.02  # standard deviation of the initial weights
zero_init = False  # what writes into the residual stream starts at zero
# ---- optimizer (optim.py)
optimizer = 'adamw'  # adamw | adam | sgd | muon | adamw8bit: muon is for the blocks' matrices, and AdamW takes the rest
criterion = 'cross_entropy'  # cross_entropy | mse | mae: what training minimises; evaluations are cross-entropy
learning_rate = 4e-3  # the highest
max_iters = 1200  # steps
weight_decay = 0.1  # on matrices only
momentum = 0.95  # of muon and sgd
beta1 = 0.9  # Adam's memory of gradients
beta2 = 0.95  # and of their squares
grad_clip = 1.0  # largest norm of the gradient; 0 = no clipping
max_spike = 0.0  # leave out a step whose loss or gradient norm is more than this many times its running mean; 0 = never
max_bad_steps = 10  # after so many left-out steps in a row the run goes back to its last checkpoint; the second time it stops
schedule = 'wsd'  # cosine | wsd | linear | constant
warmup_iters = 50  # steps
lr_decay_iters = 0  # steps until min_lr; 0 = max_iters
min_lr = 0.0  # the learning rate at the end
wsd_decay_iters = 0  # wsd: steps of decay at the end; 0 = 20% of lr_decay_iters
wsd_decay = 'linear'  # linear | 1-sqrt
# ---- machine
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto | float32 | bfloat16 | float16: of matrix products; weights are float32. auto = bfloat16 if native
compile = 'auto'  # auto | True | False: torch.compile; auto = on CUDA, but for fsdp
checkpoint_activations = False  # keep less for the backward pass and compute it again: less memory, a third more time
fsdp = False  # under torchrun: each process holds a share of the weights and of the optimizer, for what does not fit
backend = 'auto'  # auto | nccl | gloo: of torch.distributed; auto = nccl on CUDA
seed = 1337  # of the initial weights, the order of the data, and dropout
# ----
config = configure(globals())

# torch takes seconds to import: a mistyped setting is found before
import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import chat
import checkpoint
import costs
import curves
import huggingface
import parallel
import reference as reference_model
import rows
import run_folder
from dataset import TrainingOrder, folder_of, hash_ints, open_data, parse_mix, read_ahead, read_tokenizer, val_batches
from device import autocast, device_name, most_that_fit, not_compiled, peak_flops, pick_device, pick_dtype, set_up, synchronize
from device import peak_memory as memory_taken
from files import write_whole
from generation import Sampling, generate, unknown_ids
from health import Interruption, StepGuard
from logs import Log, Wandb, new_id
from loss import preference
from mirror import Mirror
from model import ModelConfig, Transformer
from optim import make_optimizer, make_schedule
from tokenizer import tokenizer_from_state

# settings of this start, never taken over from the run that is continued
NOT_TAKEN_OVER = ('out_dir', 'init_from', 'mirror', 'device', 'compile', 'backend', 'checkpoint_activations', 'fsdp')
# what may differ where --init_from=auto finds a run and goes on by itself: how long it is, and what no weights depend on
MAY_DIFFER = ('eval_interval', 'eval_iters', 'log_interval', 'checkpoint_interval', 'checkpoint_minutes', 'keep_last',
              'keep_every', 'sample_interval', 'sample_prompt', 'sample_tokens', 'picture', 'wandb_log', 'wandb_project',
              'wandb_run_name', 'max_iters', 'lr_decay_iters', 'max_bad_steps')
MODEL_SETTINGS = [field.name for field in dataclasses.fields(ModelConfig)]

rank, local_rank, world_size = parallel.distributed()
under_torchrun = 'RANK' in os.environ  # torchrun sets it


def say(*words):
    if rank == 0:
        with contextlib.suppress(OSError):  # where it goes to may be full, or gone
            print(*words, flush=True)


def branches_off(loaded):
    """
    Whether the new run goes on from the stable phase of another, on its data, to an end of its own. Raises UserError where
    that phase is over.
    """
    former = loaded['config']
    if not (os.path.isfile(init_from) and schedule == 'wsd' == former.get('schedule') and
            config.source['schedule'] != 'default' and
            (config.source['dataset'] == 'default' or dataset == former['dataset'])):
        return False
    end = former['lr_decay_iters'] or former['max_iters']
    stable = end - (former['wsd_decay_iters'] or end // 5)
    if loaded['iter'] > stable:
        raise UserError(f"init_from='{init_from}' is of step {loaded['iter']}, its learning rate falls since step {stable}; "
                        'branch off at an earlier one, or leave --schedule=wsd out to take its weights only')
    return True


def take_over_settings(loaded, path):
    """
    What is not said anew is as it was: all of a run's settings where it goes on, else those of the model. A new run may
    change what no weights depend on, and shorten the context (or, with rope, lengthen it).
    """
    changed = []
    of_branch = ('lr_decay_iters', 'wsd_decay_iters') if resumes and loaded['loop'].get('branched_at') else ()
    for key, value in loaded['config'].items():
        if key not in config or key in NOT_TAKEN_OVER or not goes_on and key not in MODEL_SETTINGS:
            continue
        now = pick_dtype(dtype, device) if key == 'dtype' else config[key]
        if config.source[key] == 'default' or key in of_branch and config.source[key] != 'command line':
            config[key] = globals()[key] = value
        elif now != value and (goes_on or key not in ('dropout', 'vocab_size')):
            changed.append(f'{key} was {value!r}, is now {now!r} ({config.source[key]})')
    former = checkpoint.model_config(loaded, path)
    was, now = dataclasses.asdict(former), dataclasses.asdict(checkpoint.shape_of(config, vocab_size or former.vocab_size))
    free = {'dropout', 'init_std', 'zero_init'}
    if not goes_on:
        free |= {'sliding_window', 'rope_theta', 'rope_scaling'}
        free |= {'block_size'} if former.pos == 'rope' or block_size <= former.block_size else set()
    wrong = [f'{key} is {now[key]!r} ({config.source[key]}), but the model in {path} has {was[key]!r}'
             for key in MODEL_SETTINGS if was[key] != now[key] and key not in free]
    if wrong:
        raise UserError(f'{"; ".join(wrong)}; leave {"it" if len(wrong) == 1 else "them"} out, or train another model in '
                        'another --out_dir')
    if by_itself and resumes and changed and not {line.split()[0] for line in changed} <= set(MAY_DIFFER):
        raise UserError(f"out_dir='{out_dir}' holds a run with other settings: {'; '.join(changed)}; --init_from=resume "
                        'goes on with the new ones, another --out_dir begins another run')
    for line in changed:
        say(f'changed: {line}')


def prepare_missing(names):
    """Prepares data sets that are not there yet and whose recipes need no network."""
    here = os.path.dirname(os.path.abspath(__file__))
    for name in names:
        recipe = os.path.join(here, 'data', f'{name}.py')
        if not os.path.exists(folder_of(name)) and os.path.isfile(recipe):
            say(f'data/{name} is not there yet: preparing it with data/{name}.py')
            done = subprocess.run([sys.executable, os.path.join(here, 'prepare.py'), recipe, '--allow_network=False'])
            if done.returncode:
                raise UserError(f'data/{name} could not be prepared on its own; run: python prepare.py data/{name}.py')


def choose_tokenizer(own, meta):
    """
    The run's tokenizer, and the special tokens that only the data's has. It is the data's for a new model and for one that is
    now taught to chat, which may get new tokens; else the model's `own`. Raises UserError where the two give other ids.
    """
    expected = meta['tokenizer']['fingerprint']
    if own and not learns_to_chat and own.fingerprint() == expected:
        return own, set()
    of_data = read_tokenizer(names[0], meta)
    if not own.agrees_with(of_data) if own else of_data.fingerprint() != expected:
        whose = f'{loaded_path} was trained with' if own else 'here it is now'
        raise UserError(f"data set {names[0]} was prepared with tokenizer {meta['tokenizer']['name']}, but {whose} tokenizer "
                        f'{(own or of_data).name}, whose ids are others; prepare the data again' +
                        (f' with --tokenizer={init_from}' if own and init_from != 'resume' else ''))
    tokenizer = of_data if learns_to_chat or not own else own
    return tokenizer, of_data.special.keys() - tokenizer.special.keys()


def check_settings():
    """Raises UserError for numbers out of their range; the model's are checked by ModelConfig."""
    at_least(config, 1, 'eval_interval', 'eval_iters', 'log_interval', 'batch_size', 'gradient_accumulation_steps', 'keep_last',
             'max_bad_steps')
    at_least(config, 0, 'max_iters', 'checkpoint_interval', 'checkpoint_minutes', 'keep_every', 'max_spike', 'sample_interval',
             'sample_tokens', 'stride', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters',
             'lr_decay_iters', 'wsd_decay_iters', 'vocab_size', 'seed', 'beta', 'label_smoothing')
    if keep_last >= checkpoint.KEEP_LAST_LIMIT:
        raise UserError(f'keep_last={keep_last} is not below {checkpoint.KEEP_LAST_LIMIT}; --keep_every keeps any number')
    if 0 < max_spike <= 1:
        raise UserError(f'max_spike={max_spike} would leave out half of all steps; choose 2 or more, or 0 for none')
    if stage == 'dpo' and not (beta > 0 and label_smoothing < 0.5):
        raise UserError(f'beta={beta} must be above 0, and label_smoothing={label_smoothing} below 0.5')
    if stage != 'pretrain' and stride:
        raise UserError(f"stride={stride} is for texts; a row of conversations is a window (stage='{stage}')")
    if stage != 'pretrain' and criterion != 'cross_entropy':
        raise UserError(f"criterion='{criterion}' is for stage='pretrain'; stage='{stage}' has a loss of its own")
    for key in ('momentum', 'beta1', 'beta2'):
        if not 0 <= config[key] < 1:
            raise UserError(f'{key}={config[key]} is not within 0 <= {key} < 1')
    if schedule == 'wsd' and wsd_decay_iters > (lr_decay_iters or max_iters):
        raise UserError(f'wsd_decay_iters={wsd_decay_iters} is more than the {lr_decay_iters or max_iters} steps of the run')


def try_gradient(model, windows):
    """A step's gradient of so many windows, for what it takes."""
    batch = on_device(map(torch.from_numpy, order.batch(0, range(windows))))
    try:
        with autocast(device, dtype):
            loss, _ = loss_of(model, *batch)
        loss.backward()
    finally:
        raw_model.zero_grad(set_to_none=True)


def largest_micro_batch():
    """The largest of `micro_sizes` that every process has memory for."""
    # bytes to come: gradients that stay from one micro-step to the next, and moments, which a former run's optimizer has
    later = (4 if goes_on else 12) + (12 if device == 'cpu' else 0)  # the second, the copy that is being saved
    later *= sum(p.numel() for p in raw_model.parameters())
    n = torch.tensor(most_that_fit(micro_sizes[::-1], lambda n: try_gradient(raw_model, n), device, later), device=device)
    if under_torchrun:
        dist.all_reduce(n, dist.ReduceOp.MIN)
    if n == 0:
        raise UserError(f'batch_size=auto: not even one window of block_size {block_size} fits into the memory of '
                        f'{device_name(device)}; add --checkpoint_activations, or lower block_size')
    return n.item()


def restore(loaded):
    """Sets the loop to where a checkpoint stands, all but the weights: moments and counters, not hyper-parameters."""
    global first_iter, first_tokens, best_val_loss
    if parallel.total(loaded['iter'])[0] != world_size * loaded['iter']:
        raise UserError(f'the processes have read checkpoints of different steps from {out_dir}; start again')
    best = parallel.by_the_first(checkpoint.best_val_loss, os.path.join(out_dir, 'best.pt'))  # maybe of a step to come
    best_val_loss = min(best, loaded['best_val_loss'])
    parallel.load_moments(opt, loaded['optimizer'], fsdp)
    if loaded['scaler'] and scaler.is_enabled():
        scaler.load_state_dict(loaded['scaler'])
    first_iter, first_tokens = loaded['iter'], loaded['tokens']
    loop['done'] = first_iter
    for state in (loop, guard.state):
        state |= {key: value for key, value in loaded['loop'].items() if key in state}


def wrap(model):
    """The model for the gradient: under torchrun, gradients are averaged over the processes."""
    return parallel.ddp(model) if under_torchrun and not fsdp else model


def try_compile(raw_model):
    """The compiled model, plain and wrapped; or, with one line, the uncompiled one, where compiling does not work."""
    try:
        model = torch.compile(raw_model, dynamic=False)
        ddp_model = wrap(model)
        try_gradient(ddp_model, micro_batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of any kind
        say(not_compiled(e))
        raw_model.zero_grad(set_to_none=True)
        model, ddp_model = raw_model, wrap(raw_model)
    return model, ddp_model


def add_reference_log_probs(loaded):
    """
    Gives dpo's data the reference's log-probabilities, computed unless they lie beside it; `loaded`: the reference's
    checkpoint, None if the run is resumed. Raises UserError where that is needed and is not what it was.
    """
    splits, mark = [('train', s) for s in train_splits] + [('val', s) for s in val_splits.values()], loop['reference']
    if reference_model.missing(splits, mark, dtype):
        loaded = loaded or reference_model.load(reference, tokenizer)
        if reference_model.fingerprint(loaded) != mark:
            raise UserError(f"reference='{reference}' is no longer the model that the run was begun with, and its "
                            f'log-probabilities do not lie beside the data {dataset}; put either back')
        say(f'computing the log-probabilities of {reference}')
        reference_model.compute(splits, mark, loaded, block_size, micro_batch, device, dtype, fsdp)
    reference_model.read(splits, mark, dtype)


def open_log():
    """log.jsonl, without what came after the step to go on from."""
    path, continues = os.path.join(out_dir, 'log.jsonl'), resumes or loop['went_back']
    return Log(path, say, first_iter if continues else None, evaluated=loop['done'] == first_iter)


def report(**record):
    """A record for log.jsonl and, if wanted, Weights & Biases."""
    if rank == 0:
        log.write(record)
        if wandb_run:
            wandb_run.log(record, step=record['iter'])


def keep_bad_batch(it, wrong, micro_batches):
    """Writes this process's windows of a step, as text, to out_dir/bad_batches; returns the path, or why there is none."""
    shift = loop['data_shift']
    folder = os.path.join(out_dir, 'bad_batches', f'step_{it}' + (f'_data_{it + shift}' if shift else ''))
    text = f'step {it}, process {rank} of {world_size}: {wrong}\n'
    for n, ids in enumerate(row for x, *_ in micro_batches for row in x.tolist()):
        source, window, _ = order.locate(it + shift, rank * share + n // rows.sides(stage))
        text += f'\n-------- {names[source]}, window {window}\n{tokenizer.decode(ids)}\n'
    path = os.path.join(folder, f'process_{rank}.txt')
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        if not os.path.exists(folder) and len(os.listdir(os.path.dirname(folder))) >= 100:
            return 'no file, since there are those of 100 steps already'
        os.makedirs(folder, exist_ok=True)
        write_whole(path, text.encode('utf-8', 'replace'))
    except OSError as e:
        return f'no file ({e.strerror})'
    return path


def go_back(it, why):
    """
    Sets the run to its last checkpoint, to go on with other data from there; returns that step. Raises UserError where it
    did so before, or has no checkpoint.
    """
    global log, steps

    def find_latest():
        saver.wait()
        return checkpoint.has_run(out_dir) and checkpoint.latest(out_dir, say)

    bad_steps, path = guard.state['bad_steps'], parallel.by_the_first(find_latest)
    if loop['went_back'] or not path:
        raise UserError(f'iter {it}: {why} ({bad_steps} steps were left out), and ' + (
            'the run went back to a checkpoint once already' if path else 'there is no checkpoint to go back to') +
            f'; look into {os.path.join(out_dir, "bad_batches")}, lower learning_rate, or lengthen warmup_iters')
    loaded = checkpoint.load(path)
    parallel.load_weights(raw_model, loaded['model'])
    restore(loaded)
    loop.update(data_shift=loop['data_shift'] + it + 1 - first_iter, went_back=True)
    guard.state.update(bad_steps=bad_steps, bad_in_row=0)
    steps.close()
    steps = read_ahead(load_step, range(first_iter, max_iters))
    say(f'iter {it}: {why}; back to the checkpoint of step {first_iter}, and on with other data')
    if rank == 0:
        log.close()
        log = open_log()
        report(iter=first_iter, tokens=first_tokens, bad_steps=bad_steps, went_back_from=it)
    save(first_iter)
    if rank == 0:
        saver.wait()  # so that whatever comes, a resume goes on with the other data as well
    return first_iter


def save(it, improved=False):
    """Has a checkpoint of step `it` written beside the training, from a copy. Every process calls it."""
    if rank == 0:
        saver.wait()  # so that there is one copy at a time
    weights = raw_model.state_dict()
    if shape.tie_weights:  # one tensor under two names, also in the copy
        del weights['lm_head.weight']
    weights, moments = (parallel.copy_whole(state, here=rank == 0) for state in (weights, opt.state_dict()))
    if rank == 0:
        if shape.tie_weights:
            weights['lm_head.weight'] = weights['wte.weight']
        also = ['best.pt'] * improved + [f'ckpt_{it}.pt'] * bool(keep_every and it % keep_every == 0)
        saver.save([os.path.join(out_dir, name) for name in also], model=weights, model_config=dataclasses.asdict(shape),
                   tokenizer=tokenizer.state(), config=public_config, data=manifests, hardware=hardware, iter=it,
                   tokens=tokens_seen(it), optimizer=moments, scaler=scaler.state_dict(), loop=loop | guard.state,
                   elapsed=elapsed + time.perf_counter() - started, best_val_loss=best_val_loss)


def copy_away(it, also=()):
    """Has the checkpoint of step `it` copied to the mirror; `also` are its further names."""
    if copies:
        names = [os.path.basename(name) for name in also]
        copies.copy(it, saver.path, log.path, public_config, best='best.pt' in names, kept=f'ckpt_{it}.pt' in names)


def tokens_seen(it):
    """Tokens trained on when `it` steps are done; those of a resumed run may have had another size."""
    return first_tokens + (it - first_iter) * tokens_per_step


@torch.no_grad()
def evaluate():
    """
    Validation figures: nats per token, perplexity and bits per byte (of sft only the first two, over what is taught; of dpo its
    loss and rewards), of the mixture and, if several, each source.
    """
    raw_model.eval()
    found = {}  # figure → value by source
    for name, split in val_splits.items():
        sums = torch.zeros(2 + len(REPORTED), device=device)  # targets or pairs, their loss, and what else is reported
        for batch in val_batches(split, eval_iters * batch_size, micro_batch, rank, world_size):
            batch = tuple(on_device(map(torch.from_numpy, batch)))
            with autocast(device, dtype):
                loss, rewards = loss_of(model, *batch, evaluates=True)
            sums += torch.cat((torch.stack((count(*batch), loss)), rewards))
        if under_torchrun:
            dist.all_reduce(sums)
        loss, *rewards = (sums[1:] / sums[0]).tolist()
        figures = {'val_loss': loss} | {f'val_{key}': value for key, value in named(rewards).items()}
        if stage == 'pretrain':
            figures['val_bpb'] = loss / math.log(2) * split.n_tokens / split.n_bytes
        for key, value in figures.items():
            found.setdefault(key, {})[name] = value
    raw_model.train()
    share_of = {name: weight for name, weight in zip(names, weights) if name in val_splits}
    figures = {key: sum(share_of[n] * of[n] for n in share_of) / sum(share_of.values()) for key, of in found.items()}
    if stage != 'dpo':
        figures = {'val_loss': figures['val_loss'], 'val_ppl': math.exp(min(figures['val_loss'], 700))} | figures
    if len(val_splits) > 1:
        figures |= {f'{key}/{name}': value for key, of in found.items() for name, value in of.items()}
    return figures


def sample():
    """The continuation of `sample_prompt`, drawn with a generator of its own: training randomness stays untouched."""
    model = raw_model
    if fsdp:
        weights = parallel.copy_whole(raw_model.state_dict(), here=rank == 0)
        model = Transformer.from_weights(shape, weights).to(device) if rank == 0 else None
    if rank > 0:
        return
    model.eval()
    if stage == 'pretrain':
        ids, text, stop_ids = tokenizer.beginning(sample_prompt), sample_prompt, ()
    else:
        ids, text = chat.render(tokenizer, [{'role': 'user', 'content': sample_prompt}]), f'> {sample_prompt}\n'
        stop_ids = chat.end_of_answer(tokenizer)
    stream = tokenizer.stream(begins=not text)
    with autocast(device, dtype):
        for (nxt,) in generate(model, [ids], Sampling(max_new_tokens=sample_tokens), [torch.Generator().manual_seed(seed)],
                               unknown_ids(tokenizer, model)):
            if nxt in stop_ids:
                break
            text += stream(nxt)
    model.train()
    say(f'--------\n{text}\n--------')


def plan_rest(it, first_steps, evaluation):
    """The seconds that this process takes in all, by its first steps and an evaluation (0 = not known); says them."""
    steps_left = max_iters - it - 1
    evaluations = max_iters // eval_interval - it // eval_interval + (max_iters % eval_interval > 0)
    seconds = time.perf_counter() - started + steps_left * min(first_steps[1:]) + evaluations * evaluation
    say(f'plan: {seconds:.0f} s by the first steps' +
        (f', with {evaluations} evaluation{"s" * (evaluations > 1)} of {evaluation:.1f} s' if evaluation else ''))
    return seconds


def draw_losses():
    """loss.png, where matplotlib is there; without it the run is as good."""
    try:
        run = importlib.util.find_spec('matplotlib') and curves.read(out_dir)
        if run:
            curves.draw([run], os.path.join(out_dir, 'loss.png'))
    except Exception as e:  # of any kind: a log that is damaged, a matplotlib that does not work
        say(f'loss.png: {type(e).__name__}: {e}')


def load_step(it):
    """This process's share of step `it`: its micro-batches, and how many of their targets count."""
    if device.startswith('cuda'):
        torch.cuda.set_device(device)  # of the thread that reads ahead; pinning would wake the first card otherwise
    batches = []
    for m in range(micro_steps):
        first = rank * share + m * micro_batch
        batch = map(torch.from_numpy, order.batch(it + loop['data_shift'], range(first, first + micro_batch)))
        batches.append([part.pin_memory() for part in batch] if device.startswith('cuda') else [*batch])
    return batches, sum(int(count(*batch)) for batch in batches)


def on_device(batch):
    return (part.to(device, non_blocking=device.startswith('cuda')) for part in batch)  # pinned, so it may be read later


# ---- what a stage minimises: what a batch is divided by, its loss, summed, and what else is reported, summed as well

def count_targets(x, y, begins=None):
    return (y >= 0).sum()


def loss_of_targets(model, x, y, begins=None, evaluates=False):
    how = 'cross_entropy' if evaluates else criterion
    return model(x, y, reduction='sum', criterion=how, begins=begins), torch.zeros(0, device=x.device)


def count_pairs(x, y, begins, log_probs):
    return begins[::2].sum()


def loss_of_pairs(model, x, y, begins, log_probs, evaluates=False):
    return preference(model(x, y, reduction='none', begins=begins), begins, log_probs, beta, label_smoothing)


OBJECTIVES = {
    'pretrain': (count_targets, loss_of_targets, ()),
    'sft': (count_targets, loss_of_targets, ()),
    'dpo': (count_pairs, loss_of_pairs, ('chosen', 'rejected', 'accuracy')),
}


def named(rewards):
    """{figure: value} of what is reported beside the loss, with dpo's margin."""
    figures = dict(zip(REPORTED, rewards))
    return figures | ({'margin': figures['chosen'] - figures['rejected']} if figures else {})


# ---- processes, and the run to go on with, if any

device = pick_device(device, local_rank, world_size)
if under_torchrun:
    if backend == 'nccl' and device == 'cpu':
        raise UserError("backend='nccl' serves CUDA only, and device is cpu; use --backend=auto")
    backend = ('nccl' if device.startswith('cuda') else 'gloo') if backend == 'auto' else backend
    parallel.start(backend, device)
# How the run begins. scratch: new weights. A model's name: its weights, step 0. resume: the step, optimizer and data of this
# folder's run (`resumes`). A wsd checkpoint with --schedule=wsd: the same of another run, to an end of its own (`branches`).
# `goes_on`: either of the last two. `by_itself`: --init_from=auto chose.
by_itself = init_from.partition(':')[0] == 'auto'
init_from, loaded_path, was_fetched = parallel.by_the_first(run_folder.begin, out_dir, init_from, mirror, say)
resumes = init_from == 'resume'
loaded = checkpoint.load_any(loaded_path) if loaded_path else None
branches = not resumes and loaded is not None and branches_off(loaded)
goes_on = resumes or branches
if loaded:
    take_over_settings(loaded, loaded_path)
branched_at = loaded['iter'] if branches else loaded['loop'].get('branched_at', 0) if resumes else 0
if branches:  # all that is left of it is decay, unless the command line says otherwise
    lr_decay_iters = lr_decay_iters if config.source['lr_decay_iters'] == 'command line' else 0
    wsd_decay_iters = wsd_decay_iters if config.source['wsd_decay_iters'] == 'command line' else max_iters
if branched_at:
    wsd_decay_iters = min(wsd_decay_iters, max((lr_decay_iters or max_iters) - branched_at, 0))
    config |= {'lr_decay_iters': lr_decay_iters, 'wsd_decay_iters': wsd_decay_iters}
check_settings()
count, loss_of, REPORTED = OBJECTIVES[stage]
if stage == 'dpo' and resumes and reference != loaded['config'].get('reference'):
    raise UserError(f"reference='{reference}' was '{loaded['config'].get('reference')}' when the run began, and stays; leave "
                    'it out, or begin another run in another --out_dir')
if stage == 'dpo' and not loaded:
    raise UserError("stage='dpo' needs a model that answers already: --init_from=out/NAME/ckpt.pt, of a run with --stage=sft")

# ---- precision

dtype = pick_dtype(dtype, device)
fsdp = fsdp and under_torchrun  # a single process has it all
if fsdp and (optimizer not in ('adamw', 'adam', 'sgd') or dtype == 'float16'):
    raise UserError(f"fsdp=True serves adamw, adam and sgd in float32 or bfloat16, and here are '{optimizer}' and "
                    f'{dtype}; leave fsdp out, or change them')
if fsdp and 'batch_size' in config.auto:
    raise UserError('fsdp=True needs a number as batch_size, and it is auto: its processes cannot try sizes on their own')
set_up(device)

# ---- data

total_batch, share, micro_sizes = parallel.share_step(batch_size, gradient_accumulation_steps, world_size)
tokens_per_step = total_batch * block_size * rows.sides(stage)
names, weights = parse_mix(dataset)
if local_rank == 0:
    prepare_missing(names)
if under_torchrun:
    dist.barrier()
metas, train_splits, val_splits = open_data(names, stage, block_size, stride)
meta = metas[0]
learns_to_chat = stage == 'sft' and not resumes  # in the data's template, with its special tokens
tokenizer, unknown = choose_tokenizer(loaded and tokenizer_from_state(loaded['tokenizer']), meta)
other = [name for name, m in zip(names, metas) if stage != 'pretrain' and (
    m['chat_template'] != chat.chat_template(tokenizer) or unknown)]
if other:
    whose = f'data set {names[0]}' if learns_to_chat or not loaded else f'the model in {loaded_path}'
    raise UserError(f'data set {other[0]} was prepared with another chat template than that of {whose}; ' + (
        'prepare it again with the same' if chat.chat_template(tokenizer) else 'it has none: --stage=sft comes before dpo'))
manifests = {split.name: split.manifest for split in train_splits}
order = TrainingOrder(train_splits, weights, total_batch, seed)

# ---- model and optimizer

if loaded and learns_to_chat:
    checkpoint.grow_vocabulary(loaded, tokenizer.vocab_size, seed)
    vocab_size = config['vocab_size'] = loaded['model_config']['vocab_size']
shape = checkpoint.shape_of(config, vocab_size or (loaded['model_config'] if loaded else meta)['vocab_size'])
# a tokenizer may have special tokens beyond what a model of somebody else knows: those that occur count
needed = 1 + max(entry['max_id'] for m in metas for entry in m['files'].values()) if loaded else meta['vocab_size']
if shape.vocab_size < needed:
    raise UserError(f'vocab_size {shape.vocab_size} is less than the {needed} of data set {names[0]}; ' +
                    (f'prepare it with the tokenizer of {loaded_path}' if loaded else 'leave it at 0 or make it larger'))
torch.manual_seed(seed)
raw_model = Transformer(shape)  # the plain module, whose names checkpoints use
raw_model.checkpoint_activations = checkpoint_activations
first_iter, first_tokens, elapsed, best_val_loss, former_best = 0, 0, 0.0, math.inf, math.inf
guard = StepGuard(max_spike)
loop = {  # what else a resumed run has to know
    'done': -1,  # the step whose evaluation and samples are done: an interrupted run leaves them to the one that goes on
    'data_shift': 0,  # step i reads the batch of step i + data_shift
    'went_back': False,
    'branched_at': 0,  # the step of another run where this one began to go its own way
    'wandb_id': '',
    'reference': '',  # the fingerprint of dpo's
}
reference_checkpoint = None  # where it is at hand, with all of its positions
if stage == 'dpo' and not resumes:
    reference = config['reference'] = reference or loaded_path
    reference_checkpoint = loaded | {'model': dict(loaded['model'])} if reference == loaded_path else \
        reference_model.load(reference, tokenizer)
    loop['reference'] = parallel.by_the_first(reference_model.fingerprint, reference_checkpoint)
begun_from, hardware = huggingface.public_name(init_from), f'{world_size} x {device_name(device)}'
if loaded:
    if shape.pos == 'learned':
        loaded['model']['positions.weight'] = loaded['model']['positions.weight'][:block_size]
    checkpoint.check_weights(shape, loaded, loaded_path)
    raw_model.load_state_dict(loaded['model'])
if fsdp:
    parallel.shard(raw_model, device, world_size)
raw_model.to(device)
opt = make_optimizer(optimizer, raw_model, learning_rate, beta1, beta2, momentum, weight_decay, device)
scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')
lr_at = make_schedule(schedule, learning_rate, min_lr, warmup_iters, lr_decay_iters or max_iters,
                      wsd_decay_iters or (lr_decay_iters or max_iters) // 5, wsd_decay)
if goes_on:
    former = loaded['config']['optimizer']
    if former != optimizer:
        raise UserError(f"optimizer is '{optimizer}', but {loaded_path} was trained with '{former}', whose state is another; "
                        'leave it out')
    restore(loaded)
    if branches:
        loop.update(branched_at=branched_at, went_back=False, wandb_id='')
    elapsed = loaded['elapsed']
    begun_from = loaded['config']['init_from'] if resumes else begun_from
    machines = loaded['hardware'].split(', then ') if loaded['hardware'] else []
    hardware = ', then '.join(machines if machines[-1:] == [hardware] else [*machines, hardware])
    if first_iter > max_iters:
        raise UserError(f'max_iters={max_iters} is less than the {first_iter} steps that {loaded_path} has done; raise it')
    if loaded['data'] and loaded['data'] != manifests:
        say(f'changed: the token files of {dataset} are not those that the run began with')
del loaded
micro_batch = largest_micro_batch() if 'batch_size' in config.auto else next(n for n in micro_sizes if n <= batch_size)
micro_steps = share // micro_batch
wants_compile = device.startswith('cuda') and not fsdp if compile == 'auto' else compile
model, ddp_model = try_compile(raw_model) if wants_compile else (raw_model, wrap(raw_model))
if stage == 'dpo':
    add_reference_log_probs(reference_checkpoint)
    del reference_checkpoint

# ---- the loop

public_config = config | {'dtype': dtype, 'init_from': begun_from, 'mirror': ''}  # a URL may hold credentials
wandb_run = saver = None
if rank == 0:
    log = open_log()
    if wandb_log:
        loop['wandb_id'] = loop['wandb_id'] or new_id()
        wandb_run = Wandb(wandb_project, wandb_run_name or out_dir, public_config, out_dir, loop['wandb_id'], say)
    saver = checkpoint.Saver(os.path.join(out_dir, 'ckpt.pt'), keep_last, say, copy_away)
    copies = Mirror(mirror, max(keep_last, 2), say) if mirror else None
    if resumes and not was_fetched:  # what the former process did not come to
        copy_away(first_iter)
peak = peak_flops(device)
shape_of_step = f'processes {world_size} x micro-steps {micro_steps} x windows {micro_batch} x block_size {block_size}'
say(f'{raw_model.count_parameters():,} parameters; {max_iters:,} steps of {tokens_per_step:,} tokens ({shape_of_step}'
    f'{" x 2 answers" if stage == "dpo" else ""}), {max_iters * tokens_per_step:,} in all, '
    f'{max(order.epochs(max_iters)):.2f} epochs')
say(f'{device_name(device)}, {dtype}' + (', compiled' if model is not raw_model else '') +
    (f', resumed at iter {first_iter}' if resumes else '') + (f', branches off at iter {first_iter}' if branches else ''))
interruption = Interruption(say, under_torchrun)
steps = read_ahead(load_step, range(first_iter, max_iters))
started = time.perf_counter()  # all times in seconds
measured, measured_tokens = 0.0, 0  # what the next line of the log divides: training only, without what interrupts it
planned_memory = costs.memory(raw_model, micro_batch * rows.sides(stage), dtype, optimizer, device == 'cpu',
                              checkpoint_activations, world_size if fsdp else 1, masked=stage != 'pretrain')
say(f'plan: memory {costs.in_words(planned_memory)}')
first_steps, evaluation_time, planned_time = [], 0.0, None
it = first_iter
while True:  # one round more than there are steps: it evaluates and saves the last

    # 1. evaluate, save, sample; a resumed run did so before it stopped
    last = it == max_iters
    interrupted, late, lost = parallel.total(interruption.signal, *saver.news(checkpoint_minutes) if saver else (0, 0))
    if lost:  # the best could not be written
        best_val_loss = former_best
    evaluates = val_splits and (it % eval_interval == 0 or last) and not interrupted
    saves = last or it > 0 and it % (checkpoint_interval or eval_interval) == 0 or late or interrupted
    samples = it > 0 and sample_interval and (it % sample_interval == 0 or last) and not interrupted
    if (evaluates or saves or samples) and (loop['done'] != it or interrupted):
        waits = time.perf_counter()
        synchronize(device)
        measured += time.perf_counter() - waits
        improved = False
        if evaluates:
            evaluation_started = time.perf_counter()
            figures = evaluate()
            evaluation_time = time.perf_counter() - evaluation_started
            improved = figures['val_loss'] < best_val_loss and it > 0
            if improved:
                former_best, best_val_loss = best_val_loss, figures['val_loss']
            report(iter=it, tokens=tokens_seen(it), **figures, time=elapsed + time.perf_counter() - started)
            say(f'iter {it}: ' + ', '.join(f'{key} {value:.4f}' for key, value in figures.items()))
        if not interrupted:
            loop['done'] = it
        if (saves or improved or samples) and not parallel.all_finite(raw_model.parameters()):
            it = go_back(it, 'the weights are no finite numbers any more')
            continue
        if saves or improved:
            save(it, improved)
        if samples:
            sample()
    if last or interrupted:
        break

    # 2. gradient: the sum over the step's targets divided by their number, over all micro-steps and processes
    step_started = time.perf_counter()
    micro_batches, n_targets = next(steps)
    n_targets = torch.full((), float(n_targets), device=device)
    if under_torchrun:
        dist.all_reduce(n_targets)
    scale = world_size / n_targets.clamp(min=1)  # DDP and FSDP average over the processes: times world_size is the sum again
    sums = torch.zeros(1 + len(REPORTED), device=device)  # the loss, and what else is reported
    for m, batch in enumerate(micro_batches):
        torch.manual_seed(hash_ints(seed, it + loop['data_shift'], rank, m))  # dropout's seed
        with parallel.local_gradients(ddp_model, wait=m < micro_steps - 1), autocast(device, dtype):
            loss, rewards = loss_of(ddp_model, *on_device(batch))
            loss = loss * scale
        scaler.scale(loss).backward()
        sums += torch.cat((loss.detach()[None], rewards * scale))
    scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    if under_torchrun:
        dist.all_reduce(sums)
    grad_norm = grad_norm.full_tensor() if fsdp else grad_norm
    loss, *rewards, grad_norm = torch.cat((sums / world_size, grad_norm[None])).tolist()  # the only wait for the device

    # 3. step, unless its numbers are wrong: they are the same on all processes, and so is what is done
    wrong, lr = guard.wrong(loss, grad_norm, scaler), lr_at(it)
    if not wrong:
        for group in opt.param_groups:
            group['lr'] = lr
        scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    guard.record(loss, grad_norm, wrong)

    # 4. log
    measured += time.perf_counter() - step_started
    measured_tokens += tokens_per_step
    if len(first_steps) < 4:
        first_steps.append(time.perf_counter() - step_started)
        if len(first_steps) == 4:
            planned_time = plan_rest(it, first_steps, evaluation_time)
    if wrong:
        report(iter=it, tokens=tokens_seen(it + 1), bad_steps=guard.state['bad_steps'], wrong=wrong)
        say(f'iter {it}: step left out, {wrong}; its batch is in {keep_bad_batch(it, wrong, micro_batches)}')
    elif it % log_interval == 0:
        tok_per_sec = measured_tokens / measured
        mfu = raw_model.flops_per_token() * tok_per_sec / (peak * world_size) if peak else None
        so_far = time.perf_counter() - started
        left = (max_iters - it - 1) * tokens_per_step / tok_per_sec
        report(iter=it, tokens=tokens_seen(it + 1), loss=loss, **named(rewards), lr=lr, grad_norm=grad_norm,
               tok_per_sec=tok_per_sec, mfu=mfu, time=elapsed + so_far)
        more = ''.join(f', {key} {value:.3f}' for key, value in named(rewards).items())
        say(f'iter {it}/{max_iters}: loss {loss:.4f}{more}, lr {lr:.2e}, norm {grad_norm:.2f}, '
            f"{tok_per_sec:,.0f} tok/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}, {int(left) // 60}:{int(left) % 60:02d} left")
        measured, measured_tokens = 0.0, 0
    it = go_back(it, wrong) if guard.state['bad_in_row'] >= max_bad_steps else it + 1

# ---- the end

took, memory_peak = time.perf_counter() - started, memory_taken(device)
problem = saver.wait() if saver else None
if rank == 0 and not log.close():
    problem = problem or f'{log.path} could not be written to its end'
if rank == 0 and copies:
    copies.close(60 if interruption.signal else 600)
if wandb_run:
    wandb_run.finish(15 if interrupted else 30)
if problem:
    raise UserError(f'{problem}; make room and go on with --init_from=resume')
if rank == 0 and picture and not interrupted:
    draw_losses()
if interrupted:
    code = 128 + (interruption.signal or signal.SIGTERM)  # another process may have had it
    say(f'stopped at iter {it} and saved; --init_from=resume goes on')
else:
    code = 0
    say(f'done: {max_iters} iters in {elapsed + took:.0f} s' +
        (f', best validation loss {best_val_loss:.4f}' if val_splits else ''))
    say('this took ' + (f'{took:.0f} s (planned: {planned_time:.0f} s) and ' if planned_time else '') +
        f'{costs.short(memory_peak)}B of memory (planned: {costs.short(sum(planned_memory.values()))}B)')
    say(f"Now let it write:\n    python sample.py --out_dir={out_dir}{' --chat' * (stage != 'pretrain')}")
if under_torchrun:
    parallel.total(0)  # the first process may still be saving and copying
run_folder.let_go()
with contextlib.suppress(OSError):
    sys.stdout.flush()
if under_torchrun:
    os._exit(code)  # to take the process group down in good order aborts now and then, with gloo's threads still at work
sys.exit(code)
