"""The page's files as they are served; what it does in a browser is in tests/playground."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.api.conftest import Api
from torchweave_ray.api import playground

FOLDER = Path(playground.__file__).parent


def test_the_page_and_every_file_that_it_names_are_served(api: Api) -> None:
    page = api.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text))
    modules = {
        f"playground/{name}"
        for file in FOLDER.glob("*.js")
        for name in re.findall(r'from "\./([^"]+)"', file.read_text())
    }
    for path in named | modules:
        answer = api.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert {f"playground/{f.name}" for f in FOLDER.glob("*.js")} <= named | modules  # none is idle


def test_the_policy_lets_nothing_in_and_the_page_needs_nothing(api: Api) -> None:
    page = api.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", page.text)
    for file in FOLDER.iterdir():
        if file.suffix in (".html", ".js", ".css"):
            text = file.read_text()
            assert not re.search(r"(?:src|href|from|import|url)\W{1,3}https?://", text), file.name
            assert "innerHTML" not in text
            assert "outerHTML" not in text
            assert "insertAdjacentHTML" not in text


def test_every_id_that_a_script_looks_up_is_on_the_page() -> None:
    page = (FOLDER / "index.html").read_text()
    for file in FOLDER.glob("*.js"):
        looked_up = re.findall(r'(?:getElementById|\$)\("([\w-]+)"\)', file.read_text())
        missing = [name for name in looked_up if f'id="{name}"' not in page]
        assert not missing, (file.name, missing)


@pytest.mark.parametrize("name", ["__init__.py", "..%2fapp.py", "nothing.js", "../table.py"])
def test_nothing_else_is_read(api: Api, name: str) -> None:
    assert api.get(f"/playground/{name}").status_code == 404
