"""What calls come to: tokens of each as they come, charged to its key, counted by tenant, logged.

Twice a second what is open is noted too, so that a process that dies takes little of it along.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from torchweave_ray.api.access.caller import Caller
from torchweave_ray.api.access.quota import Accounts
from torchweave_ray.api.access.usage_log import UsageLog
from torchweave_ray.errors import RequestError
from torchweave_ray.metrics import MetricSet
from torchweave_ray.outputs import GenerateRequest, RequestOutput

if TYPE_CHECKING:
    from torchweave_ray.api.endpoint import Call

Outputs = AsyncGenerator[tuple[int, RequestOutput]]
NOTE_S = 0.5
"""So that a process which is killed takes less than a second of it along, delays included."""
MAX_TENANTS = 200
"""Labels of metrics; those of further tenants are counted together."""
OTHERS = "other"
KINDS = ("prompt", "cached", "completion")


class Usage:
    """Of one process."""

    def __init__(self, accounts: Accounts, metrics: MetricSet, log: UsageLog | None) -> None:
        self._accounts = accounts
        self._log = log
        self._open: set[Spending] = set()
        self._noting: asyncio.Task[None] | None = None
        self._tenants: set[str] = set()
        self._requests = metrics.counter("tenant_requests", "Calls that ended", "tenant", "outcome")
        self._tokens = metrics.counter("tenant_tokens", "Tokens of calls", "tenant", "kind")

    def metered(
        self, call: Call, caller: Caller, requests: Sequence[GenerateRequest], outputs: Outputs
    ) -> Outputs:
        """The outputs themselves where nobody asks what they come to."""
        if caller.key is None and self._log is None:
            return outputs
        return self._metered(Spending(call, caller, requests, self._accounts), outputs)

    async def _metered(self, spending: Spending, outputs: Outputs) -> Outputs:
        await spending.reserve()
        self._open.add(spending)
        if self._noting is None or self._noting.done():
            self._noting = asyncio.create_task(self._note_open())
        outcome = "left"
        try:
            async with aclosing(outputs):
                async for index, output in outputs:
                    spending.add(output)
                    yield index, output
            outcome = "completed"
        except RequestError as error:
            outcome = "failed" if spending.has_begun else "refused"
            if not spending.has_begun and error.status in (429, 503):
                spending.forget_prompt()
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._open.discard(spending)
            spending.settle()
            self._note(spending, outcome)

    async def _note_open(self) -> None:
        while self._open:
            await asyncio.sleep(NOTE_S)
            for spending in self._open:
                self._note(spending, None)
            if self._log is not None:
                await asyncio.to_thread(self._log.sync)

    def _note(self, spending: Spending, outcome: str | None) -> None:
        """Tokens since the last time; `outcome`: how the call ended, None: it is open."""
        tokens = spending.take()
        tenant = spending.tenant
        if tenant:
            if tenant not in self._tenants and len(self._tenants) >= MAX_TENANTS:
                tenant = OTHERS
            self._tenants.add(tenant)
            for kind, number in tokens.items():
                self._tokens.labels(tenant, kind).inc(number)
            if outcome is not None:
                self._requests.labels(tenant, outcome).inc()
        if self._log is not None and (outcome is not None or any(tokens.values())):
            self._log.write(spending.line(tokens, outcome))


class Spending:
    """One call's."""

    def __init__(
        self, call: Call, caller: Caller, requests: Sequence[GenerateRequest], accounts: Accounts
    ) -> None:
        self.tenant = caller.tenant
        self.has_begun = False
        self._call = call
        self._key = caller.key
        self._model = requests[0].model
        self._accounts = accounts
        self._tokens = dict.fromkeys(KINDS, 0)
        self._taken = dict.fromkeys(KINDS, 0)
        self._tokens["prompt"] = sum(len(r.prompt_token_ids) for r in requests)
        self._num_reserved = sum((r.sampling.max_tokens or 0) * r.n for r in requests)

    async def reserve(self) -> None:
        """Prompts, and outputs as far as the call bounds them; raises RateLimited."""
        if self._key is not None:
            num_tokens = self._tokens["prompt"] + self._num_reserved
            await self._accounts.take_tokens(self._key, num_tokens)

    def add(self, output: RequestOutput) -> None:
        self.has_begun = True
        num_tokens = sum(len(delta.token_ids) for delta in output.deltas)
        self._tokens["completion"] += num_tokens
        if output.usage is not None:
            self._tokens["cached"] += output.usage.cached_tokens
        self._num_reserved -= num_tokens
        if self._num_reserved < 0:
            self._spend(-self._num_reserved)
            self._num_reserved = 0

    def forget_prompt(self) -> None:
        """The call was refused: nothing was computed."""
        self._spend(-self._tokens["prompt"])
        self._tokens["prompt"] = 0

    def settle(self) -> None:
        """What was reserved and not needed is given back."""
        self._spend(-self._num_reserved)
        self._num_reserved = 0

    def take(self) -> dict[str, int]:
        """Tokens by kind since the last time; a prompt counts from the first output on, and when
        its client leaves before that."""
        tokens = {kind: self._tokens[kind] - self._taken[kind] for kind in KINDS}
        self._taken = dict(self._tokens)
        return tokens

    def line(self, tokens: dict[str, int], outcome: str | None) -> dict[str, Any]:
        key = self._key
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self._call.request_id,
            "tenant": self.tenant,
            "key": "" if key is None else key.id,
            "model": self._model,
            "path": self._call.path,
            **{f"{kind}_tokens": number for kind, number in tokens.items()},
        }
        if outcome is not None:
            line["outcome"] = outcome
            line["seconds"] = round(time.monotonic() - self._call.started_at, 3)
        return line

    def _spend(self, num_tokens: int) -> None:
        if self._key is not None and num_tokens:
            self._accounts.spend_tokens(self._key, num_tokens)
