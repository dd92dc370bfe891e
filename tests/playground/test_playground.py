"""The page in a real Chromium, on a real engine with SmolLM2: what a person sees and presses."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jsonschema
import pytest

from tests.playground.actions import (
    ANSWER,
    IS_IDLE,
    NUM_ANSWERS,
    answered,
    ask,
    compare,
    compared,
    set_field,
)
from tests.playground.chromium import Page, find_chromium
from tests.playground.server import Served, serving
from tests.smollm2 import staged_smollm2

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium here: apt-get install chromium"
    ),
]
SENT = (
    "window.plain ??= window.fetch; window.sent = [];"
    "window.fetch = (path, options) => { sent.push({path, ...options});"
    "  return plain(path, options); }; 0"
)
"""Notes what the page asks of the server, and asks it."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(staged_smollm2(), tmp_path_factory.mktemp("keys")) as served:
        yield served


@pytest.fixture(scope="module")
def url(served: Served) -> str:
    return served.url


def test_a_chat_streams_and_goes_on(page: Page) -> None:
    page.run(
        "window.lengths = new Set();"
        "new MutationObserver(() => lengths.add(document.querySelector('.assistant .body')"
        "?.textContent.length)).observe(document.getElementById('messages'),"
        "{subtree: true, childList: true, characterData: true}); 0"
    )
    ask(page, "What is the capital of France?")
    assert "Paris" in answered(page)
    assert page.run("lengths.size") > 4  # it grew before the eyes
    assert page.text("#m-ttft").endswith(" s")
    assert page.text("#m-speed").endswith(" tok/s")
    assert "Paris" in page.run("document.getElementById('announce').textContent")
    assert page.run("document.activeElement.id") == "prompt"
    ask(page, "And of Italy?")
    answered(page, 2)
    assert int(page.text("#m-cached").split(" of ")[0]) > 0  # the first turn was sent along


def test_stop_ends_the_request_at_the_server(page: Page) -> None:
    set_field(page, "max_tokens", 1500)
    ask(page, "Write a very long story about a river.")
    page.wait(f"({ANSWER} || '').length > 40")
    page.press("Escape")
    page.wait(IS_IDLE, within_s=10)
    stopped = page.run(ANSWER)
    assert "Stopped." in page.text("#messages")
    page.wait(
        "performance.getEntriesByType('resource').some("
        "e => e.name.includes('/v1/requests/') && e.responseStatus === 200)"
    )
    set_field(page, "max_tokens", 4)
    ask(page, "Say hello.")
    answered(page, 2)
    assert page.run("document.querySelector('.assistant .body').textContent") == stopped


def test_an_answer_keeps_to_a_schema_and_a_bad_schema_is_said(page: Page) -> None:
    page.click("#use-schema")
    schema = json.loads(page.run("document.getElementById('schema').value"))
    set_field(page, "max_tokens", 120)
    ask(page, "Invent a person.")
    jsonschema.validate(json.loads(answered(page)), schema)
    assert page.run("document.querySelector('.assistant pre').tabIndex") == 0
    set_field(page, "schema", "{")
    ask(page, "Another one.")
    page.wait("!document.getElementById('failure').hidden")
    assert page.run("document.getElementById('schema').getAttribute('aria-invalid')") == "true"
    assert "Not JSON" in page.text("#schema-error")
    set_field(page, "schema", '{"type": "nothing"}')
    page.run("document.getElementById('ask').requestSubmit()")
    page.wait("document.getElementById('failure').textContent.includes('server did not take')")
    page.complaints.clear()  # Chromium's own, of a 400


def test_errors_are_said_in_words_and_the_question_is_kept(page: Page) -> None:
    set_field(page, "max_tokens", 10**9)
    ask(page, "Will you?")
    page.wait("!document.getElementById('failure').hidden")
    assert "max_tokens" in page.text("#failure")
    assert "{" not in page.text("#failure")  # words, not JSON
    assert page.run("document.getElementById('prompt').value") == "Will you?"
    assert page.run("document.getElementById('failure').getAttribute('role')") == "alert"
    set_field(page, "top_p", 7)
    page.run("document.getElementById('ask').requestSubmit()")
    page.wait("document.getElementById('failure').textContent.includes('Top p')")
    page.complaints.clear()


