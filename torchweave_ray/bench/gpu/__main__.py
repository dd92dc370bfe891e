"""`python -m torchweave_ray.bench.gpu`: correctness, kernels, throughput; JSON lines and a file.

Exits with 1 where a check failed. `--dry-run` runs all of it on a CPU with small sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torchweave_ray.bench.origin import RESULTS, save_results

SECTIONS = ("correctness", "kernels", "throughput")


def main() -> int:
    options = _parse()
    if options.dry_run:
        from torchweave_ray.kernels.triton.interpreter import interpret

        interpret()
    elif not torch.cuda.is_available():
        print("torch sees no GPU; --dry-run runs everything on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for section in options.sections.split(","):
            for line in _run(section, Path(scratch), device):
                lines.append({"section": section, **line})
                print(json.dumps(lines[-1]), flush=True)
    if not options.dry_run:
        from torchweave_ray.bench.gpu.device import device_name

        about = {"device": device_name(device), "sections": options.sections}
        print(save_results("gpu", about, lines, options.results), file=sys.stderr)
    return int(not all(line.get("is_right", True) for line in lines))


def _run(section: str, scratch: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    from torchweave_ray.bench.gpu import correctness, kernels, throughput
    from torchweave_ray.bench.gpu.device import device_name, measure_ceilings
    from torchweave_ray.bench.gpu.random_model import TINY, TINYLLAMA, make_artifact
    from torchweave_ray.bench.gpu.ranks import check_ranks

    is_dry = device.type == "cpu"
    if section == "correctness":
        yield from correctness.check_logits(scratch, device)
        yield from correctness.check_texts(scratch, device)
        yield from check_ranks(scratch, device)
        return
    ceilings = measure_ceilings(device)
    yield {
        "device": device_name(device),
        "gbyte_s": round(ceilings.gbyte_s, 1),
        "tflop_s": round(ceilings.tflop_s, 1),
    }
    if section == "kernels":
        yield from kernels.measure_kernels(device, ceilings)
        return
    artifact = make_artifact(scratch / "model", TINY if is_dry else TINYLLAMA, torch.bfloat16)
    loads = [throughput.Load(2, 12, 4)]
    if not is_dry:
        loads = [throughput.Load(n, 100, 128) for n in (1, 8, 64, 256)]
        loads.append(throughput.Load(256, 512, 128))
    for settings in throughput.SETTINGS:
        yield from throughput.measure_llm(artifact, loads, settings, ceilings)
    yield from throughput.measure_transformers(artifact, loads, device)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchweave_ray.bench.gpu")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small sizes")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of the default's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--scratch", type=Path, help="where models of some GB may lie")
    options = parser.parse_args()
    if unknown := set(options.sections.split(",")) - set(SECTIONS):
        parser.error(f"unknown section {min(unknown)}; known: {', '.join(SECTIONS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
