"""What one process says of its metrics: the form in which they travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # a GPU box may have none
    from prometheus_client.metrics_core import Metric

Reported: TypeAlias = "tuple[Mapping[str, str], Sequence[Metric]]"
"""The labels that tell the process from the others, and its families."""
