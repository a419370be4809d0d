"""From a model to its family. A model is the demo, a local folder, or a repository of the hub.

Only the files that are needed are downloaded, when they are needed.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path, PurePosixPath

from jaxspd.convert.checkpoint import STEM, no_weights, shard_names, weight_entry
from jaxspd.convert.orbax_store import NAME
from jaxspd.errors import UsageError, first_line
from jaxspd.families import open_family, pipeline_family
from jaxspd.files import user_path

DEMO = Path(__file__).parent / "demo" / "checkpoint"
INDEX = "model_index.json"
# The files that a family reads before its weights: from every part, and from the pipeline itself.
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
SPECTRUM = "spectrum.json"
# The endings of a tokenizer's files. In recent tokenizers, chat templates are files of their own.
TOKENIZER_FILES = {".json", ".txt", ".model", ".jinja"}
# The endings of files with weights, pickles included. A hub id has none of them.
FILES = {".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"}
# The seconds to wait for a list of files, before the cache is used without it.
TIMEOUT = 10
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def fetch(
    model_path: str | os.PathLike | None,
    parts: Collection[str] | None = None,
    revision: str | None = None,
    transformer_weights_path: str | os.PathLike | None = None,
):
    """The family of `model_path`, which is a local folder, a hub id, or None for the demo.

    For a hub id, the configuration is downloaded first. Unless the family refuses it, the weights and
    tokenizers of `parts`, such as ("vae",), follow. By default these are all parts of the pipeline. Files in
    the hub's cache are not downloaded again, and are used alone if the hub cannot be asked. `revision` is a
    branch, tag or commit. A `transformer_weights_path` replaces the transformer's own weights, which then
    need not be there.

    Raises UsageError, in one line, if the model does not exist, is not supported, or cannot be downloaded.
    """
    file = None if transformer_weights_path is None else user_path(transformer_weights_path)
    folder = local_folder(model_path, revision)
    if folder:
        return open_family(folder, file)
    assert model_path is not None, "the demo has a folder"
    snapshot = open_snapshot(os.fspath(model_path), revision)
    family_class = pipeline_family(snapshot.folder, snapshot.model)
    # Wan 2.2 has a second transformer, which other pipelines of its class lack.
    second = [part for part in ("transformer_2",) if snapshot.inside(part)]
    snapshot.get(configurations(snapshot, (*family_class.parts, *second)))
    family = replace(family_class.from_folder(snapshot.folder), transformer_weights_path=file)
    wanted = {*family.parts, *family.transformers} if parts is None else set(parts)
    wanted = wanted - ({"transformer"} if file else set())
    snapshot.get([name for part in sorted(wanted) for name in part_files(snapshot, family, part)])
    return family


def local_folder(model_path: str | os.PathLike | None, revision: str | None) -> Path | None:
    """The folder of a model on this machine, or None for a hub id. Raises UsageError for anything else."""
    if model_path is None:
        if revision is not None:
            raise UsageError("the demo has no revisions; give a model path, or leave revision out")
        return DEMO
    model_path = os.fspath(model_path)
    folder = user_path(model_path)
    if os.path.isdir(folder):
        if not os.access(folder, os.R_OK | os.X_OK):
            raise UsageError(f"{folder} cannot be read; change its permissions or give another model path")
        if revision is not None:
            raise UsageError(f"{folder} is a folder, which has no revisions; leave revision out")
        return folder
    if os.path.lexists(folder):
        raise UsageError(
            f"{folder} is no folder; give a pipeline's folder or a hub id, and a single file of its "
            "transformer as transformer_weights_path"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path):
        raise UsageError(
            f"{model_path} does not exist or cannot be reached; give a pipeline's folder or a hub id"
        )
    return None


def fetch_file(given: str | os.PathLike) -> Path:
    """The path of a file of weights, or of a folder that holds one.

    `given` is a local path or a hub id. The file's name may follow the hub id:
    `maker/model/file.safetensors`. Raises UsageError if there is no such file, or if there are several and
    none is named.
    """
    path, given = user_path(given), os.fspath(given)
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", given)
    if os.path.lexists(path) or not hub_id or (not hub_id[2] and PurePosixPath(given).suffix in FILES):
        if not os.path.exists(path):
            raise UsageError(f"{path} does not exist; give a file of weights, or a hub id")
        return path
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    model, name, revision = hub_id[1], hub_id[2], None
    try:
        info = HfApi().model_info(model, timeout=TIMEOUT)
        names, revision = [file.rfilename for file in info.siblings or []], info.sha
    except Exception as error:
        fault = UsageError(f"{given} is no local file and cannot be downloaded: {reason(model, error)}")
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception:
            raise fault from error
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        if name is None or name in names:
            return folder / _only(given, name, names)
        raise fault from error
    name = _only(given, name, names)
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except Exception as error:
        raise UsageError(f"{given} cannot be downloaded: {reason(model, error)}") from error


def _only(given: str, name: str | None, names: list[str]) -> str:
    """The file called `name`, or the only file of weights. Raises UsageError if there is none or several."""
    weights = sorted(file for file in names if PurePosixPath(file).suffix in (".safetensors", ".gguf"))
    if name is None and len(weights) == 1:
        return weights[0]
    if name in names:
        return name
    if not weights:
        raise UsageError(f"{given} holds no safetensors, and nothing else is loaded")
    known = ", ".join(weights[:3]) + (", …" if len(weights) > 3 else "")
    what = f"holds {len(weights)} files of weights" if name is None else "has no such file"
    raise UsageError(f"{given} {what}; put the name of one behind the hub id: {known}")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository in the hub's cache, to which files are downloaded when they are needed.

    `names` are the repository's files. If the hub could not be asked, they are only those in the cache, and
    `fault` is the reason.
    """

    model: str
    folder: Path
    names: frozenset[str]
    fault: str | None

    def inside(self, part: str) -> list[str]:
        """The names of a component's files, relative to its folder."""
        return [name.removeprefix(f"{part}/") for name in sorted(self.names) if name.startswith(f"{part}/")]

    def get(self, names: Iterable[str]) -> None:
        """Downloads those of `names` that the cache lacks. Raises UsageError if that fails."""
        missing = [name for name in names if not (self.folder / name).is_file()]
        if not missing:
            return
        if self.fault:
            raise self.incomplete(missing)
        from huggingface_hub import snapshot_download

        try:
            # The commit is named, because a branch might have moved since.
            snapshot_download(self.model, revision=self.folder.name, allow_patterns=[*map(escape, missing)])
        except Exception as error:
            raise UsageError(f"{self.model} cannot be downloaded: {reason(self.model, error)}") from error
        if missing := [name for name in missing if not (self.folder / name).is_file()]:
            raise UsageError(f"{self.model} lacks {missing[0]}; its repository is incomplete")

    def incomplete(self, missing: list[str]) -> UsageError:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return UsageError(f"the hub's cache lacks {missing[0]}{more} of {self.model}: {self.fault}")


