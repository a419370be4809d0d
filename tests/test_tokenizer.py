"""Tokenizers without PyTorch and transformers: their ids are transformers', and the real tokenizers'."""

import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer, CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

from jaxspd.components.tokenizer import open_tokenizer
from jaxspd.families.qwen_image import TEMPLATE, TEMPLATE_TOKENS
from tests import vocabularies
from tests.tiny.common import QWEN_CHAT, change_json
from tests.vocabularies import TINY, write_tiny

DEMO = Path(__file__).parents[1] / "jaxspd" / "demo" / "checkpoint"
PROMPT = "A Snowy mountain lake's  shore, 35mm é"

# What prompts may hold: signs that join, combine, fold, or are no signs; every kind of white space.
JOINED = [
    "👩\u200d👩\u200d👧",
    "👍🏽",
    "🇩🇪",
    "❤️",
    "e\u0301",
    "n\u0303o",
    "カ゛",
    "हिन्दी",
    "ไทย",
    "한국어",
    "각",
]
FOLDED = [
    "“x”",
    "İstanbul",
    "ǆ",
    "ﬁ",
    "Ⅷ",
    "½",
    "①",
    "ｶﾞ",
    "ς",
    "ё",
    "I'LL",
    "lake's",
    "foo—bar",
    "3.14",
    "日本語",
]
ODD = [
    *"\0\1\x1b\x7f\ufffd\ufeff\u200b\u00ad\ue000\ufdd0\U0010ffff\U00020000",
    "▁",
    "Ġ",
    "</w>",
    "<0x41>",
    "</S>",
]
SPACES = " \t\n\r\v\f\x1c\x85\u00a0\u1680\u2009\u2028\u3000"
RANGES = ((0x20, 0x7F), (0, 0x20), (0x80, 0x600), (0x600, 0x1200), (0x2000, 0x2C00), (0x3000, 0xA000))
RANGES += ((0xAC00, 0xD7A4), (0xF900, 0x10000), (0x1D400, 0x1D800), (0x1F000, 0x1FB00), (0xE0000, 0xE0080))


def texts(special: list[str], count: int = 300) -> list[str]:
    """Texts at random, with what reads as special tokens written into them."""
    draw = random.Random(0)

    def part() -> str:
        start, end = draw.choice(RANGES)
        letters = "".join(chr(draw.randrange(start, end)) for _ in range(draw.randint(1, 4)))
        spaces = "".join(draw.choices(SPACES, k=draw.randint(0, 3)))
        return draw.choice([draw.choice(JOINED + FOLDED + ODD), draw.choice(special), letters]) + spaces

    return [
        "",
        " ",
        "\n",
        "a ",
        " a",
        *("".join(part() for _ in range(draw.randint(0, 9))) for _ in range(count)),
    ]


def assert_as_transformers(folder: Path, tokenizer_class: type) -> None:
    """The same ids and masks for any text, filled up and cut on either side."""
    ours, theirs = open_tokenizer(folder), tokenizer_class.from_pretrained(folder)
    assert ours.size == max(theirs.get_vocab().values()) + 1
    given = texts([*theirs.added_tokens_encoder, *(t.upper() for t in theirs.all_special_tokens)])
    for length, special, side in ((40, True, None), (6, True, "left"), (5, False, "right"), (7, False, None)):
        ids, mask = ours.encode(given, length, special=special, side=side)
        expected = theirs(
            given,
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=special,
            padding_side=side,
        )
        assert ids.tolist() == expected.input_ids
        assert mask.tolist() == expected.attention_mask


CLASSES = {"clip": CLIPTokenizer, "t5": T5TokenizerFast, "qwen": Qwen2Tokenizer, "mistral": AutoTokenizer}


@pytest.fixture
def tiny(tmp_path):
    """Writes a tiny tokenizer as pipelines do; returns its folder."""
    return lambda name: write_tiny(tmp_path, name)


@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_transformers(tiny, name):
    assert_as_transformers(tiny(name), CLASSES[name])


@pytest.mark.parametrize(
    ("part", "tokenizer_class"), [("tokenizer", CLIPTokenizer), ("tokenizer_2", T5TokenizerFast)]
)
def test_ids_of_the_demos_checkpoint(part, tokenizer_class):
    assert_as_transformers(DEMO / part, tokenizer_class)


