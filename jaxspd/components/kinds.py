"""The kinds of tokenizers. Each divides text in its own way before its vocabulary splits it further.

As in transformers 5, a known class takes pieces, merges and added tokens from the folder's files. The rest is
part of the class, whatever a `tokenizer.json` says. Only unknown classes take everything from
`tokenizer.json`.

Earlier releases of transformers took everything from `tokenizer.json`. For CLIP, if ftfy was installed, they
first cleaned prompts: curly quotes became straight ones.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxspd.components.special import Special, Token
from jaxspd.components.vocabulary import Vocabulary

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Kind:
    """A class of tokenizers.

    `names` are its special tokens unless configured otherwise. `extra(config, vocabulary)` gives further
    special tokens. `build(folder, config, vocabulary, special)` makes the tokenizer.
    """

    names: dict[str, str]
    build: Callable[[Path, dict, Vocabulary, Special], Tokenizer]
    extra: Callable[[dict, Vocabulary], list[Token]] = lambda config, vocabulary: []


def find_kind(config: dict, vocabulary: Vocabulary) -> Kind:
    """The kind of tokenizer that `config`, from `tokenizer_config.json`, names. If it names none, the
    vocabulary decides. Raises ValueError if the class is not known and there is no `tokenizer.json`.
    """
    name = config.get("tokenizer_class")
    if (kind := KINDS.get(str(name).removesuffix("Fast"))) is not None:
        return kind
    if vocabulary.whole is not None:
        return AS_IT_SAYS
    if name is not None:
        raise ValueError(f"a {name} needs a tokenizer.json")
    if isinstance(vocabulary.pieces, list):
        return T5
    return CLIP if any(piece.endswith("</w>") for piece in vocabulary.pieces) else QWEN2


def pipeline(vocabulary: Vocabulary) -> Tokenizer:
    """The settings of a `tokenizer.json` other than its vocabulary; defaults if `vocabulary` is from other
    files.
    """
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    return Tokenizer.from_str(json.dumps({**(vocabulary.whole or {}), **empty}))


def token_number(tokenizer: Tokenizer, special: Special, name: str) -> int:
    """The id of the special token `name`, or of the unknown token if the vocabulary lacks it. Raises
    ValueError if there is no such token or neither has an id.
    """
    if name not in special.named:
        raise ValueError(f"tokenizer_config.json names no {name}")
    for token in (special.named[name], special.named.get("unk_token", "")):
        if (number := tokenizer.token_to_id(str(token))) is not None:
            return number
    raise ValueError(f"its {name} is not in its vocabulary")


def _clip(folder: Path, config: dict, vocabulary: Vocabulary, special: Special) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.pieces,
            vocabulary.merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=str(special.named.get("unk_token")),
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special.add_to(tokenizer)
    end, begin = (
        (str(special.named.get(name)), token_number(tokenizer, special, name))
        for name in ("eos_token", "bos_token")
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        end, begin, trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _t5(folder: Path, config: dict, vocabulary: Vocabulary, special: Special) -> Tokenizer:
    pieces = vocabulary.pieces
    if vocabulary.whole is None:  # SentencePiece's own file has no markers of gaps
        pieces = [*pieces, *((gap, 0.0) for gap in reversed(_gaps(config)))]
    tokenizer = Tokenizer(models.Unigram(pieces, vocabulary.unknown, vocabulary.single_bytes))
    if vocabulary.charsmap is not None:
        tokenizer.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    special.add_to(tokenizer)
    end = ("</s>", token_number(tokenizer, special, "eos_token"))
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[end])
    return tokenizer


def _gaps(config: dict) -> list[str]:
    """T5's markers of gaps in a text."""
    return [f"<extra_id_{number}>" for number in range(config.get("extra_ids", 100))]


def _t5_extra(config: dict, vocabulary: Vocabulary) -> list[Token]:
    marks = [AddedToken(piece, normalized=False, special=special) for piece, special in vocabulary.control]
    return [*marks, *_gaps(config)]


def _qwen2(folder: Path, config: dict, vocabulary: Vocabulary, special: Special) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(vocabulary.pieces, vocabulary.merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    tokenizer.normalizer = normalizers.NFC()
    prefix = config.get("add_prefix_space") or False
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    special.add_to(tokenizer)
    # These tokens are special even if a list of added tokens says otherwise.
    tokenizer.add_tokens([AddedToken(content, special=True) for content in special.contents()])
    tokenizer.post_processor = pipeline(vocabulary).post_processor or _ends(
        tokenizer, config if vocabulary.whole is None else {}, special
    )
    return tokenizer


def _ends(tokenizer: Tokenizer, config: dict, special: Special) -> processors.PostProcessor:
    """A processor that adds the begin and end tokens for which `config` asks, if they exist."""
    wanted = [
        name for name in ("bos_token", "eos_token") if config.get(f"add_{name}") and name in special.named
    ]
    numbers = {name: (str(special.named[name]), token_number(tokenizer, special, name)) for name in wanted}
    single = [numbers[name][0] if name in numbers else None for name in ("bos_token", "eos_token")]
    parts = [part for part in (single[0], "$A", single[1]) if part]
    return processors.TemplateProcessing(single=parts, special_tokens=[*numbers.values()])


def _as_it_says(folder: Path, config: dict, vocabulary: Vocabulary, special: Special) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special.add_to(tokenizer)
    return tokenizer


CLIP = Kind(
    {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
    _clip,
)
# Whatever the files say, text after an added token begins a new word. The unknown token is that of
# `tokenizer.json`, as in all earlier releases. transformers 5 uses id 2 even for UMT5, which was trained with
# 3.
T5 = Kind({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, _t5, _t5_extra)
QWEN2 = Kind(dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"), _qwen2)
AS_IT_SAYS = Kind({}, _as_it_says)
KINDS = {"CLIPTokenizer": CLIP, "T5Tokenizer": T5, "Qwen2Tokenizer": QWEN2}
