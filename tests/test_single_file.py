"""A transformer from one file, in every layout, prefix and dtype: what the pipeline's folder gives."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxspd.convert.checkpoint import STEM
from jaxspd.convert.gguf_file import GgufCheckpoint
from jaxspd.convert.layouts import LAYOUTS, find
from jaxspd.convert.loader import flat_parameters
from jaxspd.convert.orbax_store import check_transformer, load_transformer
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.convert.single_file import open_transformer, replaced_transformer
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from tests.layouts import in_layout

FOLDERS = {
    "flux1": "flux1_folder",
    "flux2": "klein_folder",
    "qwen_image": "qwen_image_folder",
    "wan": "wan_folder",
    "z_image": "z_image_folder",
}
EVERY = [(family, layout.name) for family, layouts in LAYOUTS.items() for layout in layouts]
PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "net."]


def folder_tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "transformer" / f"{STEM}.safetensors")


@pytest.fixture
def model(request):
    """The family's name, its tiny pipeline, and the tensors of its transformer in diffusers' layout."""

    def of(family: str) -> tuple[Path, dict[str, np.ndarray]]:
        folder = request.getfixturevalue(FOLDERS[family])
        return folder, folder_tensors(folder)

    return of


def write(path: Path, tensors: dict[str, np.ndarray], prefix: str = "", metadata=None) -> Path:
    save_file({prefix + key: np.ascontiguousarray(array) for key, array in tensors.items()}, path, metadata)
    return path


def parameters(folder: Path, path: Path | None = None) -> dict[str, np.ndarray]:
    """The transformer's parameters in float32, of a pipeline or with the weights in another file."""
    family = open_family(folder, path)
    abstract, weights = family.abstract_parameters(jnp.float32), replaced_transformer(family)
    check_transformer(family.folder, abstract, family.rules, weights)
    loaded = flat_parameters(load_transformer(family.folder, abstract, family.rules, weights))
    return {name: np.asarray(array) for name, array in loaded.items()}


def assert_equal(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize(("family", "layout"), EVERY)
def test_every_parameter_is_the_folders(model, tmp_path, family, layout):
    folder, tensors = model(family)
    prefix = PREFIXES[EVERY.index((family, layout)) % len(PREFIXES)]
    path = write(tmp_path / "any name", in_layout(find(family, layout), tensors), prefix)
    assert_equal(parameters(folder, path), parameters(folder))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("family", "layout"), EVERY)
def test_every_tensor_in_half_precision(model, tmp_path, family, layout, dtype):
    _, tensors = model(family)
    prefix = PREFIXES[(EVERY.index((family, layout)) + 1) % len(PREFIXES)]
    halves = {key: array.astype(dtype) for key, array in tensors.items()}
    path = write(tmp_path / "model.safetensors", in_layout(find(family, layout), halves), prefix)
    opened = open_transformer(path, family)
    assert opened.keys() == halves.keys()
    for key, array in halves.items():
        assert opened.dtype(key) == ("F16" if dtype == np.float16 else "BF16")
        assert opened.shape(key) == array.shape
        assert opened.read(key).tobytes() == array.tobytes(), key


def test_a_whole_checkpoint_of_comfyui(model, tmp_path):
    """Text encoders and a VAE lie in the same file; they are not the transformer's."""
    folder, tensors = model("flux1")
    stored = in_layout(find("flux1", "bfl"), tensors)
    beside = {
        f"{name}.weight": np.zeros((2, 3), np.float32)
        for name in (
            "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            "vae.decoder.conv_in",
            "first_stage_model.encoder.conv_in",
            "cond_stage_model.a",
        )
    }
    # Of forms that a transformer must not have.
    beside["text_encoders.clip_l.transformer.text_model.embeddings.position_ids"] = np.arange(3)[None]
    beside["text_encoders.t5xxl.transformer.shared.weight_scale_2"] = np.ones((), np.float32)
    beside["vae.bn.num_batches_tracked"] = np.ones((), np.int64)
    whole = {f"model.diffusion_model.{key}": array for key, array in stored.items()} | beside
    told = {"layers": {"text_encoders.t5xxl.shared": {"format": "nvfp4"}}}
    metadata = {"_quantization_metadata": json.dumps(told)}
    path = write(tmp_path / "whole.safetensors", whole, metadata=metadata)
    assert_equal(parameters(folder, path), parameters(folder))


