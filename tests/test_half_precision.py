"""Checkpoints whose weights are all at half precision, under the names that the official libraries give."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from transformers import Qwen3ForCausalLM

from jaxspd.convert.checkpoint import Checkpoint, weight_files
from jaxspd.families import open_family
from jaxspd.generator import DiffGenerator
from jaxspd.hub import fetch
from tests.components import components
from tests.test_hub import hub  # noqa: F401

PARTS = {
    "transformer": Flux2Transformer2DModel,
    "vae": AutoencoderKLFlux2,
    "text_encoder": Qwen3ForCausalLM,
}
REQUEST = {"prompt": "a", "height": 64, "width": 64, "num_inference_steps": 2}


def rewrite(klein_folder, folder, variant, size):
    """The tiny [klein] again, with its weights in float16."""
    shutil.copytree(klein_folder, folder)
    for part, model_class in PARTS.items():
        model = model_class.from_pretrained(klein_folder / part).to(torch.float16)
        for path in folder.glob(f"{part}/*.safetensors"):
            path.unlink()
        model.save_pretrained(folder / part, variant=variant, max_shard_size=size)
    return folder


@pytest.fixture(scope="module")
def plain(klein_folder, tmp_path_factory):
    """Half precision under the names of full precision: what every variant must equal."""
    return rewrite(klein_folder, tmp_path_factory.mktemp("half") / "plain", None, "1GB")


@pytest.fixture(params=["single", "shards", "old shards"])
def variant(request, klein_folder, tmp_path):
    folder = rewrite(klein_folder, tmp_path / "half", "fp16", "1GB" if request.param == "single" else "20KB")
    stem = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    index = stem.with_name(f"{stem.name}.index.fp16.json")
    assert index.exists() == (request.param != "single")
    if request.param == "old shards":
        index.rename(stem.with_name(f"{stem.name}.fp16.index.json"))
    return folder


def picture(folder):
    generator = DiffGenerator.from_pretrained(str(folder), compilation_cache=False)
    return generator.generate(REQUEST, save_output=False, show_progress=False).frames[0]


def test_a_variant_is_used_where_there_is_nothing_else(variant, plain):
    assert all("fp16" in path.name for path in weight_files(variant / "transformer"))
    np.testing.assert_array_equal(picture(variant), picture(plain))


def test_a_variant_is_fetched_where_there_is_nothing_else(hub, variant):  # noqa: F811
    hub.add("maker/half", variant)
    family = fetch("maker/half")
    components(family).check()
    assert weight_files(family.folder / "transformer")
    assert {name for name in hub.names() if "safetensors" in name} == {
        path.relative_to(variant).as_posix() for path in variant.rglob("*safetensors*")
    }
    np.testing.assert_array_equal(
        components(family).encode_text(["a lake"])["text"],
        components(variant).encode_text(["a lake"])["text"],
    )


def test_full_precision_goes_first(klein_folder, variant):
    for part in PARTS:
        for path in (klein_folder / part).iterdir():
            shutil.copy(path, variant / part)
    for part, stem in {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        checkpoint = Checkpoint(variant / part, stem)
        assert {checkpoint.dtype(key) for key in checkpoint.keys()} == {"F32"}  # noqa: SIM118
    theirs = components(klein_folder).encode_text(["a lake"])["text"]
    np.testing.assert_array_equal(components(variant).encode_text(["a lake"])["text"], theirs)


def test_a_conversion_leaves_no_twin_behind(klein_folder, variant, tmp_path, capsys):
    from jaxspd.convert.pipeline_folder import convert_pipeline

    for path in (klein_folder / "transformer").glob("*.safetensors"):
        shutil.copy(path, variant / "transformer")
    convert_pipeline(open_family(variant), tmp_path / "new")
    assert not list((tmp_path / "new" / "transformer").glob("*safetensors*"))
    assert list((tmp_path / "new" / "vae").glob("*.fp16*safetensors"))
