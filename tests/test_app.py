"""The page of app.py, in a browser: texts stream, Stop stops the server too, users take turns, chats remember."""

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import TINY, run, start
from test_chat import taught  # noqa: F401 (a fixture)
from test_errors import fails

pytest.importorskip('gradio', reason='gradio is missing: pip install gradio')
# greedy: with anything drawn, this model would soon draw the end of text
ENDLESS = ('--out_dir=out/tiny', '--device=cpu', '--dtype=float32', '--temperature=0', '--max_new_tokens=10000000')
LENGTH = "() => document.querySelector('#text textarea').value.length"


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s:
        return s.getsockname()[1]


@contextlib.contextmanager
def served(*args, cwd):
    """app.py, running; gives (its process, its address). Ctrl-C ends it at once, and it has said nothing but its address."""
    port = free_port()
    process = start('app.py', *args, f'--port={port}', cwd=cwd)
    try:
        assert process.stdout.readline() == f'open http://127.0.0.1:{port}\n', process.communicate()[1]
        yield process, f'http://127.0.0.1:{port}/'
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0 and (out, err) == ('\n', '')
    finally:
        process.kill()


@pytest.fixture(scope='module')
def tiny(prepared, tmp_path_factory):
    """A folder with a run whose checkpoints of steps 10 and 20 are kept; a file beside them is none."""
    place = tmp_path_factory.mktemp('tiny')
    (place / 'data').symlink_to(prepared / 'data')
    run('train.py', *TINY, '--keep_every=10', cwd=place)
    (place / 'out' / 'tiny' / 'junk.pt').write_text('junk')
    return place


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='playwright is missing: pip install playwright')
    path = next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chrome'))), None)
    if not path:
        pytest.skip('no Chromium on PATH')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=[
            '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run'])
        yield browser
        browser.close()


def opened(browser, address):
    """A page of its own; a request to any other address is an error."""
    page = browser.new_page()
    page.elsewhere = []
    page.on('request', lambda request: request.url.startswith((address, 'data:', 'blob:'))
            or page.elsewhere.append(request.url))
    page.goto(address)
    page.wait_for_function("() => /tokens/.test(document.querySelector('#words')?.textContent)")
    return page


def grows(page):
    """Waits until the text is longer than it is now."""
    page.wait_for_function(f'n => ({LENGTH})() > n', arg=page.evaluate(LENGTH))


