"""`jaxspd inspect`: what a file or folder is, from its header, at the size of the published models."""

import json
import shutil

import numpy as np
import pytest

from jaxspd.cli import main
from jaxspd.convert.layouts import LAYOUTS
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.convert.shapes import config_of
from jaxspd.families import open_family
from tests.headers import lora, single_file, write_header
from tests.test_full_size import ARCHITECTURES, CHECKPOINTS
from tests.test_lora_names import KOHYA, PEFT, control, flat
from tests.test_official_keys import VAES, of_module, of_rules

VARIANTS = {
    "FLUX.1-dev": "FLUX.1 [dev]",
    "FLUX.1-schnell": "FLUX.1 [schnell]",
    "FLUX.2-dev": "FLUX.2 [dev]",
    "FLUX.2-klein-4B": "FLUX.2 [klein] 4B",
    "FLUX.2-klein-9B": "FLUX.2 [klein] 9B",
    "Qwen-Image": "Qwen-Image",
    "Wan2.1-T2V-1.3B": "Wan 2.1 T2V 1.3B",
    "Wan2.1-T2V-14B": "Wan T2V 14B",
    "Z-Image": "Z-Image",
}
FILES = [
    (checkpoint, layout.name) for checkpoint in CHECKPOINTS for layout in LAYOUTS[CHECKPOINTS[checkpoint][0]]
]


@pytest.fixture
def inspect(capsys):
    """What the command says of a path, as JSON."""

    def run(path, code=0):
        assert main(["inspect", str(path), "--json"]) == code
        captured = capsys.readouterr()
        if code:
            assert captured.out == ""
            (line,) = captured.err.splitlines()
            return line
        assert captured.err == ""
        return json.loads(captured.out)

    return run


@pytest.mark.parametrize(("checkpoint", "layout"), FILES)
def test_single_files_of_the_published_models(inspect, tmp_path, checkpoint, layout):
    family, _, _, parameters = CHECKPOINTS[checkpoint]
    prefix = "model.diffusion_model." if layout != "diffusers" else ""
    path = write_header(tmp_path / "a.safetensors", single_file(checkpoint, layout, prefix))
    report = inspect(path)
    assert report["kind"] == "transformer"
    assert (report["family"], report["layout"], report["prefix"]) == (family, layout, prefix)
    assert (report["variant"], report["parameters"]) == (VARIANTS[checkpoint], parameters)
    assert (report["dtype"], report["unmatched"], report["refused"]) == ("BF16", [], None)
    assert {"scheduler", "text_encoder", "vae"} <= set(report["missing"])
    assert "transformer" not in report["missing"]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_shapes_tell_the_official_configuration(checkpoint):
    family, options, *_ = CHECKPOINTS[checkpoint]
    official = vars(ARCHITECTURES[family].config(**options))
    told = config_of(family, of_rules(checkpoint))
    assert len(told) >= 5
    same = {key: value for key, value in told.items() if key in official}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in official.items() if key in same} == same


def test_whole_checkpoints_of_comfyui(inspect, tmp_path):
    shapes = single_file("FLUX.1-schnell", "bfl", "model.diffusion_model.")
    shapes |= {f"text_encoders.t5xxl.transformer.encoder.block.{n}.a.weight": (2, 2) for n in range(24)}
    shapes |= {"vae.encoder.conv_in.weight": (4, 3, 3, 3), "text_encoders.clip_l.logit_scale": ()}
    shapes |= {"text_encoders.t5xxl.transformer.shared.weight_scale_2": ()}  # no form of the transformer
    report = inspect(write_header(tmp_path / "a.safetensors", shapes, "F8_E4M3"))
    assert (report["kind"], report["family"], report["dtype"]) == ("transformer", "flux1", "F8_E4M3")
    assert report["parameters"] == CHECKPOINTS["FLUX.1-schnell"][3]
    assert report["beside"] == {"text_encoders": 25, "vae": 1}
    assert (report["unmatched"], report["refused"]) == ([], None)


def test_scaled_fp8_counts_only_weights(inspect, tmp_path):
    shapes = single_file("Wan2.1-T2V-1.3B", "wan")
    scales = {key.replace(".weight", ".scale_weight"): () for key in shapes if key.endswith(".weight")}
    others = dict.fromkeys(scales, "F32") | dict.fromkeys(
        (key for key, shape in shapes.items() if len(shape) == 1), "F32"
    )
    path = write_header(tmp_path / "a.safetensors", shapes | scales | {"scaled_fp8": (2,)}, "F8_E4M3", others)
    report = inspect(path)
    assert report["parameters"] == CHECKPOINTS["Wan2.1-T2V-1.3B"][3]
    assert report["dtype"] == "F8_E4M3, F32"
    assert (report["unmatched"], report["refused"]) == ([], None)


