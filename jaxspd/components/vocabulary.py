"""Reads and checks the vocabulary files of a tokenizer's folder."""

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError

# Byte-level vocabularies also hold letters and special tokens, which are not made by merges: a few hundred in
# all.
UNMERGED = 1000
# SentencePiece's numbers for two types of pieces, control and user-defined.
CONTROL, USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Vocabulary:
    """The pieces into which text is split.

    For BPE, `pieces` gives the id of each piece, and `merges` are ordered by rank. For Unigram, `pieces` are
    in order, with their scores. `unknown` is the id of the unknown piece. `single_bytes` says whether unknown
    text is split into bytes. SentencePiece normalises text by `charsmap`, if there is one.

    `whole` is the rest of a `tokenizer.json`. `control` are the control and user-defined pieces of a
    `*.model` file.
    """

    pieces: Any  # {piece: id}, or [(piece, score)]
    merges: list[tuple[str, str]] = field(default_factory=list)
    unknown: int = 2
    single_bytes: bool = False
    charsmap: bytes | None = None
    whole: dict | None = None
    control: list[tuple[str, bool]] = field(default_factory=list)  # (piece, whether it is a control piece)


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of `folder`, from the first that exists of `tokenizer.json`, `vocab.json` with
    `merges.txt`, and `*.model`. Raises UsageError if its files are missing or damaged.
    """
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    models = sorted(folder.glob("*.model"))
    if whole.exists():
        return _whole(whole)
    if vocabulary.exists() or merges.exists():
        pieces = _numbered(vocabulary, read_json(vocabulary))
        pairs = _merges(merges)
        if len(pieces) - len(pairs) > UNMERGED:
            raise UsageError(f"{merges} is too short for {vocabulary.name}; download it again")
        return Vocabulary(pieces, pairs)
    if models:
        return _sentencepiece(models[0])
    raise UsageError(
        f"{folder} has no vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model); "
        "download the folder again"
    )


def _whole(path: Path) -> Vocabulary:
    values = read_json(path)
    model = values.pop("model", None)
    pieces, merges = (
        (model.get(key) for key in ("vocab", "merges")) if isinstance(model, dict) else (None, None)
    )
    if isinstance(pieces, list) and pieces:
        return Vocabulary(
            _scored(path, pieces),
            unknown=model.get("unk_id", 2),
            single_bytes=bool(model.get("byte_fallback")),
            charsmap=_charsmap(values.get("normalizer")),
            whole=values,
        )
    pairs = [_pair(path, merge) for merge in merges or []]
    return Vocabulary(_numbered(path, pieces), pairs, whole=values)


def _numbered(path: Path, pieces) -> dict[str, int]:
    if not isinstance(pieces, dict) or not pieces or not all(type(n) is int for n in pieces.values()):
        raise UsageError(f"{path} holds no vocabulary; download it again")
    return pieces


def _scored(path: Path, pieces: list) -> list[tuple[str, float]]:
    try:
        return [(str(piece), float(score)) for piece, score in pieces]
    except (TypeError, ValueError):
        raise UsageError(f"{path} holds no vocabulary; download it again") from None


def _pair(path: Path, merge) -> tuple[str, str]:
    """The two sides of a merge. Older files hold both in one string."""
    sides = tuple(merge.split(" ") if isinstance(merge, str) else merge)
    if len(sides) != 2:
        raise UsageError(f"{path} holds {merge!r} where two pieces belong; download it again")
    return sides


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path} is missing or damaged; download it again") from None
    return [_pair(path, line) for line in lines if line.strip() and not line.startswith("#version")]


def _charsmap(normalizer: dict | None) -> bytes | None:
    steps = (normalizer or {}).get("normalizers", [normalizer or {}])
    maps = (step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled")
    return base64.b64decode(next(maps, "")) or None


def _sentencepiece(path: Path) -> Vocabulary:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError):
        model.Clear()
    if not model.pieces:
        raise UsageError(f"{path} is damaged; download it again")
    return Vocabulary(
        [(piece.piece, piece.score) for piece in model.pieces],
        charsmap=model.normalizer_spec.precompiled_charsmap or None,
        control=[(p.piece, p.type == CONTROL) for p in model.pieces if p.type in (CONTROL, USER_DEFINED)],
    )
