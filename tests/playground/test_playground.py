"""The page in a real Chromium, on a real server with SmolLM2: what a person sees and presses."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import jsonschema
import pytest

from tests.playground.chromium import Page, chromium, find_chromium
from tests.smollm2 import staged_smollm2
from torchweave_ray.bench.server_process import started_server

pytestmark = [
    pytest.mark.ray,
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium here: apt-get install chromium"
    ),
]
ANSWER = "[...document.querySelectorAll('.assistant .body')].at(-1)?.textContent"
IS_IDLE = "document.getElementById('stop').hidden"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started_server(("--artifact", str(staged_smollm2()), "--no-dashboard")) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page, url: str) -> Iterator[Page]:
    browser.complaints.clear()
    browser.resize(1280, 800)
    browser.open("about:blank")
    browser.open(url + "/")
    browser.wait("document.getElementById('health').dataset.state === 'ok'")
    browser.run("document.querySelector('[name=temperature]').value = 0")
    browser.run("document.querySelector('[name=max_tokens]').value = 24")
    yield browser
    browser.run("localStorage.clear()")


def ask(page: Page, text: str) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def test_a_chat_streams_and_goes_on(page: Page) -> None:
    page.run(
        "window.lengths = new Set();"
        "new MutationObserver(() => lengths.add(document.querySelector('.assistant .body')"
        "?.textContent.length)).observe(document.getElementById('messages'),"
        "{subtree: true, childList: true, characterData: true}); 0"
    )
    ask(page, "What is the capital of France?")
    page.wait(f"{IS_IDLE} && {ANSWER}")
    assert "Paris" in page.run(ANSWER)
    assert page.run("lengths.size") > 4  # it grew before the eyes
    assert page.text("#m-ttft").endswith(" s")
    assert page.text("#m-speed").endswith(" tok/s")
    assert "Paris" in page.run("document.getElementById('announce').textContent")
    assert page.run("document.activeElement.id") == "prompt"
    ask(page, "And of Italy?")
    page.wait(f"{IS_IDLE} && document.querySelectorAll('.assistant').length === 2")
    assert int(page.text("#m-cached").split(" of ")[0]) > 0  # the first turn was sent along
    assert page.complaints == []


def test_stop_ends_the_request_at_the_server(page: Page, url: str) -> None:
    page.run("document.querySelector('[name=max_tokens]').value = 1500")
    ask(page, "Write a very long story about a river.")
    page.wait(f"({ANSWER} || '').length > 40")
    page.press("Escape")
    page.wait(IS_IDLE, within_s=2)
    stopped = page.run(ANSWER)
    assert "Stopped." in page.text("#messages")
    page.wait(
        "performance.getEntriesByType('resource').some("
        "e => e.name.includes('/v1/requests/') && e.responseStatus === 200)"
    )
    ask(page, "Say hello.")
    page.wait(f"{IS_IDLE} && document.querySelectorAll('.assistant').length === 2")
    assert page.run("document.querySelector('.assistant .body').textContent") == stopped


def test_an_answer_keeps_to_a_schema_and_a_bad_schema_is_said(page: Page) -> None:
    page.click("#use-schema")
    schema = json.loads(page.run("document.getElementById('schema').value"))
    page.run("document.querySelector('[name=max_tokens]').value = 120")
    ask(page, "Invent a person.")
    page.wait(f"{IS_IDLE} && {ANSWER}")
    jsonschema.validate(json.loads(page.run(ANSWER)), schema)
    page.run("document.getElementById('schema').value = '{'")
    ask(page, "Another one.")
    page.wait("!document.getElementById('failure').hidden")
    assert page.run("document.getElementById('schema').getAttribute('aria-invalid')") == "true"
    assert "Not JSON" in page.text("#schema-error")
    page.run("""document.getElementById('schema').value = '{"type": "nothing"}'""")
    page.press("Enter")
    page.run("document.getElementById('ask').requestSubmit()")
    page.wait("document.getElementById('failure').textContent.includes('server did not take')")


def test_errors_are_said_in_words_and_the_question_is_kept(page: Page) -> None:
    page.run("document.querySelector('[name=max_tokens]').value = 10 ** 9")
    ask(page, "Will you?")
    page.wait("!document.getElementById('failure').hidden")
    assert "max_tokens" in page.text("#failure")
    assert "{" not in page.text("#failure")  # words, not JSON
    assert page.run("document.getElementById('prompt').value") == "Will you?"
    assert page.run("document.getElementById('failure').getAttribute('role')") == "alert"
    page.run("document.querySelector('[name=top_p]').value = 7")
    page.run("document.getElementById('ask').requestSubmit()")
    page.wait("document.getElementById('failure').textContent.includes('Top p')")


def test_a_lost_connection_is_taken_up_again(page: Page) -> None:
    """The browser's own connection is cut off in the middle; the text is the undisturbed one."""
    ask(page, "Count to five.")
    page.wait(f"{IS_IDLE} && {ANSWER}")
    whole = page.run(ANSWER)
    page.click("#reset")
    page.run(
        "window.plain = window.fetch; window.asked = [];"
        "window.fetch = async (path, options) => { asked.push(path);"
        "  const answer = await plain(path, options);"
        "  if (!String(path).endsWith('completions')) return answer;"
        "  const reader = answer.body.getReader(); let left = 3;"
        "  const cut = new ReadableStream({async pull(c) { const {value} = await reader.read();"
        "    if (left-- > 0) return c.enqueue(value);"
        "    reader.cancel(); c.error(new TypeError('cut')); }});"
        "  return new Response(cut, {status: answer.status, headers: answer.headers}); }; 0"
    )
    ask(page, "Count to five.")
    page.wait(f"{IS_IDLE} && {ANSWER}")
    assert page.run(ANSWER) == whole
    assert page.run("asked.filter(p => String(p).startsWith('v1/streams/')).length") >= 1


