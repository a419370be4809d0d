"""The model families, found by the pipeline class that a checkpoint's `model_index.json` names."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxspd.convert.checkpoint import read_json
from jaxspd.convert.shapes import config_of
from jaxspd.convert.single_file import open_transformer
from jaxspd.errors import UsageError

# Pipeline class in model_index.json -> family. The family's module has the same name and is imported only
# when it is needed.
PIPELINES = {
    "FluxPipeline": "flux1",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "QwenImagePipeline": "qwen_image",
    "WanPipeline": "wan",
    "ZImagePipeline": "z_image",
}


def family_class(name: str) -> Any:
    """The class of the family called `name`, such as "flux1". Raises UsageError for an unknown name."""
    if name not in PIPELINES.values():
        known = ", ".join(sorted(set(PIPELINES.values())))
        raise UsageError(f"unknown family {name!r}; use one of {known}")
    return import_module(f"jaxspd.families.{name}").Family


def pipeline_family(folder: Path, model: str | None = None) -> Any:
    """The class of the family that `folder`'s model_index.json names.

    Raises UsageError for any other pipeline. The message calls it `model`, or if that is None `folder`.
    """
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise UsageError(
            f"{model or folder} is a {pipeline} pipeline; jaxspd runs {', '.join(sorted(PIPELINES))}"
        )
    return family_class(PIPELINES[pipeline])


def open_family(folder: Path, transformer_weights_path: Path | None = None):
    """The family of the pipeline in `folder`, with its configuration read and its parts checked.

    If `transformer_weights_path` is given, the transformer's weights come from there. If `folder` then lacks
    transformer/config.json, the configuration is derived from the weights' shapes. Raises UsageError for a
    pipeline that jaxspd cannot run.
    """
    family = pipeline_family(folder)
    if transformer_weights_path is None:
        return family.from_folder(folder)
    if (folder / "transformer" / "config.json").is_file():
        opened = family.from_folder(folder)
    else:
        opened = family.from_folder(folder, transformer_config(transformer_weights_path, family))
    return replace(opened, transformer_weights_path=transformer_weights_path)


def transformer_config(path: Path, family: Any) -> dict:
    """The configuration of the transformer in the file `path`, derived from its shapes.

    Raises UsageError if the shapes do not determine it.
    """
    opened = open_transformer(path, family.name, family.rules)
    config = config_of(family.name, opened.shapes())
    if config is None:
        raise UsageError(
            f"{path} does not tell its configuration; give a pipeline with transformer/config.json"
        )
    return config
