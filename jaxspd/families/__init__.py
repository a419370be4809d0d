"""The model families, found by the pipeline class that a checkpoint's `model_index.json` names."""

from importlib import import_module
from pathlib import Path

from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError

# Pipeline class in model_index.json -> family; the module has the family's name, and is imported only
# when it is needed.
PIPELINES = {
    "FluxPipeline": "flux1",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "QwenImagePipeline": "qwen_image",
    "WanPipeline": "wan",
    "ZImagePipeline": "z_image",
}


def family_class(name: str) -> type:
    """The class of the family called `name`, such as "flux1"."""
    if name not in PIPELINES.values():
        known = ", ".join(sorted(set(PIPELINES.values())))
        raise UsageError(f"unknown family {name!r}; use one of {known}")
    return import_module(f"jaxspd.families.{name}").Family


def pipeline_family(folder: Path, model: str | None = None) -> type:
    """The class of the family that `folder`'s model_index.json names; UsageError for every other pipeline,
    which it calls `model` where the folder is not the user's.
    """
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise UsageError(
            f"{model or folder} is a {pipeline} pipeline; jaxspd runs {', '.join(sorted(PIPELINES))}"
        )
    return family_class(PIPELINES[pipeline])


def open_family(folder: Path):
    """The family of the pipeline in `folder`, with its configuration read and its parts checked."""
    return pipeline_family(folder).from_folder(folder)