@pytest.mark.parametrize("name", ["clip", "qwen"])
def test_ids_of_vocabulary_and_merges_alone(tmp_path, name):
    TINY[name](tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert_as_transformers(tmp_path, CLASSES[name])


CONFIGURED = {
    "left": {"padding_side": "left", "truncation_side": "left"},
    "ends": {"add_bos_token": True, "add_eos_token": True, "bos_token": "th"},
    "prefix": {"add_prefix_space": True},
    "split": {"split_special_tokens": True},
    "named": {"image_token": "<image>", "extra_special_tokens": {"video_token": "<video>"}},
    "extra": {
        "additional_special_tokens": ["<b>", {"__type": "AddedToken", "content": "<c>", "rstrip": True}]
    },
    "listed": {
        "pad_token": "<pad>",
        "added_tokens_decoder": {
            "7": {"content": "<x>", "lstrip": True, "rstrip": True, "special": False},
            "5": {"content": "<pad>", "normalized": True, "special": False},
            "6": {"content": "word", "single_word": True},
        },
    },
}


@pytest.mark.parametrize("values", CONFIGURED.values(), ids=CONFIGURED)
@pytest.mark.parametrize("name", ["clip", "qwen"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_configuration_counts_as_in_transformers(tmp_path, tiny, name, whole, values):
    folder = tiny(name) if whole else tmp_path
    if not whole:
        TINY[name](folder)
        (folder / "tokenizer_config.json").write_text("{}")
    change_json(folder / "tokenizer_config.json", **values, tokenizer_class=CLASSES[name].__name__)
    assert_as_transformers(folder, CLASSES[name])


def test_the_configuration_of_a_tokenizer_that_is_what_its_file_says(tiny):
    folder = tiny("mistral")
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    whole["padding"] |= {"pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}
    whole["truncation"] = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "image_token": "[IMG]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert_as_transformers(folder, AutoTokenizer)
    assert open_tokenizer(folder).padding_side == "left"


@pytest.mark.parametrize("name", ["clip", "qwen"])
def test_the_files_of_older_releases(tmp_path, name):
    """Which named special tokens and numbered added ones in files of their own."""
    TINY[name](tmp_path)
    named = {"eos_token": {"content": "<end>", "lstrip": True, "rstrip": False}, "pad_token": "<p>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<late>": 901, "<early>": 900, "<p>": 902}))
    (tmp_path / "tokenizer_config.json").write_text('{"extra_special_tokens": ["<late>"]}')
    assert_as_transformers(tmp_path, CLASSES[name])


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A SentencePiece model that folds text as T5's does, and marks as T5's its first three pieces."""
    path = tmp_path_factory.mktemp("spiece") / "spiece"
    lines = [
        f"the {a} lake in the {b} ½ snow" for a in ("cold", "wide", "blue") for b in ("high", "old", "far")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3),
        model_prefix=str(path),
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["<mark>"],
        minloglevel=2,
    )
    return path.with_suffix(".model")


@pytest.mark.parametrize(
    "config", [{}, {"extra_ids": 4}, {"extra_ids": 0, "additional_special_tokens": ["<b>"]}]
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_sentencepiece_model(tmp_path, spiece, config, whole):
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    change = {"tokenizer_class": "T5Tokenizer", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(change))
    folder = tmp_path
    if whole:  # which then holds how text is folded
        folder = tmp_path / "whole"
        T5TokenizerFast.from_pretrained(tmp_path).save_pretrained(folder)
    assert_as_transformers(folder, T5TokenizerFast)
    backend = open_tokenizer(folder).backend
    assert backend.encode("ｌａｋｅ ﬁ").tokens == backend.encode("lake fi").tokens


# The real tokenizers.


def test_clips_own_ids(tmp_path):
    tokenizer = open_tokenizer(vocabularies.write_clip(tmp_path))
    ids, mask = tokenizer.encode([PROMPT], 77)
    inside = [320, 14191, 3965, 2553, 568, 5928, 267, 274, 276, 2848, 4166]
    assert ids.tolist() == [[49406, *inside, 49407] + [49407] * 64]
    assert mask.tolist() == [[1] * 13 + [0] * 64]
    assert tokenizer.encode([PROMPT], 6)[0].tolist() == [[49406, *inside[:4], 49407]]
    assert tokenizer.size == 49408


def test_t5s_own_ids(tmp_path):
    tokenizer = open_tokenizer(vocabularies.write_t5(tmp_path))
    ids, mask = tokenizer.encode([PROMPT + " 龍<extra_id_3>", ""], 20)
    inside = [71, 9394, 63, 4180, 6957, 31, 7, 10433, 6, 3097, 635, 3, 154, 3, 2]
    assert ids.tolist() == [[*inside, 32096, 1, 0, 0, 0], [1] + [0] * 19]
    assert mask.sum(1).tolist() == [17, 1]
    assert tokenizer.encode([PROMPT], 4)[0].tolist() == [[*inside[:3], 1]]
    assert tokenizer.size == 32100


# `<|im_start|>user`, the prompt, `<|im_end|>` and `<|im_start|>assistant`, each with the line's end.
QWEN_PROMPT = [32, 18901, 88, 16301, 21800, 594, 220, 30184, 11, 220, 18, 20, 3821, 3958]
QWEN_TURN = [151644, 872, 198, *QWEN_PROMPT, 151645, 198, 151644, 77091, 198]


@pytest.mark.parametrize(("thinking", "thought"), [(True, []), (False, [151667, 271, 151668, 271])])
def test_qwen3s_own_ids_of_a_conversation(tmp_path, thinking, thought):
    """As Z-Image asks it, and FLUX.2 [klein], which lets it think of nothing."""
    tokenizer = open_tokenizer(vocabularies.write_qwen(tmp_path, QWEN_CHAT, think=True), chat=True)
    messages = [{"role": "user", "content": PROMPT}]
    filled = tokenizer.chat(messages, add_generation_prompt=True, enable_thinking=thinking)
    wanted = QWEN_TURN + thought
    ids, mask = tokenizer.encode([filled], 32, special=False)
    assert ids.tolist() == [wanted + [151643] * (32 - len(wanted))]
    assert mask.sum() == len(wanted)
    assert tokenizer.encode([filled], 32, side="left")[0].tolist() == [[151643] * (32 - len(wanted)) + wanted]


def test_qwen2_5s_own_ids_of_qwen_images_template(tmp_path):
    tokenizer = open_tokenizer(vocabularies.write_qwen(tmp_path))
    before = [151644, 8948, 198, 74785, 279, 2168, 553, 44193, 279, 1894, 11, 6083, 11, 1379, 11, 10434, 11]
    before += [12194, 11, 1467, 11, 27979, 11871, 315, 279, 6171, 323, 4004, 25, 151645, 198]
    ids, mask = tokenizer.encode([TEMPLATE.format(PROMPT)], 24, TEMPLATE_TOKENS)
    assert ids.tolist() == [[*before, *QWEN_TURN, *[151643] * 5]]
    assert ids[0, TEMPLATE_TOKENS:].tolist() == [*QWEN_TURN[3:], *[151643] * 5]
    assert mask.sum() == 31 + len(QWEN_TURN)


# What is encoded.


def test_arrays_that_the_model_reads(tiny):
    tokenizer = open_tokenizer(tiny("clip"))
    ids, mask = tokenizer.encode(["a lake", "a"], 5, before=4)
    assert (ids.shape, ids.dtype, mask.shape, mask.dtype) == ((2, 9), np.int32, (2, 9), np.int32)
    assert [array.shape for array in tokenizer.encode([], 5)] == [(0, 5), (0, 5)]


def test_a_warning_for_each_prompt_that_is_cut(tiny, caplog):
    tokenizer = open_tokenizer(tiny("qwen"))
    with caplog.at_level(logging.WARNING, logger="jaxspd"):
        tokenizer.encode(["abcdef", "abcd", "abcdefgh"], 4, before=2)
    assert caplog.messages == ["the model reads 4 of the prompt's 6 tokens"]
    # What was cut before leaves no trace.
    assert tokenizer.encode(["abcdefgh"], 8)[1].sum() == 8


def test_a_prompt_is_cut_on_the_configured_side(tiny):
    folder = tiny("clip")
    change_json(folder / "tokenizer_config.json", truncation_side="left")
    tokenizer = open_tokenizer(folder)
    start, *_, end = tokenizer.encode(["a"], 3)[0][0]
    ids = tokenizer.encode(["a b"], 3)[0]
    assert ids.tolist() == [[start, tokenizer.backend.token_to_id("b</w>"), end]]


def test_neither_torch_nor_transformers_is_imported(tiny):
    script = """
import sys
from pathlib import Path
for name in ("torch", "transformers", "diffusers", "jax"):
    sys.modules[name] = None
from jaxspd.components.tokenizer import open_tokenizer
tokenizer = open_tokenizer(Path(sys.argv[1]), chat=True)
ids, _ = tokenizer.encode([tokenizer.chat([{"role": "user", "content": "a lake"}])], 20)
print(ids.shape)
"""
    ran = subprocess.run([sys.executable, "-c", script, str(tiny("qwen"))], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("(1, 20)\n", 0), ran.stderr


@pytest.mark.parametrize("in_bytes", [False, True])
def test_what_is_unknown_is_as_the_file_says(tmp_path, in_bytes):
    """UMT5's unknown token is number 3; and a vocabulary may have pieces for single bytes."""
    pieces = [*("<pad>", "</s>", "<s>", "<unk>", "▁", "a"), *(f"<0x{byte:02X}>" for byte in range(256))]
    scored = [[piece, -float(number)] for number, piece in enumerate(pieces)]
    model = {"type": "Unigram", "unk_id": 3, "vocab": scored, "byte_fallback": in_bytes}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    letters = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(letters))
    ids, mask = open_tokenizer(tmp_path).encode(["a é"], 8)
    known = [pieces.index("<0xC3>"), pieces.index("<0xA9>")] if in_bytes else [3]
    assert ids[0, : mask.sum()].tolist() == [4, 5, 4, *known, 1]
