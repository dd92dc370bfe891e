"""Which LoRA adapters are loaded, who uses them, and whose turn it is.

A request holds its adapter from its first step to its end, preempted or not. One whose adapter is
not loaded waits in the queue: until a thread has loaded it, or for a place that nobody holds.
Knows no tensors and no files.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

from torchweave_ray.errors import ArtifactError, InvalidRequest, ModelNotFound
from torchweave_ray.outputs import GenerateRequest

ADAPTER = "adapter_id"
"""What a replica that has other content under an adapter's name refuses a request for."""
_WAIT_S = 0.02


class Adapters(Protocol):
    """What the runner can load. An id stands for content: equal ids compute the same."""

    def names(self) -> list[str]: ...

    def find(self, name: str) -> str:
        """The id that a name stands for now. Any thread may call, and may have to wait.

        Raises ModelNotFound or InvalidRequest.
        """
        ...

    def load(self, adapter_id: str) -> None:
        """Of one that was found. From any thread; raises ArtifactError."""
        ...

    def drop(self, adapter_id: str) -> None:
        """Between steps only."""
        ...


@dataclass(slots=True)
class _Place:
    """An adapter that is loaded, or about to be."""

    loading: Future[None] | None
    waiting: set[str]
    """Ids of requests that wait until it is loaded, and of those that hold it."""
    holders: set[str] = field(default_factory=set)


class AdapterPool:
    """`names`, `find` and `check`: from any thread; the rest: where the engine steps."""

    def __init__(self, adapters: Adapters | None = None, max_loaded: int = 0) -> None:
        """None: there are none, and a request that names one is refused."""
        self._adapters = adapters or NoAdapters()
        self._max_loaded = max_loaded
        self._places: OrderedDict[str, _Place] = OrderedDict()
        """By adapter id, the least recently taken first."""
        self._wanted: set[str] = set()
        """Adapters that are to make room: nobody takes them anew in this step."""
        self._loader = ThreadPoolExecutor(1, "adapters")  # no thread before there is work

    def names(self) -> list[str]:
        return self._adapters.names()

    def find(self, name: str) -> str:
        """See `Adapters`."""
        return self._adapters.find(name)

    def check(self, request: GenerateRequest) -> str:
        """The id of a request's adapter, "" for none.

        Raises ModelNotFound, or InvalidRequest: of `adapter_id` where the name stands for other
        content here than the request was made for.
        """
        wanted = request.adapter_id
        if not request.adapter:
            return ""
        if wanted and wanted in self._places:
            return wanted  # its name may stand for another one by now
        found = self._adapters.find(request.adapter)
        if wanted and wanted != found:
            reason = f"adapter {request.adapter!r} is {found} here, not {wanted}"
            raise InvalidRequest(reason, ADAPTER)
        return found

    def begin_step(self) -> list[tuple[str, str]]:
        """Ids of requests that wait in vain, and why."""
        self._wanted.clear()
        failures: list[tuple[str, str]] = []
        for adapter_id, place in list(self._places.items()):
            if place.loading is not None and place.loading.done():
                error = place.loading.exception()
                place.loading = None
                if error is not None:
                    del self._places[adapter_id]
                    failures += [(request_id, _reason(error)) for request_id in place.waiting]
        return failures

    def admit(self, request: GenerateRequest) -> bool:
        """Whether a request may run now; from then on it holds its adapter. Called in the order of
        the queue: whoever waits for a place before others keeps them from taking it again."""
        if not request.adapter:
            return True
        place = self._places.get(request.adapter_id)
        if place is None:
            self._begin_loading(request)
            return False
        if place.loading is not None:
            place.waiting.add(request.request_id)
            return False
        if request.request_id in place.holders:
            return True
        if request.adapter_id in self._wanted:
            return False
        place.holders.add(request.request_id)
        self._places.move_to_end(request.adapter_id)
        return True

    def release(self, request: GenerateRequest) -> None:
        """It is over, whether it ever held its adapter or not."""
        place = self._places.get(request.adapter_id) if request.adapter else None
        if place is not None:
            place.holders.discard(request.request_id)

    def wait(self) -> None:
        """For a moment, if something is being loaded: there is nothing else to do."""
        wait([p.loading for p in self._places.values() if p.loading is not None], _WAIT_S)

    def forget(self) -> None:
        """Let go of all: nobody holds one, and none is being loaded."""
        for adapter_id, place in self._places.items():
            assert place.loading is None, "it is being loaded"
            assert not place.holders, "a request uses it"
            self._adapters.drop(adapter_id)
        self._places.clear()

    def close(self) -> None:
        self._loader.shutdown(wait=False, cancel_futures=True)

    @property
    def is_loading(self) -> bool:
        return any(p.loading is not None for p in self._places.values())

    @property
    def num_loaded(self) -> int:
        return sum(place.loading is None for place in self._places.values())

    def _begin_loading(self, request: GenerateRequest) -> None:
        """If there is a place for it, or one that nobody holds."""
        if len(self._places) >= self._max_loaded:
            ready = (i for i, p in self._places.items() if p.loading is None)
            oldest = next((i for i in ready if i not in self._wanted), None)
            if oldest is None:
                return
            if self._places[oldest].holders:
                self._wanted.add(oldest)
                return
            del self._places[oldest]
            self._adapters.drop(oldest)
        loading = self._loader.submit(self._adapters.load, request.adapter_id)
        self._places[request.adapter_id] = _Place(loading, {request.request_id})


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, ArtifactError) else f"its adapter failed: {error!r}"


class NoAdapters:
    """`Adapters` of a model that is served without any."""

    def names(self) -> list[str]:
        return []

    def find(self, name: str) -> str:
        reason = f"no adapter {name!r}: this model is served without adapters"
        raise ModelNotFound(reason, "model", "model_not_found")

    def load(self, adapter_id: str) -> None:
        raise AssertionError("nothing is found here")

    drop = load
