"""What transformers and diffusers will load of a checkpoint, checked by its files' headers and
configurations: nothing is read of the weights, and nothing computed.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxspd.convert.checkpoint import Checkpoint, read_json
from jaxspd.errors import UsageError

# Where text encoders keep a row for each token.
EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "token_embedding.weight")
# Byte-level vocabularies hold letters and special tokens besides what merges make: a few hundred in all.
UNMERGED = 1000
# A side of the latents that are decoded on trial.
SIDE = 4


@dataclass(frozen=True)
class TextPart:
    """A text encoder of a pipeline: its class, its folder and its tokenizer's. What is asked of it: `width`
    channels of `tokens` tokens, and where hidden states are read, the last of these `layers`.
    """

    model: str
    width: int
    tokens: int
    layers: int = 0
    part: str = "text_encoder"
    tokenizer: str = "tokenizer"


@dataclass(frozen=True)
class Autoencoder:
    """The VAE of a pipeline: its class, and the shape of the pixels `[3, …]` that it makes of latents."""

    model: str
    latents: tuple[int, ...]
    pixels: tuple[int, ...]


def check_tokenizer(folder: Path, encoder: Checkpoint) -> None:
    """UsageError unless the vocabulary is there, whole, and within the rows of the encoder's table."""
    tables = [key for key in encoder.keys() if key.endswith(EMBEDDINGS) and encoder.shape(key)]  # noqa: SIM118
    rows = max((encoder.shape(key)[0] for key in tables), default=None)
    largest = largest_id(folder)
    if rows is not None and largest >= rows:
        raise UsageError(
            f"{folder} has tokens up to {largest}, and {encoder.folder} a table of {rows}; they do not "
            "belong together"
        )


def largest_id(folder: Path) -> int:
    """The largest token of a vocabulary. UsageError if its files are missing or damaged: transformers would
    make do with special tokens alone, to which all prompts are alike.
    """
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    pieces = sorted(folder.glob("*.model"))
    added = [*_added(folder)]
    if whole.exists():
        ids, more = _whole(whole)
        added += more
    elif vocabulary.exists() or merges.exists():
        ids = _ids(vocabulary, read_json(vocabulary))
        if len(ids) - _merges(merges) > UNMERGED:
            raise UsageError(f"{merges} is too short for {vocabulary.name}; download it again")
    elif pieces:
        ids = [_pieces(pieces[0]) - 1]
    else:
        raise UsageError(
            f"{folder} has no vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model); "
            "download the folder again"
        )
    return max(ids + added)


def _whole(path: Path) -> tuple[list[int], list[int]]:
    """The tokens of a `tokenizer.json`, and those that it adds to its model's."""
    values = read_json(path)
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # By piece; or, of a unigram model, pieces in order.
    ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) and vocabulary else _ids(path, vocabulary)
    added = values.get("added_tokens") or []
    return ids, [one["id"] for one in added if isinstance(one, dict) and type(one.get("id")) is int]


def _ids(path: Path, vocabulary) -> list[int]:
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if not ids or not all(type(number) is int for number in ids):
        raise UsageError(f"{path} holds no vocabulary; download it again")
    return ids


def _added(folder: Path) -> list[int]:
    """Tokens that `tokenizer_config.json` adds."""
    path = folder / "tokenizer_config.json"
    added = read_json(path).get("added_tokens_decoder") if path.exists() else None
    return [int(number) for number in added if number.isdecimal()] if isinstance(added, dict) else []


def _merges(path: Path) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path} is missing or damaged; download it again") from None
    return sum(bool(line.strip()) and not line.startswith("#version") for line in lines)


def _pieces(path: Path) -> int:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    except (OSError, RuntimeError):
        raise UsageError(f"{path} is damaged; download it again") from None


def check_modules(family) -> None:
    """UsageError where PyTorch could not run the text encoders and the VAE of `family` as they are used, as
    far as modules without weights tell.
    """
    import diffusers
    import torch
    import transformers

    from jaxspd.families.torch_parts import abstract_module, meta_limits

    for text in family.texts:
        folder = family.folder / text.part
        module = abstract_module(getattr(transformers, text.model), folder)
        config = module.config.get_text_config()
        width = module.get_input_embeddings().weight.shape[-1]
        if width != text.width:
            raise UsageError(
                f"{folder} encodes text in {width} channels, and the transformer reads {text.width:g}; they "
                "do not belong together"
            )
        if config.num_hidden_layers < text.layers:
            raise UsageError(
                f"{folder} has {config.num_hidden_layers} layers, of which the {text.layers}th is read; use "
                "another text encoder"
            )
        if (most := getattr(config, "max_position_embeddings", text.tokens)) < text.tokens:
            raise UsageError(
                f"{folder} reads {most} tokens, and is given {text.tokens}; use another text encoder"
            )
    if family.autoencoder is None:
        return
    folder, wanted = family.folder / "vae", (1, *family.autoencoder.pixels)
    vae = abstract_module(getattr(diffusers, family.autoencoder.model), folder)
    with meta_limits(folder), torch.inference_mode():
        latents = torch.empty((1, *family.autoencoder.latents), device="meta", dtype=vae.dtype)
        found = tuple(vae.decode(latents).sample.shape)
        if found != wanted:
            raise UsageError(
                f"{folder} makes {list(found)} of latents {list(latents.shape)}, not {list(wanted)}; its "
                "config.json does not fit it"
            )
