"""Grammars of requests, checked before an engine hears of them: a checker for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torchweave_ray.api.grammar import Wanted
from torchweave_ray.errors import InvalidRequest
from torchweave_ray.outputs import GenerateRequest, ModelInfo
from torchweave_ray.tokenizer import Tokenizer
from torchweave_ray.tokenizer.grammar_check import GrammarChecker


class GrammarChecks:
    def __init__(self) -> None:
        self._checkers: dict[str, tuple[str, GrammarChecker]] = {}

    async def constrain(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        wanted: Wanted | None,
        requests: Sequence[GenerateRequest],
    ) -> list[GenerateRequest]:
        """The requests with the grammar that is wanted; raises InvalidRequest naming its field."""
        if wanted is None:
            return list(requests)
        try:
            grammar = await self._checker(info, tokenizer).check(wanted.spec)
        except InvalidRequest as error:
            message = f"{wanted.param}: {error.message}"
            raise InvalidRequest(message, wanted.param, "invalid_grammar") from None
        return [replace(request, grammar=grammar) for request in requests]

    def close(self) -> None:
        for _, checker in self._checkers.values():
            checker.close()

    def _checker(self, info: ModelInfo, tokenizer: Tokenizer) -> GrammarChecker:
        artifact_id, checker = self._checkers.get(info.base, ("", None))
        if checker is None or artifact_id != info.artifact_id:
            if checker is not None:
                checker.close()
            checker = GrammarChecker(tokenizer.to_json(), info.vocab_size, info.eos_token_ids)
            self._checkers[info.base] = (info.artifact_id, checker)
        return checker