def test_norms_by_their_other_name(model, tmp_path):
    folder, tensors = model("flux1")
    stored = in_layout(find("flux1", "bfl"), tensors)
    renamed = {key.replace("_norm.scale", "_norm.weight"): array for key, array in stored.items()}
    assert renamed.keys() != stored.keys()
    assert_equal(parameters(folder, write(tmp_path / "a.safetensors", renamed)), parameters(folder))


@pytest.mark.parametrize("form", ["folder", "index"])
def test_shards(model, tmp_path, form):
    folder, tensors = model("wan")
    stored = in_layout(find("wan", "wan"), tensors)
    places = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(stored)}
    for name in set(places.values()):
        write(tmp_path / name, {key: stored[key] for key in stored if places[key] == name})
    index = tmp_path / "any.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    path = tmp_path if form == "folder" else index
    assert_equal(parameters(folder, path), parameters(folder))


# 8 bits

FP8 = ml_dtypes.float8_e4m3fn


def quantised(tensors, scale_of, suffix="scale_weight", dtype=FP8):
    """Matrices in 8 bits and their scales, and what they stand for; what is no matrix stays."""
    stored, meant = {}, {}
    for key, array in tensors.items():
        if not key.endswith(".weight") or array.ndim != 2:
            stored[key] = meant[key] = array
            continue
        scale = scale_of(array)
        spread = scale.reshape(len(scale), -1) if scale.size > 1 else scale
        if spread.ndim == 2 and spread.shape[1] > 1:
            spread = spread.repeat(array.shape[1] // spread.shape[1], axis=1)
        small = (array / spread).astype(dtype)
        stored[key], stored[key.removesuffix("weight") + suffix] = small, scale
        meant[key] = small.astype(np.float32) * spread
    return stored, meant


def scalar(array):
    return np.float32(np.abs(array).max() / 448)


SCALES = {
    "a number": lambda array: np.asarray(scalar(array)),
    "one": lambda array: scalar(array).reshape(1),
    "rows": lambda array: (np.abs(array).max(1, keepdims=True) / 448).astype(np.float32),
    "rows without an axis": lambda array: (np.abs(array).max(1) / 448).astype(np.float32),
    "blocks": lambda array: (
        (np.abs(array).reshape(len(array), 2, -1).max(2, keepdims=True) / 448).astype(np.float32)
        if array.shape[1] % 2 == 0
        else (np.abs(array).max(1).reshape(-1, 1, 1) / 448).astype(np.float32)
    ),
}


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("family", "layout"), [("flux1", "bfl"), ("wan", "wan"), ("qwen_image", "diffusers")]
)
def test_scaled_fp8(model, tmp_path, family, layout, scale, suffix):
    folder, tensors = model(family)
    form = find(family, layout)
    stored, meant = quantised(in_layout(form, tensors), SCALES[scale], suffix)
    layers = [key.removesuffix(suffix) for key in stored if key.endswith(suffix)]
    assert layers
    if suffix == "weight_scale":
        mark = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
        stored |= {f"{layer}comfy_quant": mark for layer in layers}
        stored |= {f"{layer}input_scale": np.ones(1, np.float32) for layer in layers}
    else:
        stored |= {f"{layer}scale_input": np.ones(1, np.float32) for layer in layers}
        stored["scaled_fp8"] = np.zeros(2, FP8)
    prefix = "model.diffusion_model."
    expected = {t.key: t.take(array) for key, array in meant.items() for t in form.targets(key)}
    opened = open_transformer(write(tmp_path / "fp8.safetensors", stored, prefix), family)
    assert opened.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(opened.read(key), array, err_msg=key)
    parameters(folder, tmp_path / "fp8.safetensors")  # fits, and loads


def test_int8_with_a_scale_for_each_row(model, tmp_path):
    _, tensors = model("wan")
    form = find("wan", "wan")
    stored, meant = quantised(
        in_layout(form, tensors), lambda a: np.abs(a).max(1, keepdims=True) / 127, "weight_scale", np.int8
    )
    opened = open_transformer(write(tmp_path / "int8.safetensors", stored), "wan")
    for key, array in meant.items():
        for target in form.targets(key):
            np.testing.assert_array_equal(opened.read(target.key), target.take(array))


@pytest.mark.parametrize("dtype", [FP8, ml_dtypes.float8_e5m2])
def test_plain_fp8(model, tmp_path, dtype):
    folder, tensors = model("z_image")
    small = {key: array.astype(dtype) for key, array in tensors.items()}
    path = write(tmp_path / "fp8.safetensors", in_layout(find("z_image", "comfyui"), small))
    opened = open_transformer(path, "z_image")
    for key, array in small.items():
        assert opened.dtype(key) == "BF16"
        np.testing.assert_array_equal(opened.read(key).astype(np.float32), array.astype(np.float32))
    family = replace(open_family(folder), transformer_weights_path=path)
    convert_pipeline(family, tmp_path / "new", "safetensors")
    for key, array in folder_tensors(tmp_path / "new").items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.astype(np.float32), small[key].astype(np.float32))


