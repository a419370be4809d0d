"""The tokens that a tokenizer's configuration names and adds to its vocabulary: start, end, padding and more.
They are found in text as they stand.

As transformers 5 does, they are read from `tokenizer_config.json` and, where that lists no added tokens, from
the files of older releases.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxspd.components.vocabulary import Vocabulary
from jaxspd.convert.checkpoint import read_json

Token = str | AddedToken

# What every tokenizer may name, in the order in which those are numbered that its vocabulary lacks.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Special:
    """Added tokens: `listed` with all their properties, `named` by what they are for, and `extra` ones."""

    listed: list[AddedToken]
    named: dict[str, Token]
    extra: list[Token]

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Adds the tokens. Those that the vocabulary lacks are numbered from its end on."""
        tokens = list(self.listed)
        known = {token.content for token in [*tokenizer.get_added_tokens_decoder().values(), *tokens]}
        for token in [*self.named.values(), *self.extra]:
            if str(token) not in known:
                tokens.append(AddedToken(token, special=True) if isinstance(token, str) else token)
                known.add(str(token))
        names = {str(token) for token in self.named.values()}
        for token in tokens:
            token.special = token.special or token.content in names
        tokenizer.add_tokens(tokens)

    def contents(self) -> list[str]:
        """The texts of `named` and `extra`, each once."""
        return list(dict.fromkeys(str(token) for token in [*self.named.values(), *self.extra]))


def read_special(
    folder: Path, config: dict, vocabulary: Vocabulary, names: dict[str, str], usual: list[Token]
) -> Special:
    """The added tokens of a folder, whose `tokenizer_config.json` is `config`. Where that says nothing,
    `names` and the `usual` extra tokens are the class's. Raises TypeError or ValueError where an entry is no
    token.
    """
    config = {key: _token(value) for key, value in config.items()}
    if not config.get("extra_special_tokens") and "additional_special_tokens" in config:
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        listed = {int(number): _added(token) for number, token in config["added_tokens_decoder"].items()}
    else:
        config |= _special_tokens_map(folder, config)
        listed = _added_tokens(folder, config)
        for token in (vocabulary.whole or {}).get("added_tokens") or []:
            listed[token["id"]] = _added(token)
    own = {
        key: value
        for key, value in config.items()
        if key.endswith("_token") and key not in NAMES and isinstance(value, Token)
    }
    if isinstance(config.get("extra_special_tokens"), dict):
        own |= config.pop("extra_special_tokens")
    named = names | {key: config[key] for key in NAMES if key in config}
    named = {key: named[key] for key in NAMES if named.get(key) is not None} | own
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens", usual)) or []
    if not isinstance(extra, list):
        raise TypeError(f"its extra special tokens are no list: {extra!r}")
    for token in [*named.values(), *extra]:
        if not isinstance(token, Token):
            raise TypeError(f"its configuration names {token!r} as a token")
    return Special([listed[number] for number in sorted(listed)], named, extra)


def _token(value: Any) -> Any:
    """`value`, an added token where it is one written down."""
    if isinstance(value, list):
        return [_token(one) for one in value]
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _added(value)
    return value


def _added(token: dict) -> AddedToken:
    """The added token that a file describes. What else the description holds, the library would print."""
    content = token.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{token!r} is no token")
    return AddedToken(content, **{flag: token[flag] for flag in FLAGS if flag in token})


def _special_tokens_map(folder: Path, config: dict) -> dict[str, Any]:
    """The named and extra tokens of `special_tokens_map.json`, which older releases wrote."""
    path = folder / "special_tokens_map.json"
    found = {}
    for key, value in (read_json(path) if path.exists() else {}).items():
        if key == "extra_special_tokens" and isinstance(value, list):
            before = list(config.get(key) or [])
            value = before + [token for token in map(_special, value) if token not in before]
        elif key != "extra_special_tokens":
            value = _special(value)
        found[key] = value
    return found


def _special(value: Any) -> Any:
    return _added({**value, "special": True}) if isinstance(value, dict) else value


def _added_tokens(folder: Path, config: dict) -> dict[int, AddedToken]:
    """The tokens of `added_tokens.json`, by number, which older releases wrote."""
    path = folder / "added_tokens.json"
    special = {str(config[key]) for key in NAMES if config.get(key)}
    special |= {str(token) for token in config.get("extra_special_tokens") or []}
    return {
        number: AddedToken(content, normalized=content not in special, special=content in special)
        for content, number in (read_json(path) if path.exists() else {}).items()
    }
