"""Prompts and parameters from files. Does not import jax."""

import os
from pathlib import Path
from typing import Any

from jaxspd.errors import UsageError
from jaxspd.files import parse_json, read_text, unique, user_path


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one on each line. Empty lines are ignored.

    A line ends at \\n or \\r\\n only. Other characters at which Python splits lines may be part of a prompt.
    Raises UsageError if the file cannot be read or holds no prompt.
    """
    lines = [line.strip() for line in read_text(path, "prompts from").split("\n")]
    if not any(lines):
        raise UsageError(f"{path} holds no prompt; write one a line")
    return [line for line in lines if line]


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file, or those that jaxspd wrote into a picture or video.

    Raises UsageError if the file cannot be read or holds something else.
    """
    path = user_path(path)
    if os.path.isdir(path) or path.suffix.lower() in (".png", ".mp4", ".gif"):
        from jaxspd.media.metadata import read_request

        return read_request(path)
    text = read_text(path, "the configuration in")
    try:
        values = _parsed(text, is_json=path.suffix.lower() == ".json")
        if isinstance(values, dict):
            return unique((str(key).replace("-", "_"), value) for key, value in values.items())
    except ValueError as error:
        raise UsageError(f"cannot read the configuration in {path} ({error})") from None
    raise UsageError(f"{path} must hold keys and values, such as `height: 1024`")


def _parsed(text: str, is_json: bool) -> Any:
    """The value of a configuration's text. Text that is JSON is read as JSON, and other text as YAML."""
    try:
        return parse_json(text)
    except ValueError:
        if is_json:
            raise
    from jaxspd.yaml_core import parse_yaml

    return parse_yaml(text)
