"""
Models in Hugging Face's form, in and out: one table of names between their weights and ours, read in both directions.

    checkpoint = load('openai-community/gpt2')                  # a folder, or an id on the hub; as checkpoint.py has it
    write('hf/mine', model, tokenizer)                          # what transformers, llama.cpp and others open

GPT-2, Llama and Mistral. What our model cannot compute is refused by name; every tensor is used once and every parameter
set. Only safetensors are read, never pickles, which can execute code.
"""

import base64
import dataclasses
import json
import os
import re
import shutil

import torch

from configurator import UserError
from model import ModelConfig, Transformer, parse_rope_scaling
from tokenizer import FILES, HUB_ID, byte_alphabet, from_hub, load_tokenizer, tokenizers_package

# ---- the tables

# Our modules and theirs, * being a block's number. Where theirs are several, ours is their rows, one below the other.
# T: stored transposed, inputs x outputs, as GPT-2's own code had it (transformers' Conv1D).
NAMES = {'gpt2': """
    wte                 transformer.wte
    positions           transformer.wpe
    h.*.norm_1          transformer.h.*.ln_1
    h.*.attn.c_attn     transformer.h.*.attn.c_attn  T
    h.*.attn.c_proj     transformer.h.*.attn.c_proj  T
    h.*.norm_2          transformer.h.*.ln_2
    h.*.mlp.c_fc        transformer.h.*.mlp.c_fc  T
    h.*.mlp.c_proj      transformer.h.*.mlp.c_proj  T
    norm_f              transformer.ln_f
    lm_head             lm_head
""", 'llama': """
    wte                 model.embed_tokens
    h.*.norm_1          model.layers.*.input_layernorm
    h.*.attn.c_attn     model.layers.*.self_attn.q_proj  model.layers.*.self_attn.k_proj  model.layers.*.self_attn.v_proj
    h.*.attn.c_proj     model.layers.*.self_attn.o_proj
    h.*.norm_2          model.layers.*.post_attention_layernorm
    h.*.mlp.c_gate_up   model.layers.*.mlp.gate_proj  model.layers.*.mlp.up_proj
    h.*.mlp.c_proj      model.layers.*.mlp.down_proj
    norm_f              model.norm
    lm_head             lm_head
"""}

# Entries of config.json, our names for them, and what stands for a missing one, as in transformers (None: it must be there).
CONFIG = {'gpt2': (
    ('vocab_size', 'vocab_size', None), ('n_positions', 'block_size', 1024), ('n_embd', 'n_embd', None),
    ('n_layer', 'n_layer', None), ('n_head', 'n_head', None), ('n_inner', 'n_inner', 0),
    ('layer_norm_epsilon', 'norm_eps', 1e-5), ('initializer_range', 'init_std', 0.02), ('resid_pdrop', 'dropout', 0.1),
    ('tie_word_embeddings', 'tie_weights', True),
), 'llama': (
    ('vocab_size', 'vocab_size', None), ('max_position_embeddings', 'block_size', 2048), ('hidden_size', 'n_embd', None),
    ('num_hidden_layers', 'n_layer', None), ('num_attention_heads', 'n_head', None),
    ('num_key_value_heads', 'n_kv_head', 0), ('intermediate_size', 'n_inner', None), ('rms_norm_eps', 'norm_eps', 1e-6),
    ('initializer_range', 'init_std', 0.02), ('attention_dropout', 'dropout', 0.0),
    ('tie_word_embeddings', 'tie_weights', False),
)}

# Our switches in each family; entries of config.json that must be so, by which the model would compute something else.
SWITCHES = {'gpt2': {'norm': 'layernorm', 'mlp': 'gelu', 'pos': 'learned'},
            'llama': {'norm': 'rmsnorm', 'mlp': 'swiglu', 'pos': 'rope'}}