def test_answers_cannot_be_markup(page: Page) -> None:
    hostile = (
        "# <img src=x onerror=window.pwned=1>\n<script>window.pwned=1</script> **<b>bold</b>** "
        '[x](javascript:window.pwned=1) [y](https://example.org/"onclick="x)\n\n```\n<i>code</i>\n```\n'
        "- one\n- `two`\n\n1. first"
    )
    made = page.run(
        "import('/playground/markdown.js').then(m => { const box = document.createElement('div');"
        f"box.id = 'made'; box.append(m.render({json.dumps(hostile)})); document.body.append(box);"
        "return [...box.querySelectorAll('*')].map(n => n.tagName"
        " + [...n.attributes].map(a => ' ' + a.name).join('')); })"
    )
    tags = {each.split()[0] for each in made}
    assert tags == {"H4", "P", "STRONG", "A", "PRE", "CODE", "UL", "OL", "LI"}
    assert not any("onclick" in each or "onerror" in each for each in made)
    assert page.run("[...document.querySelectorAll('#made a')].map(a => a.protocol)") == ["https:"]
    assert page.run("window.pwned") is None


def test_the_comparison_draws_both(page: Page) -> None:
    page.press("Tab")
    page.run("document.getElementById('tab-chat').focus()")
    page.press("ArrowRight")
    assert page.run("document.getElementById('view-compare').hidden") is False
    page.run("document.querySelector('[name=requests]').value = 4")
    page.run("document.querySelector('[name=tokens]').value = 16")
    page.click("#start")
    page.wait("document.getElementById('verdict').textContent.includes('×')", within_s=60)
    curves = page.run(
        "[...document.querySelectorAll('#chart-tokens .curve')].map(c => c.getAttribute('d'))"
    )
    assert len(curves) == 2
    assert curves[0].count("L") > 16  # it moved while tokens came
    assert curves[1].count("L") == 4  # an answer at a time
    tokens = page.run(
        "[...document.querySelectorAll('#numbers tbody td:nth-child(5)')].map(c => c.innerText)"
    )
    assert tokens == ["64", "64"]
    assert page.run("document.querySelectorAll('#chart-first .mark').length") == 8
    assert page.complaints == []


def test_phone_width_themes_and_names(page: Page) -> None:
    page.resize(360, 740)
    for tab in ("#tab-chat", "#tab-compare"):
        page.click(tab)
        assert page.run("document.documentElement.scrollWidth") <= 360
    ground = "getComputedStyle(document.body).backgroundColor"
    page.prefer("dark")
    dark = page.run(ground)
    page.click("#theme")
    assert page.run(ground) != dark
    page.prefer("light")
    # Everything that can be used has a name that is read aloud.
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    used = {"button", "textbox", "spinbutton", "combobox", "checkbox", "tab", "link"}
    nameless = [
        n
        for n in nodes
        if n.get("role", {}).get("value") in used and not n.get("name", {}).get("value")
    ]
    assert nameless == []


def test_files_are_ours_alone(url: str) -> None:
    with urllib.request.urlopen(url + "/", timeout=10) as answer:
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Content-Type"].startswith("text/html")
    for name in ("__init__.py", "..%2fapp.py", "nothing.js"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/playground/{name}", timeout=10)
        assert refused.value.code == 404
