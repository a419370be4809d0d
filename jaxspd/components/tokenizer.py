"""Tokenizers of text encoders. They use the `tokenizers` library, neither PyTorch nor transformers.

Ids are the same as in transformers 5, for the same folder and the class that its configuration names.
"""

import gc
import logging
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jaxspd.components.kinds import find_kind, pipeline, token_number
from jaxspd.components.special import Special, read_special
from jaxspd.components.vocabulary import Vocabulary, read_vocabulary
from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError, first_line

log = logging.getLogger("jaxspd")

SIDES = ("left", "right")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a component folder, made by `open_tokenizer`.

    `padding_id` fills up short prompts on the side `padding_side`. Long prompts lose tokens on the side
    `truncation_side`.
    """

    folder: Path
    backend: tokenizers.Tokenizer
    special: Special
    padding_id: int
    padding_side: str
    truncation_side: str
    template: Any = None  # compiled chat template, None without `chat`

    @property
    def size(self) -> int:
        """The smallest number of rows in a table for these tokens: one more than the largest id."""
        return 1 + max(self.backend.get_vocab().values())

    def encode(
        self,
        texts: Sequence[str],
        length: int,
        before: int = 0,
        special: bool = True,
        side: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask of `texts`, both `[B, before + length]`, int32. The mask is 1 at text
        and 0 at padding.

        `before` is the number of a text's tokens that do not belong to the prompt. If `special`, the
        tokenizer puts its own tokens around a text; these are never cut. `side` is the side of the padding
        ("left" or "right"), if not the configured one. A warning tells how many tokens are cut.
        """
        whole = before + length
        ids = np.full((len(texts), whole), self.padding_id, np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            read = self.backend.encode(text, add_special_tokens=special).ids
            if len(read) > whole:
                log.warning("the model reads %d of the prompt's %d tokens", length, len(read) - before)
                self.backend.enable_truncation(whole, direction=self.truncation_side)
                read = self.backend.encode(text, add_special_tokens=special).ids
                self.backend.no_truncation()
            start = whole - len(read) if (side or self.padding_side) == "left" else 0
            ids[row, start : start + len(read)] = read
            mask[row, start : start + len(read)] = 1
        return ids, mask

    def chat(self, messages: Sequence[dict], **options) -> str:
        """The text that the chat template makes of `messages`; only for tokenizers that were opened with
        `chat`.

        `messages` are dictionaries of "role" and "content". The content is text or a list of
        `{"type": "text", "text": …}`. `options` are variables of the template, such as
        `add_generation_prompt`. Raises UsageError if the template fails.
        """
        from jaxspd.components.chat import fill

        names = {name: str(token) for name, token in self.special.named.items()}
        return fill(self.template, self.folder, messages, **{**names, **options})


def open_tokenizer(folder: Path, *, chat: bool = False) -> Tokenizer:
    """The tokenizer of a component folder. No code of a checkpoint is run.

    `tokenizer_config.json` names its class: CLIPTokenizer, T5Tokenizer or Qwen2Tokenizer, with or without
    "Fast". For other classes, `tokenizer.json` defines the tokenizer.

    Raises UsageError if files are missing or damaged, if the configuration is wrong, if all letters get the
    same ids, or if `chat` is set and there is no chat template.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    template = None
    if chat:
        from jaxspd.components.chat import read_template

        template = read_template(folder)
    with _uncollected(), _readable(folder):
        vocabulary = read_vocabulary(folder)
        tokenizer = _assemble(folder, config, vocabulary, template)
        told = {
            tuple(tokenizer.backend.encode(c, add_special_tokens=False).ids) for c in string.ascii_lowercase
        }
        # A wrong entry of the configuration is found here, not later at the first prompt.
        tokenizer.encode(["a"], 8)
    if len(told) == 1:
        raise UsageError(f"{folder} tells no letters apart; its vocabulary is damaged, download it again")
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, rows: int | None, encoder: Path) -> None:
    """Raises UsageError if a token has no row in the text encoder's table, which has `rows` rows. `encoder`
    is the text encoder's folder. None means that the number of rows is not known.
    """
    largest = tokenizer.size - 1
    if rows is not None and largest >= rows:
        raise UsageError(
            f"{tokenizer.folder} has tokens up to {largest}, and {encoder} a table of {rows}; they do not "
            "belong together"
        )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turns Python's garbage collection off. A vocabulary has many pieces and makes no garbage, but Python
    would search it again and again.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns the library's exceptions about an unusable folder into a UsageError of one line."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except BaseException as error:
        # The library's panics are not subclasses of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UsageError(f"{folder} cannot be loaded ({first_line(error)}); download it again") from error


def _assemble(folder: Path, config: dict, vocabulary: Vocabulary, template: Any) -> Tokenizer:
    kind, given = find_kind(config, vocabulary), pipeline(vocabulary)
    names, sides = dict(kind.names), {"padding_side": "right", "truncation_side": "right"}
    if given.padding:
        names.setdefault("pad_token", given.padding["pad_token"])
        sides["padding_side"] = given.padding["direction"]
    if given.truncation:
        sides["truncation_side"] = given.truncation["direction"]
    for key in sides:
        sides[key] = config.get(key, sides[key])
        if sides[key] not in SIDES:
            raise ValueError(f"its {key} is {sides[key]!r}")
    limit = config.get("model_max_length")
    if limit is not None and not isinstance(limit, int | float):
        raise TypeError(f"its model_max_length is {limit!r}")
    special = read_special(folder, config, vocabulary, names, kind.extra(config, vocabulary))
    backend = kind.build(folder, config, vocabulary, special)
    # `encode` pads and truncates.
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    number = token_number(backend, special, "pad_token")
    return Tokenizer(folder, backend, special, number, **sides, template=template)