MUST_BE = {'gpt2': {'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'scale_attn_weights': (True,),
                    'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,)},
           'llama': {'hidden_act': ('silu', 'swish')}}
FAMILY = {'gpt2': 'gpt2', 'llama': 'llama', 'mistral': 'llama'}  # model_type → the tables that serve it
ARCHITECTURES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM'}
CONSTANTS = r'\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$'  # causal masks and frequencies that older files carry along


def family_of(config):
    """The tables that serve a ModelConfig. Raises UserError for a mixture of switches that no architecture of theirs has."""
    switches = {key: getattr(config, key) for key in ('norm', 'mlp', 'pos')}
    family = next((family for family in SWITCHES if SWITCHES[family] == switches), None)
    if not family:
        raise UserError(f"norm='{config.norm}', mlp='{config.mlp}', pos='{config.pos}' is neither GPT-2 (layernorm, gelu, "
                        'learned) nor Llama (rmsnorm, swiglu, rope), and Hugging Face has no name for it')
    if family == 'gpt2' and (config.n_kv_head < config.n_head or config.sliding_window):
        raise UserError(f'n_kv_head={config.n_kv_head} with n_head={config.n_head}, sliding_window={config.sliding_window}: '
                        "Hugging Face's GPT-2 has neither grouped queries nor a sliding window")
    if config.sliding_window and config.bias:
        raise UserError(f"sliding_window={config.sliding_window} and bias=True: Hugging Face's Mistral has no biases")
    return family


def _theirs(name, family):
    """Our tensor's name → (theirs, one or several; whether it is stored transposed)."""
    module, kind = name.rsplit('.', 1)
    block = re.match(r'h\.(\d+)\.', module)
    pattern = re.sub(r'^h\.\d+\.', 'h.*.', module)
    row = next(line.split()[1:] for line in NAMES[family].splitlines() if line.split()[:1] == [pattern])
    transposed = row[-1] == 'T'
    names = [f'{module}.{kind}'.replace('*', block[1] if block else '*') for module in row if module != 'T']
    return names, transposed and kind == 'weight'


def to_theirs(weights, config):
    """Our weights (name → tensor) under their names and in their layout. A tied output layer is left out."""
    c, family, out = config, family_of(config), {}
    rows = {3: [c.n_head * c.head_size, c.n_kv_head * c.head_size, c.n_kv_head * c.head_size], 2: [c.n_inner, c.n_inner]}
    for name, tensor in weights.items():
        if name == 'lm_head.weight' and c.tie_weights:
            continue
        theirs, transposed = _theirs(name, family)
        parts = tensor.split(rows[len(theirs)]) if len(theirs) > 1 else [tensor]
        out |= {their: part.T if transposed else part for their, part in zip(theirs, parts)}
    return out


def to_ours(weights, config):
    """The inverse of `to_theirs`, which empties `weights` to save memory; a tied output layer is the embedding again."""
    family, out = family_of(config), {}
    for name in Transformer.without_weights(config).state_dict():
        if name == 'lm_head.weight' and config.tie_weights:
            out[name] = out['wte.weight']
            continue
        theirs, transposed = _theirs(name, family)
        parts = [weights.pop(their) for their in theirs]
        out[name] = torch.cat(parts) if len(parts) > 1 else parts[0].T.contiguous() if transposed else parts[0]
    return out


# ---- in

def hub_id(name):
    """The id on the hub that a name stands for, or '' if it stands for none: 'owner/model', or one of GPT-2's four sizes."""
    if re.fullmatch('gpt2(-medium|-large|-xl)?', name):
        return f'openai-community/{name}'
    return name if re.fullmatch(HUB_ID, name) and not name.endswith('.pt') else ''


def public_name(name):
    """A name that may be published: an id on the hub, or of a path, which is private, the last part."""
    return (not os.path.exists(name) and hub_id(name)) or os.path.basename(os.path.normpath(name))


def load(name):
    """
    The model in folder `name`, or of that id on the hub, as a checkpoint has it: model (float32), model_config, tokenizer
    and config. Raises UserError for what is missing, damaged, or not among what our model can compute.
    """
    folder = name if os.path.isdir(name) else from_hub(
        hub_id(name), ['config.json', 'model*.safetensors', 'model.safetensors.index.json', *FILES], f"init_from='{name}'")
    config = read_config(folder)
    eos = _read_json(os.path.join(folder, 'config.json')).get('eos_token_id')
    eos = eos[0] if isinstance(eos, list) and eos else eos
    tokenizer = load_tokenizer(folder, eot_id=eos if type(eos) is int else None)
    tokenizer.name = public_name(name)
    check_tokenizer(tokenizer, config, folder)
    weights = to_ours(read_weights(folder, config), config)
    return {'model': weights, 'model_config': dataclasses.asdict(config), 'tokenizer': tokenizer.state(),
            'config': dataclasses.asdict(config)}


def check_tokenizer(tokenizer, config, folder):
    """Raises UserError for a tokenizer whose texts have ids that the model does not know."""
    known = [i for i in range(tokenizer.vocab_size) if tokenizer.decode_bytes([i])] + [tokenizer.eot_id, tokenizer.bos_id or 0]
    if max(known) >= config.vocab_size:  # special tokens beyond may be: none of them comes from a text
        raise UserError(f'{folder}: the tokenizer has ids up to {max(known)}, but the model knows {config.vocab_size}; the '
                        'two do not belong together')


def read_config(folder):
    """A folder's config.json → ModelConfig. Raises UserError for a model that ours cannot be, with the reason."""
    path = os.path.join(folder, 'config.json')
    found = _read_json(path)

    def refuse(reason):
        raise UserError(f'{path}: {reason}')

    kind = found.get('model_type')
    if not isinstance(kind, str) or kind not in FAMILY:
        refuse(f'model_type {kind!r} is none of {", ".join(FAMILY)}, which is what can be loaded')
    family = FAMILY[kind]
    for key in ('quantization_config', 'auto_map'):
        if found.get(key):
            refuse(f'{key} is set: ' + ('quantised weights' if key.startswith('quant') else "a model with code of its own") +
                   ' cannot be loaded')
    for key, allowed in MUST_BE[family].items():
        if found.get(key, allowed[0]) not in allowed:
            refuse(f'{key} {found[key]!r} is not {" or ".join(map(repr, allowed))}, the only one that can be loaded')
    settings = dict(SWITCHES[family])
    for theirs, ours, missing in CONFIG[family]:
        value = found.get(theirs)
        value = missing if value is None else value
        if value is None:
            refuse(f'{theirs} is missing')
        wanted = type(getattr(ModelConfig, ours))
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            refuse(f'{theirs} {value!r} is no {wanted.__name__}')
        settings[ours] = value
    if family == 'gpt2':
        settings['bias'] = True
    else:
        if bool(found.get('attention_bias')) != bool(found.get('mlp_bias')):
            refuse(f'attention_bias {found.get("attention_bias")} and mlp_bias {found.get("mlp_bias")} differ; biases are '
                   'everywhere here or nowhere')
        settings['bias'] = bool(found.get('attention_bias'))
        settings |= _read_rope(found, refuse)
        if kind == 'mistral':  # where transformers has other defaults: a window of 4096, unless it is null, and ...
            for key in ('num_key_value_heads', 'max_position_embeddings'):
                if found.get(key) is None:
                    refuse(f'{key} is missing')
            settings['sliding_window'] = found.get('sliding_window', 4096) or 0
    try:
        config = ModelConfig(**settings)
    except (TypeError, ValueError) as e:
        refuse(str(e))
    if found.get('head_dim') not in (None, config.head_size):
        refuse(f"head_dim {found['head_dim']} is not hidden_size {config.n_embd} / num_attention_heads {config.n_head}, the "
               'only one that can be loaded')
    return config


def _read_rope(found, refuse):
    """rope_theta and rope_scaling of a config.json, as transformers 5 writes them (rope_parameters) or 4 did."""
    rope = found.get('rope_parameters') or found.get('rope_scaling') or {}
    if not isinstance(rope, dict):
        refuse(f'rope scaling {rope!r} is no object')
    theta = rope.get('rope_theta') or found.get('rope_theta') or 10000.0
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if (found.get('partial_rotary_factor') or rope.get('partial_rotary_factor') or 1) != 1:
        refuse('partial_rotary_factor is set: only rope over all of a head can be loaded')
    keys = {'default': [], 'linear': ['factor'],
            'llama3': ['factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings']}
    if kind not in keys:
        refuse(f'rope scaling {kind!r} is none of {", ".join(keys)}, which is what can be loaded')
    wrong = [f'{key} {rope.get(key)!r}' for key in keys[kind] if type(rope.get(key)) not in (int, float)]
    if wrong or type(theta) not in (int, float):
        refuse(f"rope scaling {kind!r} wants numbers, not {', '.join(wrong or [f'rope_theta {theta!r}'])}")
    numbers = ','.join(f'{rope[key]:.15g}' for key in keys[kind])
    return {'rope_theta': float(theta), 'rope_scaling': f'{kind}:{numbers}' if numbers else ''}


def read_weights(folder, config):
    """A folder's tensors under their names, in float32, checked against the shapes that config.json implies."""
    safetensors = _safetensors()
    path_of = {}  # tensor → file
    for path in _weight_files(folder):
        try:
            with safetensors.safe_open(path, 'pt') as f:
                names = list(f.keys())
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f'{path} is not a safetensors file, or is damaged ({e})') from None
        twice = sorted(path_of.keys() & set(names))
        if twice:
            raise UserError(f'{path} holds {twice[0]}, and so does {path_of[twice[0]]}')
        path_of |= dict.fromkeys(names, path)
    if config.n_layer > len(path_of):  # before so many are made to compare
        raise UserError(f'{folder}: config.json says {config.n_layer} layers, but the files hold {len(path_of)} tensors')
    expected = {name: tuple(p.shape) for name, p in to_theirs(Transformer.without_weights(config).state_dict(), config).items()}
    prefix = 'transformer.' if 'transformer.wte.weight' in expected else 'model.'
    weights = {}
    for path in sorted(set(path_of.values())):
        with safetensors.safe_open(path, 'pt') as f:
            for stored in (name for name, where in path_of.items() if where == path):
                # files of the model without its output layer, such as the hub's gpt2, leave the prefix out
                name = stored if stored.startswith((prefix, 'lm_head.')) else prefix + stored
                if re.search(CONSTANTS, name):
                    continue
                if name in weights:
                    raise UserError(f'{path} holds {name} twice, with and without {prefix}')
                try:
                    tensor = f.get_tensor(stored)
                except (safetensors.SafetensorError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as e:
                    raise UserError(f'{path}: {stored} cannot be read ({type(e).__name__}: {e})') from None
                if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                    raise UserError(f'{path}: {stored} is {tensor.dtype}; what can be loaded is float32, float16 and bfloat16')
                weights[name] = tensor.float()
    if config.tie_weights and 'lm_head.weight' in weights:  # some files hold both, some the output layer only
        head, (embedding,) = weights.pop('lm_head.weight'), _theirs('wte.weight', family_of(config))[0]
        if not torch.equal(head, weights.setdefault(embedding, head)):
            raise UserError(f'{folder}: config.json says tie_word_embeddings, but lm_head.weight is not the embedding')
    wrong = [f'{name} is {_shape(weights, name)} there, but {_shape(expected, name)} by config.json'
             for name in sorted(weights.keys() | expected.keys()) if _shape(weights, name) != _shape(expected, name)]
    if wrong:
        more = f', and {len(wrong) - 1} more tensors do not fit' if len(wrong) > 1 else ''
        raise UserError(f'{folder}: {wrong[0]}{more}')
    return weights


def _shape(tensors, name):
    return tuple(getattr(tensors[name], 'shape', tensors[name])) if name in tensors else 'absent'


def _weight_files(folder):
    """The paths of model.safetensors, or of the shards that its index names."""
    single, index = (os.path.join(folder, f'model.safetensors{end}') for end in ('', '.index.json'))
    if os.path.isfile(single):
        return [single]
    if os.path.isfile(index):
        found = _read_json(index)
        if not isinstance(found.get('weight_map'), dict):
            raise UserError(f'{index} has no weight_map')
        shards = sorted(set(map(str, found['weight_map'].values())))
        outside = [shard for shard in shards if not re.fullmatch(r'\w[\w.-]*\.safetensors', shard)]
        if outside:
            raise UserError(f'{index}: {outside[0]!r:.80} names no safetensors file of its folder')
        paths = [os.path.join(folder, shard) for shard in shards]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise UserError(f'{missing[0]} is missing ({len(missing)} of {len(paths)} shards are); fetch the folder again')
        return paths
    pickles = sorted(f for f in os.listdir(folder) if re.search(r'\.(bin|pt|pth|ckpt)$', f))
    if pickles:
        raise UserError(f'{folder} holds {pickles[0]}, a pickle, which can execute code and is never loaded; have it saved as '
                        'safetensors, by transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)')
    raise UserError(f'{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json is there, and '
                    'nothing else is loaded')


def _read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
    except FileNotFoundError:
        raise UserError(f'{path} is missing; a folder in Hugging Face\'s form has one') from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e})') from None
    if not isinstance(found, dict):
        raise UserError(f'{path} is no JSON object')
    return found


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("weights in Hugging Face's form need a package: pip install safetensors") from None
    return safetensors


