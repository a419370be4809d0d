"""Chat templates, which write a conversation as the model was trained to read it. A model's authors write
them in Jinja.

A checkpoint's files are not trusted: templates run in Jinja's sandbox, on plain data. They may use the same
functions as in transformers.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError, first_line


def read_template(folder: Path) -> Template:
    """The chat template in a tokenizer's folder: `chat_template.jinja`, or else an entry of
    `tokenizer_config.json`. Raises UsageError if there is none or it is damaged.
    """
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        text = own.read_text(encoding="utf-8") if own.exists() else None
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{own} is damaged; download it again") from None
    if text is None and config.exists():
        text = read_json(config).get("chat_template")
        if isinstance(text, list):  # several templates, each with a name
            named = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}
            text = named.get("default")
    if text is None:
        raise UsageError(f"{folder} lacks a chat template (chat_template.jinja); download it again")
    if not isinstance(text, str):
        raise UsageError(f"{config} holds a chat template that is not text; download it again")
    try:
        return _environment().from_string(text)
    except (TemplateError, RecursionError) as error:
        raise _broken(folder, error) from error


def fill(template: Template, folder: Path, messages: Sequence[dict], **values) -> str:
    """The text that the template of `folder` makes of `messages`. `values` are its other variables. Raises
    UsageError if the template fails.
    """
    # Templates use these variables.
    usual = {"tools": None, "documents": None, "add_generation_prompt": False}
    try:
        return template.render(**{**usual, **values, "messages": messages})
    except Exception as error:  # a template can raise any exception
        raise _broken(folder, error) from error


def _broken(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{folder} has a chat template that cannot be used ({first_line(error)}); download it again"
    )


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
        # A function, not the class: the sandbox would let a template call the class's methods on other
        # objects.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the model's answers for training. Here it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        # Variables that are set inside the tag end with it.
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """A namespace that refuses names with an underscore in front. With such names it could imitate other
    objects.
    """

    def __init__(self, /, *args, **kwargs):
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not hold {name!r}")


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without escapes. Jinja's own filter would escape the characters that HTML reads as tags."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise TemplateError(message)
