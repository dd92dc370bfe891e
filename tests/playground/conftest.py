"""One browser for all tests of the page; which server it looks at, a file's `url` says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.playground.chromium import Page, chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page, url: str) -> Iterator[Page]:
    """As a newcomer finds it, but for short answers without chance. What the console complains of
    is a failure, whatever the test looks at; one that provokes complaints clears them."""
    browser.complaints.clear()
    browser.prefer("light")
    browser.resize(1280, 800)
    browser.open("about:blank")
    browser.open(url + "/")
    browser.wait("document.getElementById('health').dataset.state === 'ok'")
    browser.wait("document.getElementById('model').value")
    browser.run("document.querySelector('[name=temperature]').value = 0")
    browser.run("document.querySelector('[name=max_tokens]').value = 24")
    yield browser
    browser.run("localStorage.clear(); sessionStorage.clear()")
    assert browser.complaints == []
