"""The outputs that a request asks for, before any is made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxspd.errors import UsageError
from jaxspd.media.metadata import made_by
from jaxspd.media.output import check_writable, output_paths
from jaxspd.request import Request


@dataclass(frozen=True)
class Task:
    """One output to be made.

    `prompt` is the prompt's number, `request` the complete request that repeats the output, and `path` its
    file, or None if it is not saved.
    """

    prompt: int
    request: dict[str, Any]
    path: Path | None

    @property
    def made(self) -> bool:
        """Whether the output's file exists and was made by the same request."""
        return self.path is not None and made_by(self.path, self.request)


def tasks(family, request: Request, source: dict[str, Any], save: bool) -> list[Task]:
    """A task for every output of `request` by the model `source`.

    The request's format is already chosen. The tasks have files if `save`. Raises UsageError if there is no
    prompt, or if the files cannot be named.
    """
    requests = output_requests(family, request, source)
    paths: Sequence[Path | None] = [None] * len(requests)
    if save:
        kind = request.output_format
        assert kind is not None, "the format is chosen before"
        paths = output_paths(request.output_path, request.output_file_name, requests, kind)
    return [
        Task(number // request.num_outputs_per_prompt, own, path)
        for number, (own, path) in enumerate(zip(requests, paths, strict=True))
    ]


def to_make(every: list[Task], skip_existing: bool) -> list[Task]:
    """The tasks whose outputs are to be made: all, or those without a file if `skip_existing`.

    Raises UsageError if one of them cannot be written.
    """
    todo = [task for task in every if not (skip_existing and task.made)]
    check_writable([task.path for task in todo if task.path])
    return todo


def output_requests(family, request: Request, source: dict[str, Any]) -> list[dict[str, Any]]:
    """Each output's complete parameters, which its file holds and which repeat it."""
    if not request.prompts:
        raise UsageError("a prompt is needed; say what to show")
    given = request.prompt_suffix
    suffix = family.default_prompt_suffix if given is None else lambda _: given
    common = asdict(replace(request, num_outputs_per_prompt=1))
    del common["output_path"], common["output_file_name"]
    common |= {name: value for name, value in source.items() if value is not None}
    return [
        {**common, "prompt": prompt, "prompt_suffix": suffix(prompt), "seed": request.seed + number}
        for prompt in request.prompts
        for number in range(request.num_outputs_per_prompt)
    ]
