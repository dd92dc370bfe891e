"""What rounding to nearest and GPTQ cost in quality, on real weights whose source has no codes.

Backs the table of docs/optimizer.md: `quantization_quality.py SOURCE WORK [--save]`, SOURCE a GGUF
file or a checkpoint's folder. SmolLM2's file holds 4-bit codes, on which 4 bits lose nothing: so
`unfold` first rewrites the model as another with the same function and other weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from optimizer.checkpoints import open_checkpoint
from optimizer.pipeline import optimize
from optimizer.quantization import INT4, INT8, Quantization
from optimizer.recipe import Bars, Recipe
from torchweave_ray.bench.origin import save_results
from torchweave_ray.models.artifact import read_report

LOOSE = Bars(max_kl=10.0, min_top1=0.0, max_perplexity_ratio=10.0)
NORMS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)


def unfold(source: Path, folder: Path) -> None:
    """A bfloat16 checkpoint in which norms are folded into the products that read them, and random
    scales of channels (deviation 20 %) move from up to down and from v to o."""
    checkpoint = open_checkpoint(source)
    documents = checkpoint.documents()
    folder.mkdir(parents=True)
    for name, document in documents.items():
        (folder / name).write_bytes(document)
    config = json.loads(documents["config.json"])
    tensors = {name: checkpoint.load(name).float() for name in checkpoint.tensors}
    repeats = config["num_attention_heads"] // config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm, readers in NORMS:
            scale = tensors[f"{prefix}.{norm}.weight"]
            for reader in readers:
                tensors[f"{prefix}.{reader}.weight"] *= scale
            tensors[f"{prefix}.{norm}.weight"] = torch.ones_like(scale)
        _move(tensors, f"{prefix}.mlp.up_proj", f"{prefix}.mlp.down_proj", 1, 1, generator)
        value, out = f"{prefix}.self_attn.v_proj", f"{prefix}.self_attn.o_proj"
        _move(tensors, value, out, repeats, config["num_key_value_heads"], generator)
    bf16 = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(bf16, folder / "model.safetensors", metadata={"format": "pt"})


def _move(
    tensors: dict[str, Tensor],
    rows: str,
    columns: str,
    repeats: int,
    heads: int,
    generator: torch.Generator,
) -> None:
    """The rows' outputs are multiplied, the columns that read them divided; heads repeat."""
    first, second = tensors[f"{rows}.weight"], tensors[f"{columns}.weight"]
    scale = torch.exp(0.2 * torch.randn(first.shape[0], generator=generator))
    first *= scale[:, None]
    second /= scale.view(heads, -1).repeat_interleave(repeats, dim=0).flatten()


def measure(source: Path, name: str, quantization: Quantization, work: Path) -> dict[str, Any]:
    recipe = Recipe(name, str(source), quantization=quantization, bars=LOOSE, tuning_budget_s=0)
    report = read_report(optimize(recipe, work / "store"))
    quality = report["quality"]
    errors = report["quantization"].get("layers", {}).get("output_errors", {}).values()
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    return {
        "name": name,
        "quantization": quantization.canonical(),
        "kl": quality["kl"],
        "top1": quality["top1"],
        "perplexity": quality["perplexity"],
        "reference_perplexity": quality["reference_perplexity"],
        "quantize_s": seconds["quantize"],
        "mean_output_error": {
            method: round(sum(error[method] for error in errors) / len(errors), 6)
            for method in ("gptq", "rtn")
            if errors
        },
    }


def main() -> None:
    source, work = map(Path, sys.argv[1:3])
    plain = work / "bf16-source"
    if not plain.exists():
        unfold(source, plain)
    points = []
    for kind, quantization in (("int8", INT8), ("int4", INT4)):
        for method in ("rtn", "gptq"):
            asked = Quantization(quantization.layers, quantization.head, method=method)
            points.append(measure(plain, f"{kind}-{method}", asked, work))
            print(points[-1], flush=True)
    if "--save" in sys.argv:
        model = {"model": "SmolLM2-135M-Instruct"}
        print(save_results("quantization-quality", model, points))


if __name__ == "__main__":
    main()