def open_snapshot(model: str, revision: str | None) -> Snapshot:
    """The commit that `revision` names, with its model_index.json in the cache.

    Raises UsageError if it cannot be had or is no pipeline.
    """
    from huggingface_hub import HfApi, hf_hub_download

    # This is asked first, because a download would retry for long if the hub does not answer.
    try:
        info = HfApi().model_info(model, revision=revision, timeout=TIMEOUT)
    except Exception as error:
        fault = reason(model, error, revision)
        try:
            folder = Path(hf_hub_download(model, INDEX, revision=revision, local_files_only=True)).parent
        except Exception:
            raise UsageError(f"{model} is no local folder and cannot be downloaded: {fault}") from error
        here = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return Snapshot(model, folder, frozenset(here), fault)
    names = frozenset(file.rfilename for file in info.siblings or [])
    if INDEX not in names:
        raise UsageError(f"{model} holds no {INDEX}; give the hub id of a pipeline in diffusers' layout")
    try:
        # The revision is named, so that the cache remembers its commit.
        folder = Path(hf_hub_download(model, INDEX, revision=revision)).parent
    except Exception as error:
        raise UsageError(f"{model} cannot be downloaded: {reason(model, error, revision)}") from error
    if folder.name != info.sha:
        raise UsageError(f"{model} changed while it was read; try again")
    return Snapshot(model, folder, names, None)


def configurations(snapshot: Snapshot, parts: Collection[str]) -> Iterator[str]:
    """Yields the names of the JSON files that opening a family reads."""
    if SPECTRUM in snapshot.names:
        yield SPECTRUM
    for part in parts:
        found = [name for name in snapshot.inside(part) if name in CONFIGS]
        # If the hub was asked, the family itself reports what is missing.
        if not found and snapshot.fault:
            raise snapshot.incomplete([part])
        yield from (f"{part}/{name}" for name in found)


def part_files(snapshot: Snapshot, family, part: str) -> Iterator[str]:
    """Yields the names of the files that a component's loader reads, beside its configuration.

    Weights at full precision are preferred. Raises UsageError if there are no weights in safetensors.
    """
    inside = snapshot.inside(part)
    stem = (dict.fromkeys(family.transformers, STEM) | family.weights).get(part)
    if stem is None:
        yield from (f"{part}/{name}" for name in inside if PurePosixPath(name).suffix in TOKENIZER_FILES)
        return
    stored = [name for name in inside if name.startswith(f"{NAME}/")]
    if part in family.transformers and stored:
        yield from (f"{part}/{name}" for name in stored)
        return
    entry = weight_entry(inside, stem)
    if entry is None:
        if snapshot.fault:
            raise snapshot.incomplete([f"{part}/{stem}.safetensors"])
        raise no_weights(f"{snapshot.model}/{part}", inside, stem)
    yield f"{part}/{entry}"
    if entry.endswith(".json"):
        snapshot.get([f"{part}/{entry}"])
        yield from (f"{part}/{name}" for name in shard_names(snapshot.folder / part / entry))


def reason(model: str, error: BaseException, revision: str | None = None) -> str:
    """Why a download from the hub failed, and what to do, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    # The hub's own words, which the library puts last in its message.
    said = ((getattr(error, "server_message", None) or "").strip().splitlines() or [""])[0].rstrip(".")
    if isinstance(error, GatedRepoError):
        where = "" if "ask for access" in said else f"; ask for access at {constants.ENDPOINT}/{model}"
        return f"{said or 'it is gated'}{where}; then {LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such repository, or it is private; check the spelling, or {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}; give one of its branches, tags or commits"
    if isinstance(error, OfflineModeIsEnabled):
        return "downloads are off; unset HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        status = error.response.status_code
        cure = LOGIN if status in (401, 403) else "try again later"
        return f"the hub answers {status}{f' ({said})' if said else ''}; {cure}"
    line = first_line(error)
    if isinstance(error, HFValidationError):
        return line
    if isinstance(error, OSError) and error.strerror and error.filename:  # an error of the disk
        return f"{error.strerror}: {error.filename}"
    return f"the hub cannot be reached, or the connection broke ({line}); check the network and try again"
