"""The benchmark's prompts: random English words, and exactly so many tokens where that is possible.

Every word below is one token of SmolLM2's vocabulary (with and without a leading space), so n words
are n tokens there. With a tokenizer file the prompt is cut to n token ids and sent as such.
"""

from __future__ import annotations

import random
from pathlib import Path

_TEXT = """
stand iron read rain rent land value name line view point lease show work clear shape raw
cut face ask data side hour son ware class verse test most file fact issue roll new time
ring hold place load key list light play part order come like pose ground know text hood
head error date right fill term more less just mission print care bit life format water
change comment state year wide start book index works model force user train craft mark
board array cast call field house hand flow level code count icon action vision rest road
object leg box join top process image label map active ball write stream body arrow cell
return sum wood pass normal free long step win group band valid weight post rate check
version scale split west string under position create range expected host main section
request bar status ship table open operation default pace length ports item world color
update phone frame message base page stone real width angle loss target source press content
author comfort fold child draw title edge first soft plant argument example fish oven bridge
quality case medium lights health batch teen pop root save car type search connect property
number fast random token friend column stack charge core bug door wind lower telling lock
project night link graph filter feed chain mail cold math product kind context zone tag
enter green direct bean aware natural regular store sample depth high fire static bell fare
server person address profit role email forward yes service fall true science result
graduate game dated storm home module task bound location front wall entry resource western
option strip worm raid break patch answer river yard ranch angel burn fly rose cost away
learn pool help oil law forms hard screen height white report coin space race success family
tree control equal energy engine school good arts cycle hero channel personal folder seed
card distance speed second plan flies cache plus remove piece match header heat bone rock
hot clean rank master feature heart risk history linear pair center father network building
gender counter sun fiction alpha letter forest black window mid will zero cursor register
week held global sleep stock four proof arms wait five insert shot mouth clip lies mill exit
people third reach shore comb domain mount stage bird kit cluster food written factory
usually mother market figure training stable agent economic factor manager player directory
move thread short volume commit minute area mass beat strong wealth future leading fund
owner rite party star flat urban wave odd positive places safe cross decode cloud three edit
small flower blue reading walk country limit half sky video heads story sea paper winter
ocean moon music travel summer spring yellow orange purple brown gray lake bread milk sugar
salt apple corn wheat rice farm horse dog cat lion castle street north south east
"""
WORDS = tuple(_TEXT.split())


class PromptSource:
    """Distinct prompts from one seed; equal seeds give equal prompts."""

    def __init__(self, num_tokens: int, seed: int, tokenizer: Path | None = None) -> None:
        self._num_tokens = num_tokens
        self._random = random.Random(seed)
        self._encode = None
        if tokenizer is not None:
            from tokenizers import Tokenizer

            self._encode = Tokenizer.from_file(str(tokenizer)).encode

    def next_prompt(self) -> str | list[int]:
        """Text of `num_tokens` words, or with a tokenizer exactly so many token ids."""
        text = " ".join(self._random.choices(WORDS, k=self._num_tokens))
        if self._encode is None:
            return text
        # A word is at least one token, so there are always enough to cut from.
        ids: list[int] = self._encode(text, add_special_tokens=False).ids
        return ids[: self._num_tokens]


def joined(prefix: str | list[int], rest: str | list[int]) -> str | list[int]:
    if isinstance(prefix, str):
        return f"{prefix} {rest}"
    assert isinstance(rest, list), "both from one kind of source"
    return prefix + rest