# ---- out

def write(folder, model, tokenizer, dtype='float32'):
    """
    Writes config.json, generation_config.json, model.safetensors and the tokenizer into `folder`, made where it is missing.
    Returns a model of the shape that was written, without its weights: rows of the vocabulary that the tokenizer does not
    know are cut, and GPT-2 has biases of zero where it had none, since theirs always has them.

    Raises UserError for a model or a tokenizer that has no form there.
    """
    safetensors = _safetensors()
    family, weights = family_of(model.config), model.state_dict()
    config = dataclasses.replace(model.config, vocab_size=min(model.config.vocab_size, tokenizer.vocab_size),
                                 bias=model.config.bias or family == 'gpt2')
    written = Transformer.without_weights(config)
    weights = {name: weights[name][:len(p)] if name in weights else torch.zeros(p.shape)
               for name, p in written.state_dict().items()}
    files = tokenizer_files(tokenizer, config) | config_files(tokenizer, config, dtype)
    os.makedirs(folder, exist_ok=True)
    for file, data in files.items():
        with open(os.path.join(folder, file), 'wb') as f:
            f.write(data)
    theirs = {name: p.to(getattr(torch, dtype)).contiguous() for name, p in to_theirs(weights, config).items()}
    path = os.path.join(folder, 'model.safetensors')
    try:
        safetensors.torch.save_file(theirs, path, {'format': 'pt'})
    except safetensors.SafetensorError as e:  # such as a full disk
        raise OSError(str(e)) from None
    shutil.copymode(os.path.join(folder, 'config.json'), path)  # else it is for its owner's eyes only
    return written


