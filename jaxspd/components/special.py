"""Special tokens, such as start, end and padding, which a tokenizer's configuration names and adds to its
vocabulary. They are found in a text as they are written.

As in transformers 5, they are read from `tokenizer_config.json`. If that file lists no added tokens, they are
read from the files of older releases.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxspd.components.vocabulary import Vocabulary
from jaxspd.convert.checkpoint import read_json

Token = str | AddedToken

# The tokens that every tokenizer may name. Those that a vocabulary lacks get their ids in this order.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Special:
    """Added tokens: `listed` ones with all their properties, `named` ones by purpose, and `extra` ones."""

    listed: list[AddedToken]
    named: dict[str, Token]
    extra: list[Token]

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Adds the tokens to `tokenizer`. Those that its vocabulary lacks get ids after its last one."""
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
        """The texts of `named` and `extra` tokens, without duplicates."""
        return list(dict.fromkeys(str(token) for token in [*self.named.values(), *self.extra]))


def read_special(
    folder: Path, config: dict, vocabulary: Vocabulary, names: dict[str, str], usual: list[Token]
) -> Special:
    """The added tokens of `folder`, whose `tokenizer_config.json` holds `config`.

    Where it says nothing, the class's tokens are used: `names`, and `usual` as extra tokens. Raises TypeError
    or ValueError if an entry is not a token.
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
        raise TypeError(f"its extra special tokens are not a list: {extra!r}")
    for token in [*named.values(), *extra]:
        if not isinstance(token, Token):
            raise TypeError(f"its configuration names {token!r} as a token")
    return Special([listed[number] for number in sorted(listed)], named, extra)


def _token(value: Any) -> Any:
    """`value`, with descriptions of added tokens replaced by the tokens."""
    if isinstance(value, list):
        return [_token(one) for one in value]
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _added(value)
    return value


def _added(token: dict) -> AddedToken:
    """The added token that an entry of a file describes. Other keys of the entry are dropped, because the
    library would print them.
    """
    content = token.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{token!r} is not a token")
    return AddedToken(content, **{flag: token[flag] for flag in FLAGS if flag in token})


def _special_tokens_map(folder: Path, config: dict) -> dict[str, Any]:
    """The named and extra tokens in `special_tokens_map.json`, a file of older releases."""
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
    """The tokens in `added_tokens.json`, by id; a file of older releases."""
    path = folder / "added_tokens.json"
    special = {str(config[key]) for key in NAMES if config.get(key)}
    special |= {str(token) for token in config.get("extra_special_tokens") or []}
    return {
        number: AddedToken(content, normalized=content not in special, special=content in special)
        for content, number in (read_json(path) if path.exists() else {}).items()
    }
