"""The artifact's format: the optimizer writes it, replicas read it, neither imports the other.

`manifest.py` says what an artifact is and `checks.py` whether a folder is one; `leases.py` keeps
one that is in use from being deleted. `docs/optimizer.md` has the layout of the folder.
"""

from torchweave_ray.models.artifact.checks import (
    MANIFEST_SCHEMA,
    complete_artifact,
    read_manifest,
    read_report,
    verify_artifact,
    write_report,
)
from torchweave_ray.models.artifact.leases import Lease, claim_artifact, hold_artifact
from torchweave_ray.models.artifact.manifest import (
    CONFIG,
    FORMAT_VERSION,
    GENERATION_CONFIG,
    MANIFEST,
    REPORT,
    SEAL,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Manifest,
    file_sha256,
)

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "GENERATION_CONFIG",
    "MANIFEST",
    "MANIFEST_SCHEMA",
    "REPORT",
    "SEAL",
    "TOKENIZER",
    "TOKENIZER_CONFIG",
    "WEIGHTS",
    "Lease",
    "Manifest",
    "claim_artifact",
    "complete_artifact",
    "file_sha256",
    "hold_artifact",
    "read_manifest",
    "read_report",
    "verify_artifact",
    "write_report",
]
