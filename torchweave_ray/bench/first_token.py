"""One process from its start to its first token: a replica without Ray, timed by parts.

`python -m torchweave_ray.bench.first_token ARTIFACT [OPTIONS]` prints one JSON line;
OPTIONS are those of `LLM` as JSON.
"""

from __future__ import annotations

import json
import sys
import time

INPUT_LEN = 100


def main() -> None:
    parts: dict[str, float] = {}
    last = time.perf_counter()

    def done(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[part] = now - last
        last = now

    from torchweave_ray.bench.load.prompts import PromptSource
    from torchweave_ray.llm import LLM
    from torchweave_ray.sampling_params import SamplingParams

    done("imports")
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    llm = LLM(sys.argv[1], **options)
    loaded = time.perf_counter()
    parts |= llm.startup_s
    parts["tokenizer"] = loaded - last - sum(llm.startup_s.values())
    last = loaded
    prompt = PromptSource(INPUT_LEN, time.monotonic_ns()).next_prompt()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    assert isinstance(prompt, str)
    llm.generate(prompt, params)
    done("first_token")
    print(json.dumps(parts), flush=True)


if __name__ == "__main__":
    main()