def test_what_is_missing_of_a_shard(inspect, tmp_path):
    shapes = single_file("FLUX.1-dev", "diffusers")
    half = {key: shape for key, shape in shapes.items() if not key.startswith("transformer_blocks.18.")}
    report = inspect(
        write_header(
            tmp_path / "a.safetensors", {**half, "transformer_blocks.18.norm1.linear.bias": (18432,)}
        )
    )
    assert set(report["missing"]) == shapes.keys() - half.keys() - {"transformer_blocks.18.norm1.linear.bias"}
    assert "tensors are missing" in report["refused"]


@pytest.mark.parametrize(
    ("checkpoint", "layout", "more", "says"),
    [
        ("FLUX.1-dev", "bfl", {"img_in.weight": (3072, 384)}, "384 channels"),
        ("FLUX.1-dev", "bfl", {"img_in.weight": (3072, 128)}, "Depth"),
        ("Wan2.1-T2V-14B", "wan", {"patch_embedding.weight": (5120, 36, 1, 2, 2)}, "image-to-video"),
        ("Wan2.1-T2V-14B", "wan", {"img_emb.proj.0.weight": (1280,)}, "image-to-video"),
        ("Wan2.1-T2V-1.3B", "diffusers", {"blocks.0.attn2.add_k_proj.weight": (8, 8)}, "image-to-video"),
        ("Wan2.1-T2V-1.3B", "wan", {"patch_embedding.weight": (1536, 48, 1, 2, 2)}, "TI2V-5B"),
        ("Wan2.1-T2V-1.3B", "wan", {"vace_blocks.0.a.weight": (8, 8)}, "VACE"),
        ("Qwen-Image", "diffusers", {"time_text_embed.addition_t_embedding.weight": (2, 8)}, "Layered"),
        ("Z-Image", "comfyui", {"control_layers.0.a.weight": (8, 8)}, "ControlNet"),
        ("FLUX.1-dev", "bfl", {"double_blocks.0.img_mlp.0.weight_scale_2": ()}, "nvfp4"),
        ("FLUX.1-dev", "bfl", {"double_blocks.0.img_mlp.0.weight.absmax": (8,)}, "bitsandbytes"),
        ("FLUX.1-dev", "diffusers", {"transformer_blocks.0.qkv_proj.qweight": (8, 8)}, "nunchaku"),
    ],
)
def test_models_and_forms_that_are_not_run(inspect, tmp_path, checkpoint, layout, more, says):
    report = inspect(write_header(tmp_path / "a.safetensors", single_file(checkpoint, layout) | more))
    assert report["kind"] == "transformer"
    assert report["family"] == CHECKPOINTS[checkpoint][0]
    assert says in report["refused"]


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("double_blocks.3.img_mlp.2.weight", (3072, 12289)),
        ("double_blocks.3.img_mlp.2.bias", (3072, 1)),
        ("img_in.weight", (3072,)),
        ("single_blocks.0.linear1.weight", (21505, 3072)),
    ],
)
def test_tensors_that_do_not_fit_together(inspect, tmp_path, key, shape):
    shapes = single_file("FLUX.1-dev", "bfl") | {key: shape}
    assert inspect(write_header(tmp_path / "a.safetensors", shapes))["refused"]


def test_loras(inspect, tmp_path):
    dev = single_file("FLUX.1-dev", "bfl")
    whole = lora(dev, flat("lora_unet_"), *KOHYA, rank=4, alpha=True)
    report = inspect(write_header(tmp_path / "a.safetensors", whole))
    assert (report["kind"], report["family"], report["layout"]) == ("lora", "flux1", "kohya")
    assert (report["matched"], report["unmatched"], report["refused"]) == (314, [], None)
    assert "transformer" in report["missing"]

    half = {key: shape for key, shape in whole.items() if key != "lora_unet_img_in.lora_up.weight"}
    report = inspect(write_header(tmp_path / "b.safetensors", half))
    assert report["missing"] == ["lora_unet_img_in up"]
    assert "half a LoRA" in report["refused"]

    wrong = whole | {"lora_unet_img_in.lora_up.weight": (3072, 5)}
    assert "of rank 4 and 5" in inspect(write_header(tmp_path / "c.safetensors", wrong))["refused"]

    report = inspect(write_header(tmp_path / "d.safetensors", control(dev)))
    assert (report["layout"], report["matched"], len(report["unmatched"])) == ("control", 314, 152)
    assert "need a picture" in report["refused"]

    dora = lora(dev, "transformer.{}".format, *PEFT, rank=4)
    dora |= {key.replace("lora_A.weight", "dora_scale"): (8,) for key in dora if "lora_A" in key}
    report = inspect(write_header(tmp_path / "e.safetensors", dora))
    assert "DoRA" in report["refused"]
    assert (report["matched"], report["unmatched"]) == (314, [])

    foreign = lora({"down_blocks.0.a.weight": (8, 8)}, flat("lora_unet_"), *KOHYA, rank=4)
    assert "a LoRA for another model" in inspect(write_header(tmp_path / "f.safetensors", foreign), 2)


