"""What a person does on the page, and what they see of it."""

from __future__ import annotations

from tests.playground.chromium import Page

ANSWER = "[...document.querySelectorAll('.assistant .body')].at(-1)?.textContent"
IS_IDLE = "document.getElementById('stop').hidden"
NUM_ANSWERS = "document.querySelectorAll('.assistant').length"


def ask(page: Page, text: str) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def answered(page: Page, number: int = 1) -> str:
    """The text of the page's so many-th answer, as soon as it is whole."""
    page.wait(f"{IS_IDLE} && {NUM_ANSWERS} === {number}")
    return str(page.run(ANSWER))


def set_field(page: Page, name: str, value: object) -> None:
    page.run(f"document.querySelector('[name={name}]').value = {value!r}")


def compare(page: Page, clients: int, requests: int, tokens: int) -> None:
    """By keys to the second tab, then run."""
    page.run("document.getElementById('tab-chat').focus()")
    page.press("ArrowRight")
    assert page.run("document.getElementById('view-compare').hidden") is False
    set_field(page, "clients", clients)
    set_field(page, "requests", requests)
    set_field(page, "tokens", tokens)
    page.click("#start")


def compared(page: Page) -> list[str]:
    """Both curves' paths, when the comparison is through."""
    page.wait("document.getElementById('verdict').textContent.includes('×')", within_s=60)
    paths: list[str] = page.run(
        "[...document.querySelectorAll('#chart-tokens .curve')].map(c => c.getAttribute('d'))"
    )
    return paths
