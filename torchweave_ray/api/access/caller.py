"""Who makes the call that is being answered, for whatever asks on its way.

Without keys everybody is the same caller, who may do everything.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torchweave_ray.api.access.key_file import ApiKey
from torchweave_ray.errors import Forbidden
from torchweave_ray.outputs import GenerateRequest, ModelInfo


@dataclass(frozen=True, slots=True)
class Caller:
    key: ApiKey | None = None

    @property
    def tenant(self) -> str:
        return "" if self.key is None else self.key.tenant

    @property
    def models(self) -> tuple[str, ...] | None:
        """Patterns of those that it may use; None: all."""
        return None if self.key is None else self.key.models

    def may_use(self, model: str) -> bool:
        return self.models is None or any(fnmatchcase(model, name) for name in self.models)

    def check_model(self, model: str) -> None:
        """Raises Forbidden, for models that exist and others alike."""
        if not self.may_use(model):
            raise Forbidden(
                f"this key may not use model {model!r}; it may use: {', '.join(self.models or ())}",
                "model",
                "model_not_allowed",
            )

    def check_operator(self, path: str) -> None:
        """Raises Forbidden: what this does, all tenants feel."""
        if self.key is not None and not self.key.operator:
            raise Forbidden(f"{path} needs an operator's key", None, "operator_only")

    def seen(self, info: ModelInfo) -> ModelInfo:
        """The model as this caller may use it."""
        most = None if self.key is None else self.key.max_context
        if most is None or most >= info.max_model_len:
            return info
        return replace(info, max_model_len=most)

    def stamped(self, request: GenerateRequest) -> GenerateRequest:
        """With tenant and weight; raises Forbidden for a priority above the key's."""
        key = self.key
        if key is None:
            return request
        if request.priority > key.max_priority:
            raise Forbidden(
                f"this key's requests may have a priority of at most {key.max_priority}",
                "priority",
                "priority_not_allowed",
            )
        # A space is in no tenant's name: a group that is called like one is still another.
        group = "" if key.cache_group is None else f"group {key.cache_group}"
        return replace(request, tenant=key.tenant, weight=key.weight, cache_group=group)


ANYBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
