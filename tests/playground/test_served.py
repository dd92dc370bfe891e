"""The page behind HAProxy and Ray Serve: two ingresses, one of which dies under an answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.playground.actions import ANSWER, answered, ask, compare, compared, set_field
from tests.playground.chromium import Page, find_chromium
from tests.smollm2 import staged_smollm2
from torchweave_ray.bench.process_tree import ProcessTree
from torchweave_ray.bench.server_process import RunningServer, application_file, started_server

pytestmark = [
    pytest.mark.ray,
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium here: apt-get install chromium"
    ),
]
INGRESS = "ray::ServeReplica:torchweave:Ingress"
STATES = (
    "window.states = []; new MutationObserver(() => states.push("
    "document.getElementById('m-state').textContent)).observe("
    "document.getElementById('m-state'), {childList: true, subtree: true}); 0"
)
"""Notes what the page says of its answer."""
MAX_KILLS = 8
QUESTION = "Write a long story about a river."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = {"id": "smollm2", "artifact": str(staged_smollm2()), "num_cpus": 1, "threads": 1}
    args = {"models": [model], "ingress": {"num_replicas": 2}}
    config = application_file(tmp_path_factory.mktemp("served"), args)
    with started_server((str(config), "--no-dashboard")) as server:
        yield server


@pytest.fixture
def url(server: RunningServer) -> str:
    return server.url


def test_an_answer_goes_on_when_its_ingress_dies(page: Page, server: RunningServer) -> None:
    set_field(page, "max_tokens", 250)
    ask(page, QUESTION)
    whole = answered(page)
    tree = ProcessTree([server.pid])
    for number in range(MAX_KILLS):  # chance may put the answer on the one that is not killed
        page.click("#reset")
        page.run(STATES)
        ask(page, QUESTION)
        page.wait(f"({ANSWER} || '').length > 60")
        ingresses = sorted(tree.named(INGRESS))
        os.kill(ingresses[number % len(ingresses)], signal.SIGKILL)
        assert answered(page) == whole
        if "reconnecting" in page.run("states"):
            break
    else:
        pytest.fail("no ingress that was killed had the answer")
    page.complaints.clear()  # Chromium's own, of the connection


def test_replicas_and_a_comparison_behind_ray_serve(page: Page) -> None:
    page.wait("document.querySelectorAll('#replicas tbody tr').length === 1")
    compare(page, clients=6, requests=6, tokens=16)
    curves = compared(page)
    assert curves[0].count("L") > 6
    assert curves[1].count("L") == 6
