"""Text to ids and back: every decoder against the tokenizers library, templates, end tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from tests.tiny import CHAT_TEMPLATE, make_tokenizer
from torchweave_ray.errors import ArtifactError, InvalidRequest
from torchweave_ray.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer

CONFIG = {
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "special": True},
    "chat_template": CHAT_TEMPLATE,
}
BYTE_LEVEL = make_tokenizer()
MESSAGES = [{"role": "user", "content": "What is a star?"}]


def sentencepiece(strip: int) -> tokenizers.Tokenizer:
    """As Llama 2 has it: "▁" for a space, bytes for what the vocabulary lacks."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ("▁", "▁hello", "▁▁", "a", "b", "é", "日", "▁a", ".", "lo", "hel"):
        vocab[piece] = len(vocab)
    bpe = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", strip, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "##c": 3, "d": 4, "!": 5}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    vocab = [("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), ("▁", -1.0), ("▁cd", -1.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    decoder = tokenizer.decoder(skip)
    return "".join([*map(decoder.step, ids), decoder.flush()])


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 320), max_size=40), skip=st.booleans())
def test_byte_level_steps_give_what_the_library_gives_for_the_whole(
    ids: list[int], skip: bool
) -> None:
    """Random ids are mostly broken UTF-8; ids from 300 on do not exist."""
    assert streamed(Tokenizer(BYTE_LEVEL, {}), ids, skip) == BYTE_LEVEL.decode(
        ids, skip_special_tokens=skip
    )


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), strip=st.sampled_from([0, 1]))
def test_byte_fallback_steps_give_what_the_library_gives(text: str, strip: int) -> None:
    backend = sentencepiece(strip)
    ids = backend.encode(text).ids
    assert streamed(Tokenizer(backend, {}), ids, True) == backend.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 275), max_size=30))
def test_byte_fallback_with_broken_bytes_keeps_what_was_right(ids: list[int]) -> None:
    tokenizer = Tokenizer(sentencepiece(0), {})
    raw = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert streamed(tokenizer, ids, False) == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("backend", [wordpiece(), metaspace()])
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 5), max_size=20), skip=st.booleans())
def test_other_decoders_go_by_the_piece_before(
    backend: tokenizers.Tokenizer, ids: list[int], skip: bool
) -> None:
    expected = backend.decode(ids, skip_special_tokens=skip)
    assert streamed(Tokenizer(backend, {}), ids, skip) == expected


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, {})
    ids = [i for char in "€" for i in tokenizer.encode(char)]
    decoder = tokenizer.decoder(True)
    assert [decoder.step(i) for i in ids] == ["", "", "€"]
    assert [decoder.step(i) for i in ids[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, {})
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_token_bytes_are_exact() -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, {})
    ids = tokenizer.encode("naïve 你好<|im_end|>")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "naïve 你好<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""
    assert Tokenizer(wordpiece(), {}).token_bytes(4) == b"d"


def test_a_lone_surrogate_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequest):
        Tokenizer(BYTE_LEVEL, {}).encode("a\ud800")


def test_the_rendered_chat_is_transformers_own(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE + "{{ bos_token }}{{ eos_token }}{{ extra }}",
    )
    config = {**CONFIG, "chat_template": theirs.chat_template}
    ours = Tokenizer(make_tokenizer(), config)
    for prompt in (True, False):
        assert ours.render_chat(
            MESSAGES, add_generation_prompt=prompt, extra="!"
        ) == theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt, extra="!"
        )


def test_a_rendered_chat_gets_no_second_bos() -> None:
    backend = make_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", None, [("<|im_start|>", 1)]
    )
    tokenizer = Tokenizer(backend, CONFIG)
    chat = tokenizer.render_chat(MESSAGES)
    assert tokenizer.encode(chat, add_special_tokens=False)[:2] != [1, 1]
    assert tokenizer.encode("x")[0] == 1


def test_add_bos_token_counts_when_the_post_processor_has_none() -> None:
    tokenizer = Tokenizer(make_tokenizer(), {**CONFIG, "add_bos_token": True})
    assert tokenizer.encode("x")[0] == 1
    assert tokenizer.encode("x", add_special_tokens=False)[0] != 1
    assert tokenizer.encode("<|im_start|>x").count(1) == 1


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('roles must alternate') }}", "{{ messages[7]['content'] + 1 }}"],
)
def test_a_template_that_refuses_is_a_bad_request(template: str | None) -> None:
    tokenizer = Tokenizer(make_tokenizer(), {"chat_template": template})
    assert tokenizer.has_chat_template is (template is not None)
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.render_chat(MESSAGES)
    assert caught.value.param == "messages"


def test_of_several_templates_the_default_is_used() -> None:
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    assert Tokenizer(make_tokenizer(), {"chat_template": templates}).render_chat(MESSAGES) == "yes"


@pytest.mark.parametrize(
    ("model", "generation", "eos"),
    [
        ({}, {}, (2,)),
        ({"eos_token_id": 0}, {}, (0, 2)),
        ({"eos_token_id": 0}, {"eos_token_id": [2, 5]}, (2, 5)),
    ],
)
def test_end_tokens(
    model: dict[str, object], generation: dict[str, object], eos: tuple[int, ...]
) -> None:
    contents = (json.loads(BYTE_LEVEL.to_str()), CONFIG, model, generation)
    files = {n: json.dumps(c).encode() for n, c in zip(TOKENIZER_FILES, contents, strict=True)}
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.eos_token_ids == eos
    assert tokenizer.vocab_size == 300


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    assert load_tokenizer(tmp_path).decode([0]) == ""


def test_rendering_loads_no_torch_and_tokenising_no_transformers(tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    code = (
        "import sys; from pathlib import Path; from torchweave_ray.tokenizer import load_tokenizer;"
        "t = load_tokenizer(Path(sys.argv[1])); t.decode(t.encode('a star'));"
        "print('transformers' in sys.modules, end=' '); t.warm();"
        "t.render_chat([{'role': 'user', 'content': 'x'}]); print('torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert ran.stdout.split() == ["False", "False"], ran.stderr


def test_a_file_that_makes_the_library_panic_is_refused() -> None:
    values = json.loads(make_tokenizer().to_str())
    values["model"]["continuing_subword_prefix"] = "longer than any token"
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        Tokenizer.from_files({"tokenizer.json": json.dumps(values).encode()})