def test_settings_reach_the_server_and_are_kept_in_this_browser(page: Page, url: str) -> None:
    page.run(SENT)
    for name, value in {"system": "Be brief.", "top_k": 5, "seed": 7, "stop": "###"}.items():
        set_field(page, name, value)
    page.run("document.getElementById('settings').dispatchEvent(new Event('input'))")
    ask(page, "Say hello.")
    answered(page)
    (body,) = page.run("sent.filter(s => s.method === 'POST').map(s => JSON.parse(s.body))")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_k"], body["seed"]) == (0, 5, 7)
    assert (body["max_tokens"], body["stop"]) == (24, ["###"])
    assert "top_p" not in body, "an empty field is the server's own"
    page.open("about:blank")
    page.open(url + "/")
    page.wait("document.getElementById('model').value")
    assert page.run("document.getElementById('system').value") == "Be brief."


def test_tokens_without_text_have_no_speed_of_their_own(page: Page) -> None:
    """All that the model says is a stop string: tokens come, and nothing is shown."""
    ask(page, "What is the capital of France?")
    first_word = answered(page).split()[0]
    page.click("#reset")
    set_field(page, "stop", first_word)
    ask(page, "What is the capital of France?")
    page.wait(f"{IS_IDLE} && {NUM_ANSWERS} === 1")
    assert "without a word" in page.text("#messages")
    assert "without a word" in page.run("document.getElementById('announce').textContent")
    assert int(page.text("#m-tokens")) >= 1
    assert page.text("#m-speed") == "–"
    assert float(page.text("#m-ttft").removesuffix(" s")) < 30


def test_a_lost_connection_is_taken_up_again(page: Page) -> None:
    """The browser's own connection is cut off in the middle; the text is the undisturbed one."""
    ask(page, "Count to five.")
    whole = answered(page)
    page.click("#reset")
    page.run(
        "window.plain = window.fetch; window.resumed = 0;"
        "window.fetch = async (path, options) => { const answer = await plain(path, options);"
        "  if (!String(path).endsWith('completions')) return answer;"
        "  if (options.headers['Last-Event-ID']) { resumed += 1; return answer; }"
        "  const reader = answer.body.getReader(); let left = 3;"
        "  const cut = new ReadableStream({async pull(c) { const {value} = await reader.read();"
        "    if (left-- > 0) return c.enqueue(value);"
        "    reader.cancel(); c.error(new TypeError('cut')); }});"
        "  return new Response(cut, {status: answer.status, headers: answer.headers}); }; 0"
    )
    ask(page, "Count to five.")
    assert answered(page) == whole
    assert page.run("resumed") >= 1


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
    compare(page, clients=4, requests=4, tokens=16)
    curves = compared(page)
    assert len(curves) == 2
    assert curves[0].count("L") > 16  # it moved while tokens came
    assert curves[1].count("L") == 4  # an answer at a time
    tokens = page.run(
        "[...document.querySelectorAll('#numbers tbody td:nth-child(5)')].map(c => c.innerText)"
    )
    assert tokens == ["64", "64"]
    assert page.run("document.querySelectorAll('#chart-first .mark').length") == 8
    compare(page, clients=6, requests=64, tokens=512)
    page.wait("document.getElementById('verdict').textContent.startsWith('Running')")
    page.click("#halt")
    page.wait("document.getElementById('verdict').textContent === 'Stopped.'")
    assert page.run("document.getElementById('start').disabled") is False


