"""What adapters add to the products: PEFT's logits in fp32, the native executor's own bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES
from tests.kernels.native import FORMATS, NativeDecoder
from tests.lora.adapters import ATTENTION, MLP, fitted, make_adapter
from tests.parity.families.test_families import reference
from tests.parity.paged import PagedDecoder, Text, assert_close, random_texts
from tests.tiny import make_checkpoint, make_tiny_artifact
from torchweave_ray.errors import ArtifactError
from torchweave_ray.kernels.library import KernelsUnavailable, Library, load_library

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "gemma2": FAMILIES["gemma2"],
    "phi3": FAMILIES["phi3"],
}
PEFT: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["k_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 7, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"k_proj": 3},
    },
}


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PEFT)
@torch.inference_mode()
def test_logits_are_those_of_peft(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **MODELS["llama"])
    model = peft.get_peft_model(reference(checkpoint), peft.LoraConfig(**PEFT[name]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    artifact = make_tiny_artifact(tmp_path / "artifact", **MODELS["llama"])
    decoder = PagedDecoder(artifact)
    loaded = decoder.executor.load_adapter(fitted(tmp_path / "adapter", artifact))
    one, two = random_texts(70, 41)
    plain, changed = decoder.step([(Text(two), 41), (Text(one), 70)], [loaded])
    assert_close(changed, model(torch.tensor([one])).logits[0])
    with model.disable_adapter():
        assert_close(plain, model(torch.tensor([two])).logits[0])
        without = model(torch.tensor([one])).logits[0]
    assert (changed - without).abs().max() > 0.1 * without.std()


@pytest.mark.parametrize(
    ("name", "formats"),
    [("llama", None), ("llama", "int8"), ("llama", "mixed"), ("gemma2", "int4"), ("phi3", "int4")],
)
def test_adapters_mixed_in_one_batch_equal_each_alone(
    tmp_path: Path, library: Library, name: str, formats: str | None
) -> None:
    """To the bit, on any number of threads, the rows without one equal to a model without any."""
    artifact = make_tiny_artifact(tmp_path / "artifact", dtype=torch.bfloat16, **MODELS[name])
    fused = name == "phi3"
    attention = ("qkv_proj", "o_proj") if fused else ATTENTION
    both = (*attention, *(("gate_up_proj", "down_proj") if fused else MLP))
    folders = [
        make_adapter(tmp_path / "a", artifact, both, rank=4),
        make_adapter(tmp_path / "b", artifact, attention[:1], rank=3, seed=1),
        make_adapter(tmp_path / "c", artifact, both, rank=40, seed=2),
    ]
    texts = random_texts(33, 60, 1, 70, 50)
    fits = [fitted(folder, artifact) for folder in folders]
    order = [None, 0, 0, 1, 2]

    def decoder(threads: int) -> tuple[NativeDecoder, list[Any]]:
        made = NativeDecoder(
            artifact, library, threads, formats=FORMATS[formats] if formats else None
        )
        return made, [made.executor.load_adapter(each) for each in fits]

    alone, loaded = decoder(1)
    expected = []
    for text, which in zip(texts, order, strict=True):
        sequence = Text(text)
        adapters = [] if which is None else [loaded[which]]
        expected.append(torch.cat([alone.step([(sequence, 1)], adapters)[0] for _ in text]))
    for threads in (1, 3):
        crowd, loaded = decoder(threads)
        adapters = [loaded[which] for which in order if which is not None]
        together = crowd.step([(Text(text), len(text)) for text in texts], adapters)
        for got, wanted in zip(together, expected, strict=True):
            assert torch.equal(got, wanted)
    without, _ = decoder(2)
    changed = without.step([(Text(texts[3]), len(texts[3]))])[0]
    assert not torch.equal(changed, expected[3])


def test_native_logits_are_those_of_the_torch_executor(tmp_path: Path, library: Library) -> None:
    artifact = make_tiny_artifact(tmp_path / "artifact", dtype=torch.bfloat16)
    fit = fitted(make_adapter(tmp_path / "a", artifact, rank=8), artifact)
    decoders = [
        PagedDecoder(artifact),
        NativeDecoder(artifact, library),
        PagedDecoder(artifact, dtype=torch.bfloat16),
    ]
    (text,) = random_texts(90)
    exact, native, rounded = (
        each.step([(Text(text), 90)], [each.executor.load_adapter(fit)])[0] for each in decoders
    )
    bar = max((rounded - exact).square().mean().sqrt(), 0.03 * exact.std())
    assert (native - exact).square().mean().sqrt() < bar


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    other = make_checkpoint(tmp_path / "other", intermediate_size=96)
    experts = make_checkpoint(tmp_path / "experts", **FAMILIES["qwen3-moe"])
    wide = make_adapter(tmp_path / "wide", other, MLP)
    with pytest.raises(ArtifactError, match=r"it changes model\.layers\.0\.mlp.*of \[96, 64\]"):
        fitted(wide, model)
    routed = make_adapter(tmp_path / "routed", experts, ("gate_proj",))
    with pytest.raises(ArtifactError, match=r"it changes .*experts.*only the products of"):
        fitted(routed, experts)