def config_files(tokenizer, config, dtype):
    """{file: bytes} of config.json and generation_config.json."""
    family = family_of(config)
    kind = 'mistral' if config.sliding_window else family
    ids = {'bos_token_id': tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id,
           'eos_token_id': tokenizer.state().get('beside', {}).get('eos_token_id', tokenizer.eot_id)}
    about = {'architectures': [ARCHITECTURES[kind]], 'model_type': kind, 'torch_dtype': dtype, **ids,
             **{theirs: getattr(config, ours) for theirs, ours, _ in CONFIG[family]},
             **{key: allowed[0] for key, allowed in MUST_BE[family].items()}}
    if family == 'gpt2':
        about |= {'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout, 'n_ctx': config.block_size}
    else:
        about |= {'rope_theta': config.rope_theta, 'rope_scaling': _rope_scaling(config), 'head_dim': config.head_size}
        about |= {'sliding_window': config.sliding_window} if kind == 'mistral' else \
            {'attention_bias': config.bias, 'mlp_bias': config.bias}
    return {'config.json': _json(about), 'generation_config.json': _json(ids)}


def _rope_scaling(config):
    kind, numbers = parse_rope_scaling(config.rope_scaling)
    if not kind:
        return None
    factor, *more = numbers
    found = {'rope_type': kind, 'factor': factor}
    if more:
        found |= {'low_freq_factor': more[0], 'high_freq_factor': more[1], 'original_max_position_embeddings': int(more[2])}
    return found


def _json(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()


def tokenizer_files(tokenizer, config):
    """The tokenizer in their form: {file: bytes} of tokenizer.json, tokenizer_config.json, and SentencePiece's own model."""
    state = tokenizer.state()
    tokenizers = tokenizers_package(tokenizer.name)
    makers = {'bytes': _bytes_json, 'tiktoken': _tiktoken_json, 'sentencepiece': _sentencepiece_json,
              'huggingface': lambda _: state['json']}
    text = makers[state['kind']](tokenizer)
    spell = tokenizers.Tokenizer.from_str(text).id_to_token
    has_bos = tokenizer.bos_id is not None
    about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': config.block_size,
             'clean_up_tokenization_spaces': False, 'add_bos_token': has_bos, 'eos_token': spell(tokenizer.eot_id),
             'bos_token': tokenizer.beside.get('bos_token') or spell(tokenizer.bos_id if has_bos else tokenizer.eot_id)}
    flags = ('content', 'lstrip', 'normalized', 'rstrip', 'single_word', 'special')
    about['added_tokens_decoder'] = {token['id']: {key: token[key] for key in flags}
                                     for token in json.loads(text)['added_tokens']}  # llama.cpp's converter looks here
    beside = state.get('beside', {})
    about |= {key: beside[key] for key in ('chat_template', 'pad_token', 'unk_token') if key in beside}
    files = {'tokenizer.json': text.encode(), 'tokenizer_config.json': _json(about)}
    model = state['model'] if state['kind'] == 'sentencepiece' else beside.get('tokenizer.model')
    return files | ({'tokenizer.model': base64.b64decode(model)} if model else {})


def _byte_level(vocab, merges, special, words, **options):
    """The text of a tokenizer.json: byte-level BPE; `vocab` and `merges` in bytes, `special`: token → id."""
    import tokenizers
    character = {b: c for c, b in byte_alphabet().items()}

    def spell(token):
        return ''.join(character[b] for b in token)

    vocab = {spell(token): i for token, i in vocab.items()} | special
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [(spell(a), spell(b)) for a, b in merges], **options))
    bpe.pre_tokenizer = words
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(sorted(special, key=special.get))
    return bpe.to_str(pretty=True)


