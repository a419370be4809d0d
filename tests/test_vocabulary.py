"""Tokenizers that cannot be used: each is refused in one line, when it is opened."""

from pathlib import Path

import pytest

from jaxspd.components.tokenizer import check_vocabulary, open_tokenizer
from jaxspd.errors import UsageError
from tests import vocabularies
from tests.tiny.common import change_json
from tests.vocabularies import TINY, write_tiny


@pytest.fixture
def tiny(tmp_path):
    """Writes a tiny tokenizer as pipelines do; returns its folder."""
    return lambda name: write_tiny(tmp_path, name)


@pytest.mark.parametrize("name", ["clip", "t5", "qwen", "mistral"])
def test_no_vocabulary(tiny, name):
    folder = tiny(name)
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(UsageError, match=f"{name} has no vocabulary .*download the folder again"):
        open_tokenizer(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_pair_of_vocabulary_files(tmp_path, name):
    TINY["clip"](tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        open_tokenizer(tmp_path)


def test_a_truncated_list_of_merges(tmp_path):
    """As many words as real vocabularies have, so that merges can be counted."""
    words = [chr(0x4E00 + n) for n in range(900)]
    merges = [f"{a} {b}" for a in words[:50] for b in words[:40]]
    pieces = {piece: n for n, piece in enumerate([*words, *(m.replace(" ", "") for m in merges), *"abc"])}
    vocabularies.write_bpe(tmp_path, pieces, merges, tokenizer_class="Qwen2Tokenizer")
    assert open_tokenizer(tmp_path).size - 1 == 2903  # with the end of a text, which the vocabulary lacks
    vocabularies.write_bpe(tmp_path, pieces, merges[:1800], tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(UsageError, match=r"merges.txt is too short for vocab.json"):
        open_tokenizer(tmp_path)


def test_a_merge_of_one_piece(tmp_path):
    TINY["clip"](tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nth\n")
    with pytest.raises(UsageError, match=r"merges.txt holds 'th' where two pieces belong"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["clip", "t5", "qwen", "mistral"])
def test_a_truncated_tokenizer(tiny, name):
    path = tiny(name) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UsageError, match=r"tokenizer.json is no valid JSON; download"):
        open_tokenizer(path.parent)


WORDLESS = ["[]", "{}", '{"a": "1"}', "[1]", '[["a"]]', "null"]


@pytest.mark.parametrize("name", ["t5", "qwen", "mistral"])
@pytest.mark.parametrize(
    "content", ["{}", '{"model": 1}', *(f'{{"model": {{"vocab": {v}}}}}' for v in WORDLESS)]
)
def test_a_tokenizer_of_no_words(tiny, name, content):
    folder = tiny(name)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match=r"tokenizer.json holds no vocabulary"):
        open_tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"\x0a\xff damaged", b"<html></html>"])
def test_a_damaged_sentencepiece_model(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UsageError, match=r"spiece.model is damaged"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_to_which_all_letters_are_alike(tmp_path):
    vocabularies.write_bpe(tmp_path, {"0": 0, "1": 1}, [], tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(UsageError, match="tells no letters apart"):
        open_tokenizer(tmp_path)


WRONG = [
    {"model_max_length": "x"},
    {"pad_token": None},
    {"pad_token": 3},
    {"eos_token": [3]},
    {"padding_side": "top"},
    {"truncation_side": None},
    {"added_tokens_decoder": {"x": {"content": "<a>"}}},
    {"added_tokens_decoder": {"1": {"text": "<a>"}}},
    {"added_tokens_decoder": [1]},
    {"extra_special_tokens": [3]},
    {"extra_special_tokens": "abc"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("name", ["clip", "t5", "qwen"])
def test_a_wrong_configuration(tiny, name, wrong):
    folder = tiny(name)
    change_json(folder / "tokenizer_config.json", **wrong)
    with pytest.raises(UsageError, match=rf"{name} cannot be loaded \(.+\); download it again") as refusal:
        open_tokenizer(folder)
    assert "\n" not in str(refusal.value)


def test_a_class_without_the_file_that_it_needs(tmp_path):
    TINY["qwen"](tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    with pytest.raises(UsageError, match=r"a LlamaTokenizerFast needs a tokenizer.json"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["clip", "t5", "qwen", "mistral"])
def test_a_tokenizer_of_another_model(tiny, name):
    folder = tiny(name)
    tokenizer = open_tokenizer(folder)
    size = tokenizer.size
    check_vocabulary(tokenizer, size, Path("encoder"))
    check_vocabulary(tokenizer, None, Path("encoder"))
    with pytest.raises(UsageError) as refusal:
        check_vocabulary(tokenizer, size - 1, Path("encoder"))
    limits = f"tokens up to {size - 1}, and encoder a table of {size - 1}"
    assert str(refusal.value) == f"{folder} has {limits}; they do not belong together"
