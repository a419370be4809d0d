"""From a model path to a folder: a local one, a hub id, or the demo that ships with the package."""

import os
import re
from pathlib import Path

from jaxspd.errors import UsageError

DEMO = Path(__file__).parent / "demo" / "checkpoint"
# Neither pickles nor the single-file duplicates of the weights that some repositories also hold.
WANTED = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]


def model_folder(model_path: str | os.PathLike | None) -> Path:
    """The pipeline folder of `model_path`; a hub id is downloaded, or taken from the hub's cache."""
    if model_path is None:
        return DEMO
    model_path = os.fspath(model_path)
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{folder} is a file; give the folder of a pipeline or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path):
        raise UsageError(f"{model_path} does not exist; give a pipeline's folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_path, allow_patterns=WANTED))
    except Exception as error:  # no network, no such repository, or a gated one
        line = str(error).strip().splitlines()[0]
        raise UsageError(f"{model_path} is no local folder and could not be downloaded ({line})") from error