def at_rest(process):
    """Waits until a process computes nothing any more; one that goes on writing never rests."""
    def seconds():
        if not Path('/proc/self/stat').exists():
            pytest.skip('no /proc, which tells whether the server still computes')
        fields = Path(f'/proc/{process.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    deadline, before = time.monotonic() + 20, seconds()
    while time.monotonic() < deadline:
        time.sleep(0.5)
        before, last = seconds(), before
        if before - last < 0.2:
            return
    raise AssertionError('the server computes on')


@pytest.mark.slow
def test_texts_stream_and_stop_and_checkpoints_are_chosen(tiny, browser):
    with served(*ENDLESS, cwd=tiny) as (process, address):
        page = opened(browser, address)
        page.click('#model input')
        names = page.get_by_role('option').all_inner_texts()
        assert [re.sub(r'^\W*', '', name) for name in names] == [
            'ckpt.pt, step 20', 'best.pt, step 20', 'ckpt_10.pt, step 10', 'ckpt_20.pt, step 20', 'ckpt.1.pt, step 10',
            'junk.pt']
        assert not page.get_by_role('tab', name='Chat').is_visible()  # the model has no chat template
        page.get_by_role('option', name='junk.pt').click()
        page.get_by_text('junk.pt is not a checkpoint').wait_for()  # a mistake is one line on the page
        page.fill('#model input', 'ckpt_10')
        page.get_by_role('option', name='ckpt_10.pt').click()
        page.wait_for_function("() => /^\\s*step 10 /.test(document.querySelector('#words').textContent)")
        page.fill('#prompt textarea', 'def ')
        page.click('#write')
        for _ in range(3):
            grows(page)
        assert page.input_value('#text textarea').startswith('def ')
        assert re.search(r'[\d,]+ tokens, [\d,.]+ per second', page.text_content('#speed'))
        page.click('#stop_write')
        at_rest(process)
        page.fill('#prompt textarea', '')  # a new document
        page.click('#write')
        page.wait_for_function("() => !document.querySelector('#text textarea').value.startsWith('def ')")
        grows(page)
        page.close()  # nobody reads on
        at_rest(process)
        assert page.elsewhere == []


@pytest.mark.slow
def test_two_users_take_turns_and_have_models_of_their_own(tiny, browser):
    with served(*ENDLESS, cwd=tiny) as (process, address):
        one, other = opened(browser, address), opened(browser, address)
        one.click('#write')
        grows(one)
        other.click('#model input')
        other.get_by_role('option', name='ckpt_10.pt').click()
        other.click('#write')
        grows(other)
        for _ in range(3):
            grows(one)
            grows(other)
        n = [page.evaluate(LENGTH) for page in (one, other)]
        for page in (one, other):  # each is given about half of the next thousand
            page.wait_for_function(f'n => ({LENGTH})() > n', arg=page.evaluate(LENGTH) + 500)
        gained = [page.evaluate(LENGTH) - before for page, before in zip((one, other), n)]
        assert max(gained) < 3 * min(gained), gained
        one.click('#stop_write')
        grows(other)
        other.click('#stop_write')
        at_rest(process)
        one.close(), other.close()


@pytest.mark.slow
def test_a_chat_remembers_until_it_is_reset(taught, browser):  # noqa: F811
    with served('--out_dir=out/chats', '--device=cpu', '--temperature=0', cwd=taught) as (_, address):
        page = opened(browser, address)
        page.get_by_role('tab', name='Chat').click()

        def send(words, how, sent=lambda: not page.input_value('#message textarea')):
            """As a user does who knows that nothing is sent while an answer comes."""
            page.fill('#message textarea', words)
            deadline = time.monotonic() + 30
            while not sent():
                assert time.monotonic() < deadline
                how()
                page.wait_for_timeout(200)

        def say(words, *turns):
            """Says `words`; what then stands there must be `turns`."""
            send(words, lambda: page.press('#message textarea', 'Shift+Enter'))
            page.wait_for_function("""turns => {
                const shown = [...document.querySelectorAll('#talk [data-testid=user], #talk [data-testid=bot]')]
                return JSON.stringify(shown.map(turn => turn.textContent.trim())) == JSON.stringify(turns)
            }""", arg=list(turns))
            page.wait_for_function("() => /per second/.test(document.querySelector('#answer_speed').textContent)")

        greeting, question = ('My name is Ann.', 'Hello Ann!'), ('What is my name?', 'You are Ann.')
        say(greeting[0], *greeting)
        say(question[0], *greeting, *question)
        page.click('#reset')
        page.wait_for_function("() => !document.querySelector('#talk [data-testid=user]')")
        say('Who are you?', 'Who are you?', 'I am Pim, an owl.')
        for _ in range(4):
            send(greeting[0], lambda: page.click('#send'))
        page.get_by_text('no longer fits into 64 tokens: the oldest 2 messages are forgotten').wait_for()
        send('x' * 200, lambda: page.click('#send'), page.get_by_text('too many for a context of 64').count)
        page.close()


def test_users_take_turns_without_a_browser(tiny):
    """The same through the page's own interface, with as many users at once as take turns."""
    client = pytest.importorskip('gradio_client')
    with served(*ENDLESS, cwd=tiny) as (process, address):
        users = [client.Client(address, verbose=False) for _ in range(3)]
        settings = 10**7, 0, 0, 1, 0, 1, '', 3  # as they stand on the page
        jobs = [user.submit('def ', 'out/tiny/ckpt.pt', *settings, api_name='/write') for user in users]
        deadline = time.monotonic() + 60
        while min(len(job.outputs()) for job in jobs) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        texts = [job.outputs()[-1][0] for job in jobs]
        assert all(len(text) > 4 for text in texts)
        shortest = min(map(len, texts))
        assert len({text[:shortest] for text in texts}) == 1  # the same text, whoever else writes meanwhile
        for job in jobs:
            job.cancel()
        at_rest(process)


def test_what_it_refuses(tiny):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert fails('app.py', '--out_dir=out/tiny', f'--port={port}', cwd=tiny) == (
            f'error: port={port} is in use; choose another with --port')
    assert 'there is no checkpoint' in fails('app.py', '--out_dir=out/none', f'--port={free_port()}', cwd=tiny)