def test_a_server_with_keys_is_given_one(page: Page, served: Served) -> None:
    page.open("about:blank")
    page.open(served.guarded_url + "/")
    page.wait("!document.getElementById('key-box').hidden")
    ask(page, "What is the capital of France?")
    page.wait("document.getElementById('failure').textContent.includes('API key')")
    page.run("document.getElementById('key').focus()")
    page.type(served.key)
    page.press("Tab")
    page.wait("document.getElementById('model').value")
    page.wait("document.getElementById('replicas').hidden")  # an operator's key would show them
    set_field(page, "max_tokens", 24)
    set_field(page, "temperature", 0)
    page.run("document.getElementById('ask').requestSubmit()")  # the question is still there
    assert "Paris" in answered(page)
    page.complaints.clear()  # Chromium's own, of 401 and 403


def test_it_says_what_the_model_and_its_replicas_do(page: Page) -> None:
    page.wait("document.querySelectorAll('#replicas tbody tr').length === 1")
    name, running, waiting, kv = page.run(
        "[...document.querySelectorAll('#replicas tbody tr > *')].map(c => c.textContent)"
    )
    assert (name, waiting) == ("in this process", "0")
    assert int(running) >= 0
    assert kv.endswith(" %")
    assert "LlamaForCausalLM" in page.text("#about")


def test_keys_alone_reach_everything_in_the_order_of_the_page(page: Page) -> None:
    page.run("document.activeElement.blur(); document.getElementById('use-schema').click()")
    page.run("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(40):
        seen = page.run(
            "(() => { const e = document.activeElement, box = e.getBoundingClientRect();"
            "return [e.id || e.name || e.textContent.trim(), box.width * box.height,"
            " getComputedStyle(e).outlineStyle]; })()"
        )
        reached.append(seen)
        page.press("Tab")
    names = [name for name, _, _ in reached]
    expected = ["Skip to the prompt", "tab-chat", "API", "theme", "messages", "prompt", "send"]
    expected += ["reset", "model", "system", "temperature", "seed", "use-schema", "schema"]
    places = [names.index(name) for name in expected]
    assert places == sorted(places), names
    for name, area, outline in reached[1 : names.index("schema")]:  # script put it on the first
        assert area > 0, name
        assert outline != "none", name  # what has the focus is seen


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_a_phone_or_hidden_below_it(page: Page, width: int) -> None:
    page.resize(width, 740)
    set_field(page, "max_tokens", 60)
    ask(page, "What is gravity?")
    answered(page)
    for tab in ("#tab-compare", "#tab-chat"):
        page.click(tab)
        assert page.run("document.documentElement.scrollWidth") <= width
        wide = page.run(
            "[...document.querySelectorAll('header *, main *')].filter(n => {"
            f"const box = n.getBoundingClientRect(); return box.width && box.right > {width} + 1"
            " && !n.closest('.wide, .unseen, pre'); }).map(n => n.outerHTML.slice(0, 80))"
        )
        assert wide == []
    below = page.run("document.getElementById('ask').getBoundingClientRect().bottom")
    assert below <= 740, "what one types into is on the screen"


def test_themes_and_names(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.prefer("dark")
    dark = page.run(ground)
    page.click("#theme")
    assert page.run(ground) != dark
    # Everything that can be used has a name that is read aloud.
    used = {"button", "textbox", "spinbutton", "combobox", "checkbox", "tab", "link", "image"}
    for tab in ("#tab-compare", "#tab-chat"):
        page.click(tab)
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        named = [n for n in nodes if n.get("role", {}).get("value") in used and not n["ignored"]]
        assert len(named) > 5
        assert [n for n in named if not n.get("name", {}).get("value")] == []


def test_the_page_of_the_api_runs_under_its_own_policy(page: Page, url: str) -> None:
    """Its script and style are allowed by hash; the console says so when one is not."""
    page.open(url + "/docs")
    assert page.wait("document.querySelectorAll('details').length") > 10
    cursor = page.run("getComputedStyle(document.querySelector('summary')).cursor")
    assert cursor == "pointer"
    page.open(url + "/")
    page.wait("document.getElementById('model').value")
