"""What a request tells the router of its replicas (deployments/router.py); made once for each."""

from __future__ import annotations

from dataclasses import replace

from torchweave_ray.block_hash import prefix_marks, root_hash
from torchweave_ray.outputs import GenerateRequest, ModelInfo, RoutingHint


def with_hint(request: GenerateRequest, info: ModelInfo | None) -> GenerateRequest:
    """`info`: of its model; without it nothing is known of the cache, and only the session counts.

    A microsecond for each 20 tokens of the prompt.
    """
    ids = request.prompt_token_ids
    marks: tuple[tuple[int, bytes], ...] = ()
    if info is not None and not request.exclusive:
        owner = request.cache_group or request.tenant
        root = root_hash(info.artifact_id, owner, request.cache_salt, request.adapter_id)
        marks = prefix_marks(root, ids, info.block_size)
    return replace(request, routing=RoutingHint(len(ids), marks, request.session_id))


def avoiding(request: GenerateRequest, *replicas: str) -> GenerateRequest:
    """The request, to be routed elsewhere where that is possible."""
    assert request.routing is not None, "requests get their hint before they are tried"
    avoid = tuple(dict.fromkeys(replicas))
    return replace(request, routing=replace(request.routing, avoid=avoid))
