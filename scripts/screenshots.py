"""Pictures of the playground for README and docs, from a real server and a real Chromium.

python -m scripts.screenshots [--recipe smollm2-135m] [--url http://127.0.0.1:8000] [NAME ...]

Writes docs/images/NAME.png; without names, all of them. With `--url` the server that answers there
is used, else one is started.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image  # matplotlib brings it

from tests.playground.chromium import Page, chromium
from torchweave_ray.bench.server_process import started_server

IMAGES = Path(__file__).resolve().parent.parent / "docs/images"
MAX_BYTES = 200_000
DESKTOP, PHONE = (1280, 860), (390, 844)
QUESTIONS = ("What is gravity?", "List three things that gravity does, in short words.")
TOKENS = "Number(document.querySelector('#numbers .{} td:nth-child(5)').innerText)"
HALF_OF_UNBATCHED = f"{TOKENS.format('unbatched')} > {TOKENS.format('batched')} / 2"


def chat(page: Page) -> None:
    """Two turns."""
    for number, question in enumerate(QUESTIONS, 1):
        ask(page, question, number)


def ask(page: Page, question: str, number: int) -> None:
    """The page's so many-th question, until it is answered."""
    page.run("document.getElementById('prompt').focus()")
    page.type(question)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.assistant').length === {number} && !running()")


def light(page: Page) -> None:
    chat(page)


def dark(page: Page) -> None:
    """With the answer to a schema below."""
    page.prefer("dark")
    ask(page, "What is the capital of France?", 1)
    page.click("#use-schema")
    ask(page, "Invent a person.", 2)


def phone(page: Page) -> None:
    ask(page, QUESTIONS[0], 1)


def comparison(page: Page) -> None:
    """Caught while its second half runs."""
    page.click("#tab-compare")
    page.run("document.querySelector('[name=clients]').value = '6'")
    page.run("document.querySelector('[name=requests]').value = 12")
    page.run("document.querySelector('[name=tokens]').value = 64")
    page.click("#start")
    page.wait(HALF_OF_UNBATCHED, within_s=120)


def comparison_phone(page: Page) -> None:
    comparison(page)
    page.run("document.querySelector('#verdict').scrollIntoView()")


PICTURES: dict[str, Callable[[Page], None]] = {
    "playground-light": light,
    "playground-dark": dark,
    "playground-phone": phone,
    "comparison": comparison,
    "comparison-phone": comparison_phone,
}


def take(page: Page, url: str, name: str) -> Path:
    """From a page as a newcomer has it. Raises RuntimeError when the page complained."""
    page.complaints.clear()
    if name.endswith("phone"):
        page.resize(*PHONE, scale=2.0)
    else:
        page.resize(*DESKTOP)
    page.prefer("light")
    page.open(url + "/")
    page.run("localStorage.clear()")
    page.open("about:blank")
    page.open(url + "/")
    page.run("window.running = () => !document.getElementById('stop').hidden; 0")
    page.wait("document.getElementById('health').dataset.state === 'ok'")
    page.wait("document.querySelectorAll('#about div').length > 3")
    page.run("document.querySelector('[name=temperature]').value = 0")
    page.run("document.querySelector('[name=max_tokens]').value = 160")
    PICTURES[name](page)
    page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    picture = smaller(page.picture())
    if page.complaints:
        raise RuntimeError(f"{name}: {page.complaints}")
    if len(picture) > MAX_BYTES:
        raise RuntimeError(f"{name}: {len(picture)} bytes, at most {MAX_BYTES}")
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"{name}.png"
    path.write_bytes(picture)
    return path


def smaller(png: bytes) -> bytes:
    """The same picture out of 256 colours: the frequent ones as they are, the others, of letters'
    edges, as the nearest of these."""
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int32)
    height, width, _ = picture.shape
    codes = picture @ (1 << 16, 1 << 8, 1)
    colours, where, counts = np.unique(codes, return_inverse=True, return_counts=True)
    parts = colours[:, None] >> (16, 8, 0) & 255
    palette = parts[np.argsort(-counts)[:256]]
    nearest = [np.abs(palette - colour).sum(axis=1).argmin() for colour in parts]
    few = Image.fromarray(np.array(nearest, np.uint8)[where].reshape(height, width))
    few.putpalette(palette.astype(np.uint8).tobytes())
    packed = io.BytesIO()
    few.save(packed, "PNG", optimize=True)
    return packed.getvalue()


@contextmanager
def serving(url: str | None, recipe: str) -> Iterator[str]:
    if url is not None:
        yield url.rstrip("/")
        return
    with started_server(("--recipe", recipe, "--no-dashboard")) as server:
        yield server.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], metavar="NAME")
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--url")
    given = parser.parse_args()
    with serving(given.url, given.recipe) as url, chromium() as page:
        for name in given.names or PICTURES:
            path = take(page, url, name)
            print(path.relative_to(IMAGES.parent.parent), path.stat().st_size)


if __name__ == "__main__":
    main()
