"""The kernels for every instruction set of this machine, on one and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchweave_ray.kernels.library import (
    ISA_VARIABLE,
    ISAS,
    KernelsUnavailable,
    Library,
    load_library,
)
from torchweave_ray.kernels.ops import NativeOps


@pytest.fixture(params=list(ISAS))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    try:
        best = load_library().isa
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    if ISAS[request.param] > ISAS[best]:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return load_library()


@pytest.fixture
def ops(library: Library) -> Iterator[NativeOps]:
    team = library.create_team(2)
    yield NativeOps(team)
    team.close()


@pytest.fixture
def one_thread(library: Library) -> Iterator[NativeOps]:
    team = library.create_team(1)
    yield NativeOps(team)
    team.close()
