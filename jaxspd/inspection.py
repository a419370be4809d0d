"""Reports what a file or folder is, for people and machines, from headers and configurations alone."""

from contextlib import suppress
from dataclasses import asdict, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from jaxspd.convert.checkpoint import STEM, weight_entry
from jaxspd.convert.contents import RULES, Contents, describe, expected, layers
from jaxspd.convert.errors import printable
from jaxspd.convert.identify import three
from jaxspd.convert.layouts import TITLES
from jaxspd.convert.loader import assign, flat_parameters
from jaxspd.convert.orbax_store import NAME, OrbaxWeights, is_store
from jaxspd.convert.shapes import config_of, variant_of
from jaxspd.convert.single_file import Relaid, open_transformer
from jaxspd.errors import UsageError
from jaxspd.families import family_class, open_family, pipeline_family
from jaxspd.files import user_path

INDEX = "model_index.json"
# How many names the table for people shows.
SHOWN = 8


def inspect(given: str) -> dict[str, Any]:
    """The report on `given`: a pipeline's folder, a component's folder, or a file.

    Raises UsageError if it cannot be read, is a pickle, or is nothing that jaxspd knows.
    """
    path = user_path(given)
    if (path / INDEX).is_file():
        return inspect_pipeline(path)
    store = next((folder for folder in (path / NAME, path) if is_store(folder)), None)
    found = describe(path) if store is None else identified(store)
    report = asdict(found) | {"path": str(path)}
    if found.kind == "transformer" and found.refused is None:
        report["refused"] = misfit(found)
    if found.family and not found.missing:
        own = "text_encoder_2" if found.variant == "T5" else found.kind
        report["missing"] = [part for part in family_class(found.family).parts if part != own]
    return report


def misfit(found: Contents) -> str | None:
    """Why the sizes of a transformer's tensors do not fit together, or None if they do."""
    assert found.family is not None, "a transformer is known by its family"
    family = family_class(found.family)
    tensors: OrbaxWeights | Relaid
    try:
        if found.layout == NAME:
            tensors = OrbaxWeights(found.path, family.rules)
        else:
            tensors = open_transformer(found.path, found.family)
        config = {name: tuple(v) if isinstance(v, list) else v for name, v in (found.config or {}).items()}
        if found.family == "wan" and "attention_head_dim" not in config:  # it changes no shape
            width = tensors.shape("patch_embedding.weight")[0]
            config |= {"attention_head_dim": width, "num_attention_heads": 1}
        known = {field.name for field in fields(family().config)}
        own = replace(family().config, **{name: v for name, v in config.items() if name in known})
        abstract = replace(family(), config=own).abstract_parameters("float32")
        assign(tensors.keys(), tensors.shape, flat_parameters(abstract), family.rules)
    except UsageError as error:
        return str(error)
    return None


def inspect_pipeline(folder: Path) -> dict[str, Any]:
    """The report on a pipeline's folder, with what it lacks."""
    family_type = pipeline_family(folder)
    parts: dict[str, Contents] = {}
    missing = []
    for part in family_type.parts:
        if not (folder / part).is_dir():
            missing.append(part)
        elif (folder / part / NAME).is_dir():
            parts[part] = converted(folder / part / NAME, family_type)
        elif part not in ("scheduler",) and not part.startswith("tokenizer"):
            names = [path.name for path in (folder / part).iterdir()]
            if weight_entry(names, STEM) or weight_entry(names, "model"):
                parts[part] = describe(folder / part)
            else:
                missing.append(f"{part}/*.safetensors")
    transformer = parts.get("transformer")
    return {
        "path": str(folder),
        "kind": "pipeline",
        "family": family_type.name,
        "layout": transformer.layout if transformer else "diffusers",
        "variant": transformer and transformer.variant,
        "parameters": sum(part.parameters for part in parts.values()),
        "dtype": ", ".join(dict.fromkeys(kind for part in parts.values() for kind in part.dtype.split(", "))),
        "matched": sum(part.matched for part in parts.values()),
        "unmatched": [f"{name}/{key}" for name, part in parts.items() for key in part.unmatched],
        "missing": missing + [f"{name}/{key}" for name, part in parts.items() for key in part.missing],
        "components": {
            name: {"parameters": part.parameters, "dtype": part.dtype, "layout": part.layout}
            for name, part in parts.items()
        },
        "refused": _refused(folder),
    }


def converted(store: Path, family: Any) -> Contents:
    """The contents of an Orbax checkpoint with the transformer of a family. Raises UsageError for others."""
    try:
        weights = OrbaxWeights(store, family.rules)
    except TypeError:  # the family lacks a parameter
        raise UsageError(f"{store} is no transformer of {family().title}; convert it again") from None
    shapes = {key: weights.shape(key) for key in sorted(weights.keys())}
    missing = sorted(set(expected(family.rules, shapes)) - shapes.keys())
    return Contents(
        store,
        "transformer",
        family.name,
        NAME,
        parameters=sum(map(prod, shapes.values())),
        dtype=", ".join(sorted({weights.dtype(key) for key in shapes})),
        matched=len(layers(shapes)),
        unmatched=[],
        missing=missing,
        variant=variant_of(family.name, shapes),
        config=config_of(family.name, shapes),
        refused=f"{len(missing)} tensors are missing: {three(missing)}" if missing else None,
    )


def identified(store: Path) -> Contents:
    """The contents of an Orbax checkpoint that lies outside a pipeline. Raises UsageError if it holds no
    transformer of a known family.
    """
    readings = []
    for name in RULES:
        with suppress(UsageError):
            readings.append(converted(store, family_class(name)))
    if not readings:
        raise UsageError(f"{store} is no transformer of a model that jaxspd runs; convert it again")
    return min(readings, key=lambda found: len(found.missing))


def _refused(folder: Path) -> str | None:
    """The message with which a generator would refuse to open the pipeline, or None."""
    import jax.numpy as jnp

    from jaxspd.components.denoiser import Denoiser
    from jaxspd.components.pipeline import Components

    try:
        family = open_family(folder)
        components = Components(family, jnp.float32)
        components.check()
        Denoiser(family, jnp.float32, components.residency)
    except UsageError as error:
        return str(error)
    return None


def table(report: dict[str, Any]) -> str:
    """The report in lines for people."""
    title = report["variant"] or TITLES.get(report["family"], report["family"]) or "a model not known"
    prefix = f", names begin with {report['prefix']}" if report.get("prefix") else ""
    rows = [
        ("kind", f"{report['kind'].replace('_', ' ')} ({title})"),
        ("family", report["family"] or "-"),
        ("layout", report["layout"] + prefix),
        ("parameters", f"{report['parameters']:,} in {report['dtype']}"),
        ("matched", f"{report['matched']} layers"),
        ("unmatched", _some(report["unmatched"])),
        ("missing", _some(report["missing"])),
    ]
    if beside := report.get("beside"):
        rows.append(("beside", ", ".join(f"{name} ({count} tensors)" for name, count in beside.items())))
    for name, part in report.get("components", {}).items():
        rows.append((f"  {name}", f"{part['parameters']:,} in {part['dtype']}"))
    rows.append(("usable", "yes" if report["refused"] is None else f"no: {report['refused']}"))
    return "\n".join(f"{name:<18}{printable(value)}" for name, value in rows)


def _some(names: list[str]) -> str:
    more = f", … ({len(names)})" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) + more) or "nothing"