def test_a_scale_that_does_not_fit_is_refused(model, tmp_path):
    _, tensors = model("wan")
    stored, _ = quantised(tensors, SCALES["rows"])
    stored["blocks.1.ffn.net.2.scale_weight"] = np.ones((49, 1), np.float32)
    with pytest.raises(UsageError, match="does not fit its weight"):
        open_transformer(write(tmp_path / "a.safetensors", stored), "wan")


# Pipelines made of it


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_a_pipeline_is_made_of_a_file(model, tmp_path, format):
    folder, tensors = model("flux1")
    path = write(tmp_path / "dev.safetensors", in_layout(find("flux1", "bfl"), tensors))
    family = replace(open_family(folder), transformer_weights_path=path)
    convert_pipeline(family, tmp_path / "new", format)
    assert (tmp_path / "new" / "vae" / "config.json").is_file()
    assert_equal(parameters(tmp_path / "new"), parameters(folder))
    assert ((tmp_path / "new" / "transformer" / f"{STEM}.safetensors").exists()) == (format != "orbax")


def test_large_weights_are_written_in_shards(model, tmp_path, monkeypatch):
    folder, tensors = model("flux1")
    monkeypatch.setattr("jaxspd.convert.pipeline_folder.SHARD", 50_000)
    convert_pipeline(open_family(folder), tmp_path / "new", "safetensors")
    names = sorted(path.name for path in (tmp_path / "new" / "transformer").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"{STEM}-00001-of-{len(names):05}.safetensors"
    assert_equal(parameters(tmp_path / "new"), parameters(folder))
    index = json.loads((tmp_path / "new" / "transformer" / f"{STEM}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())


# GGUF


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind_of) -> dict[str, np.ndarray]:
    """A file of them, and what they stand for."""
    import gguf

    writer, meant = gguf.GGUFWriter(path, "flux"), {}
    for key, array in tensors.items():
        kind = kind_of(key, array)
        packed = gguf.quantize(array, kind)
        writer.add_tensor(key, packed, raw_dtype=kind)
        meant[key] = gguf.dequantize(packed, kind).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize(("family", "layout"), [("flux1", "bfl"), ("wan", "wan"), ("z_image", "comfyui")])
def test_gguf(model, tmp_path, family, layout):
    from gguf import GGMLQuantizationType as Kind

    def kind_of(key, array):
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            return Kind.Q8_0
        return Kind.F32 if array.ndim != 2 else Kind.BF16 if "0" in key else Kind.F16

    folder, tensors = model(family)
    form, path = find(family, layout), tmp_path / "model.gguf"
    meant = write_gguf(path, in_layout(form, tensors), kind_of)
    expected = {t.key: t.take(array) for key, array in meant.items() for t in form.targets(key)}
    opened = open_transformer(path, family)
    assert opened.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(opened.read(key), array, err_msg=key)
    converted = replace(open_family(folder), transformer_weights_path=path)
    convert_pipeline(converted, tmp_path / "new", "orbax")
    assert_equal(parameters(tmp_path / "new"), parameters(folder, path))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_1", "Q6_K", "Q2_K", "Q3_K", "Q8_0", "IQ4_XS"])
def test_rows_of_gguf_are_those_of_the_whole(tmp_path, kind):
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    packed = np.random.default_rng(0).integers(0, 60, (6, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_tensor("a", packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    checkpoint.check_floats()
    whole = gguf.dequantize(packed, number)
    assert checkpoint.shape("a") == whole.shape == (6, 512)
    assert checkpoint.stored_dtype("a") == kind
    np.testing.assert_array_equal(checkpoint.read("a"), whole)
    np.testing.assert_array_equal(checkpoint.read("a", slice(2, 5)), whole[2:5])


def test_tensors_whose_shape_gguf_has_changed(tmp_path):
    import gguf

    kernel = np.arange(6 * 4 * 1 * 2 * 2, dtype=np.float32).reshape(6, 4, 1, 2, 2)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(kernel.shape))
    writer.add_tensor("patch_embedding.weight", kernel.reshape(3, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    np.testing.assert_array_equal(checkpoint.read("patch_embedding.weight"), kernel)
    np.testing.assert_array_equal(checkpoint.read("patch_embedding.weight", slice(1, 3)), kernel[1:3])