def _bytes_json(tokenizer):
    """256 bytes and no merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    return _byte_level({bytes([b]): b for b in range(256)}, [], tokenizer.special,
                       ByteLevel(add_prefix_space=False))


def _tiktoken_json(tokenizer):
    """tiktoken's ranks as merges: a token's halves are what is left of its bytes when all lower ranks have merged."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    ranks, merges, whole_words = tokenizer.ranks, [], False
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, own), at) for at, (a, b) in enumerate(zip(parts, parts[1:])))
            if best >= own:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(parts)
        whole_words |= len(parts) > 2  # a token that no merges lead to: tiktoken takes it where it is a whole word
    if tokenizer.name == 'gpt2':
        words = ByteLevel(add_prefix_space=False)  # has the same words built in, and is what others recognise
    else:
        # in Oniguruma, a + behind {1,3} would repeat it instead of making it possessive
        pattern = re.sub(r'(\\p\{N\}\{1,3\})\+', r'(?>\1)', tokenizer.pattern)
        words = Sequence([Split(tokenizers.Regex(pattern), 'isolated'), ByteLevel(add_prefix_space=False, use_regex=False)])
    return _byte_level(ranks, merges, tokenizer.special, words, ignore_merges=whole_words)


def _sentencepiece_json(tokenizer):
    """A SentencePiece model, BPE or unigram, as the tokenizer.json that gives the same ids; refused if there is none."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(f'tokenizer {tokenizer.name}: to write it as a tokenizer.json needs a package: pip install '
                        'protobuf') from None
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    kind_of, (NORMAL, UNKNOWN, _, DEFINED, _, BYTE) = [piece.type for piece in proto.pieces], range(1, 7)
    unknown = pieces[kind_of.index(UNKNOWN)][0]
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        # the pairs that a piece can come from, those of the best score first
        merges = [(-score, piece[:n], piece[n:]) for (piece, score), kind in zip(pieces, kind_of) if kind == NORMAL
                  for n in range(1, len(piece)) if piece[:n] in vocab and piece[n:] in vocab]
        merges = [pair for _, *pair in sorted(merges, key=lambda merge: merge[0])]
        made = Tokenizer(models.BPE(vocab, list(map(tuple, merges)), unk_token=unknown, fuse_unk=True,
                                    byte_fallback=BYTE in kind_of, ignore_merges=DEFINED in kind_of))
    else:
        made = Tokenizer(models.Unigram(pieces, unk_id=kind_of.index(UNKNOWN), byte_fallback=BYTE in kind_of))
    spec = proto.normalizer_spec
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
    if spec.add_dummy_prefix:
        steps += [normalizers.Prepend('▁')]
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(' ', '▁')])
    defined = sorted((re.escape(piece) for (piece, _), kind in zip(pieces, kind_of) if kind == DEFINED), key=len, reverse=True)
    if defined:  # never parted, but part of the text, so that what comes behind them gets no dummy prefix of its own
        made.pre_tokenizer = pre_tokenizers.Split(Regex('|'.join(defined)), 'isolated')
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                      *([decoders.Strip(' ', 1, 0)] if spec.add_dummy_prefix else [])])
    made.add_special_tokens(sorted(tokenizer.special, key=tokenizer.special.get))
    if tokenizer.bos_id is not None:
        bos = pieces[tokenizer.bos_id][0]
        made.post_processor = processors.TemplateProcessing(single=f'{bos} $A', pair=f'{bos} $A {bos} $B',
                                                            special_tokens=[(bos, tokenizer.bos_id)])
    made.encode_special_tokens = True
    for text in tokenizer.probes():
        if made.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise UserError(f'tokenizer {tokenizer.name}: this SentencePiece model gives other ids in the form of a '
                            'tokenizer.json, so that the model cannot be exported with it')
    return made.to_str(pretty=True)
