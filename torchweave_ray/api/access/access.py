"""What guards and counts the calls of one process, as its settings say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchweave_ray.api.access.keyring import Keyring
from torchweave_ray.api.access.quota import Accounts, LocalAccounts
from torchweave_ray.api.access.usage_log import UsageLog
from torchweave_ray.api.settings import ApiSettings


@dataclass(frozen=True, slots=True)
class Access:
    keyring: Keyring | None = None
    """None: everybody who reaches the server may use it."""
    accounts: Accounts = field(default_factory=LocalAccounts)
    usage_log: UsageLog | None = None


def access_of(settings: ApiSettings, accounts: Accounts | None = None) -> Access:
    """Raises ConfigError for a keys file, or a folder of the usage log, that cannot be used."""
    return Access(
        Keyring(Path(settings.keys_file)) if settings.keys_file else None,
        accounts or LocalAccounts(),
        UsageLog(Path(settings.usage_log), settings.usage_log_max_bytes)
        if settings.usage_log
        else None,
    )