@pytest.mark.parametrize("vae", VAES)
def test_vaes(inspect, tmp_path, vae):
    kind, options, _ = VAES[vae]
    report = inspect(write_header(tmp_path / "a.safetensors", of_module(lambda: kind(**options))))
    assert (report["kind"], report["layout"], report["unmatched"]) == ("vae", "diffusers", [])
    family = {"FLUX.1": "flux1", "FLUX.2": "flux2", "Qwen-": "wan", "Wan's": "wan"}[
        vae[:6] if "F" in vae else vae[:5]
    ]
    assert report["family"] == family
    assert report["refused"] is None


@pytest.mark.parametrize(
    "folder", ["flux1_folder", "klein_folder", "wan_folder", "qwen_image_folder", "z_image_folder"]
)
def test_pipelines_and_their_components(inspect, request, folder):
    folder = request.getfixturevalue(folder)
    report = inspect(folder)
    assert (report["kind"], report["layout"]) == ("pipeline", "diffusers")
    assert (report["unmatched"], report["missing"], report["refused"]) == ([], [], None)
    family = report["family"]
    total = 0
    for part in report["components"]:
        own = inspect(folder / part)
        total += own["parameters"]
        assert own["kind"] == ("text_encoder" if part.startswith("text_encoder") else part)
        assert own["unmatched"] == []
        if own["kind"] == "transformer":
            assert own["family"] == family
    assert total == report["parameters"]


def test_a_converted_pipeline(inspect, flux1_folder, tmp_path):
    convert_pipeline(open_family(flux1_folder), tmp_path / "new")
    ours, theirs = inspect(tmp_path / "new"), inspect(flux1_folder)
    assert (ours["layout"], ours["refused"], ours["missing"]) == ("orbax", None, [])
    for field in ("family", "parameters", "dtype", "matched", "unmatched"):
        assert ours[field] == theirs[field]
    # The transformer alone, by either of its folders.
    part = tmp_path / "new" / "transformer"
    alone = inspect(part)
    assert (alone["kind"], alone["family"], alone["layout"]) == ("transformer", "flux1", "orbax")
    assert (alone["unmatched"], alone["refused"]) == ([], None)
    assert alone["parameters"] == ours["components"]["transformer"]["parameters"]
    assert inspect(part / "orbax") | {"path": None} == alone | {"path": None}


@pytest.mark.parametrize("name", ["klein", "qwen_image", "wan", "z_image"])
def test_a_converted_transformer_tells_its_family(inspect, request, tmp_path, name):
    family = open_family(request.getfixturevalue(f"{name}_folder"))
    convert_pipeline(family, tmp_path / "new")
    alone = inspect(tmp_path / "new" / "transformer")
    assert (alone["family"], alone["refused"]) == (family.name, None)


def test_a_store_of_something_else(inspect, tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "store", {"a": np.zeros(2, np.float32)})
    assert "is no transformer of a model that jaxspd runs" in inspect(tmp_path / "store", code=2)


def test_what_a_pipeline_lacks(inspect, flux1_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(flux1_folder, folder)
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    report = inspect(folder)
    assert report["missing"] == ["tokenizer_2", "vae/*.safetensors"]
    assert "lacks tokenizer_2" in report["refused"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.pt", b"x", "pickle"),
        ("model.ckpt", b"x", "pickle"),
        ("model.safetensors", b"PK\3\4\0\0\0\0", "pickle"),
        ("model.safetensors", b"\xff" * 20, "truncated or no safetensors"),
        ("model.gguf", b"GGUF", "truncated or no GGUF"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", "no tensors"),
        ("model.png", b"\x89PNG\r\n\x1a\n", "no safetensors"),
    ],
)
def test_what_is_not_read(inspect, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert says in inspect(tmp_path / name, 2)


def test_other_models_and_pipelines(inspect, tmp_path):
    unet = {f"model.diffusion_model.input_blocks.{n}.0.in_layers.0.weight": (320,) for n in range(9)}
    assert "is no transformer" in inspect(write_header(tmp_path / "a.safetensors", unet), 2)
    assert "does not exist" in inspect(tmp_path / "nowhere", 2)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert "is a StableDiffusionXLPipeline pipeline" in inspect(tmp_path, 2)


def test_in_words(capsys, flux1_folder):
    assert main(["inspect", str(flux1_folder)]) == 0
    said = capsys.readouterr().out
    for word in ("pipeline (FLUX.1)", "flux1", "diffusers", "F32", "usable            yes"):
        assert word in said
