"""`--transformer-weights-path`: a pipeline with a transformer from elsewhere, and what is refused."""

import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspd import DiffGenerator
from jaxspd.cli import main
from jaxspd.convert.layouts import find
from jaxspd.convert.orbax_store import check_transformer
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.convert.single_file import replaced_transformer
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.hub import fetch
from tests import tiny
from tests.layouts import in_layout
from tests.test_single_file import assert_equal, folder_tensors, parameters, write

REQUEST = {"prompt": "a lake", "height": 64, "width": 96, "num_inference_steps": 4}


@pytest.fixture(scope="session")
def bfl(flux1_folder, tmp_path_factory):
    """FLUX.1's tiny transformer as its authors keep it."""
    stored = in_layout(find("flux1", "bfl"), folder_tensors(flux1_folder))
    return write(tmp_path_factory.mktemp("files") / "dev.safetensors", stored)


@pytest.fixture(scope="session")
def rest(flux1_folder, tmp_path_factory):
    """The pipeline without its transformer's weights."""
    folder = tmp_path_factory.mktemp("files") / "rest"
    shutil.copytree(flux1_folder, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def test_pictures_are_the_pipelines_own_though_its_layers_are_streamed(flux1_folder, rest, bfl):
    own, other = (
        DiffGenerator.from_pretrained(**model).generate(REQUEST, save_output=False, show_progress=False)
        for model in (
            {"model_path": flux1_folder},
            {"model_path": rest, "transformer_weights_path": bfl, "dit_cpu_offload": True},
        )
    )
    np.testing.assert_array_equal(own.frames[0], other.frames[0])
    assert other.requests[0]["transformer_weights_path"] == str(bfl)
    assert "transformer_weights_path" not in own.requests[0]


def test_a_request_for_other_weights_is_refused(rest, bfl, tmp_path):
    generator = DiffGenerator.from_pretrained(rest, transformer_weights_path=bfl)
    with pytest.raises(UsageError, match=r"this request is for .*other\.gguf"):
        generator.plan(REQUEST | {"transformer_weights_path": str(tmp_path / "other.gguf")})
    generator.plan(REQUEST | {"transformer_weights_path": str(bfl)})


def test_a_pipeline_without_a_transformer_is_told_its_size_by_the_file(wan_folder, tmp_path):
    """At the official head size, from which the number of heads follows."""
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder, ignore=shutil.ignore_patterns("transformer"))
    transformer = tiny.wan_transformer(num_attention_heads=1, attention_head_dim=128)
    tensors = {key: tensor.numpy() for key, tensor in transformer.state_dict().items()}
    path = write(tmp_path / "wan.safetensors", in_layout(find("wan", "wan"), tensors))
    family = fetch(folder, transformer_weights_path=path)
    given = {name: getattr(transformer.config, name) for name in vars(family.config)}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()} == vars(family.config)
    convert_pipeline(family, tmp_path / "new", "safetensors")
    assert_equal(parameters(tmp_path / "new"), parameters(folder, path))


def test_convert_takes_a_file(rest, flux1_folder, bfl, tmp_path, capsys):
    flags = ["--model-path", str(rest), "--transformer-weights-path", str(bfl), "--format", "safetensors"]
    assert main(["convert", *flags, "--output-path", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'new'}\n"
    ours, theirs = folder_tensors(tmp_path / "new"), folder_tensors(flux1_folder)
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key])


# Refused, in one line


def check(folder, path) -> None:
    family = replace(open_family(folder), transformer_weights_path=path)
    weights = replaced_transformer(family)
    check_transformer(family.folder, family.abstract_parameters(jnp.float32), family.rules, weights)


def one_line(folder, path) -> str:
    """Why `path` cannot take the place of the transformer in `folder`."""
    with pytest.raises(UsageError) as caught:
        check(folder, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def refusal(flux1_folder, wan_folder, tmp_path):
    """The line that a file of `tensors` is refused with, for FLUX.1's pipeline or Wan's."""

    def of(tensors, family="flux1", metadata=None) -> str:
        path = write(tmp_path / "x.safetensors", tensors, metadata=metadata)
        return one_line({"flux1": flux1_folder, "wan": wan_folder}[family], path)

    return of


@pytest.fixture(scope="session")
def flux1(flux1_folder):
    return in_layout(find("flux1", "bfl"), folder_tensors(flux1_folder))


@pytest.fixture(scope="session")
def wan(wan_folder):
    return in_layout(find("wan", "wan"), folder_tensors(wan_folder))


def ones(*shape):
    return np.ones(shape, np.float32)


def test_another_family(refusal, wan):
    assert "is a transformer of Wan, the pipeline is FLUX.1" in refusal(wan)


def test_another_size(refusal, flux1):
    more = {key.replace(".2.", ".3."): array for key, array in flux1.items() if "single_blocks.2." in key}
    line = refusal(flux1 | more)
    assert "does not fit the pipeline's transformer/config.json" in line
    assert "left over: single_transformer_blocks.3" in line


def test_half_of_it(refusal, flux1):
    assert "missing: " in refusal(
        {key: array for key, array in flux1.items() if "double_blocks.1" not in key}
    )


def test_fill_and_control(refusal, flux1):
    line = refusal(flux1 | {"img_in.weight": ones(48, 96)})
    assert "reads 96 channels and makes 16" in line


def test_tensors_of_no_such_transformer_are_named(refusal, flux1):
    line = refusal(flux1 | {f"extra.{number}.weight": ones(2) for number in range(5)})
    assert "5 tensors are none of FLUX.1's: extra.0.weight, extra.1.weight, extra.2.weight, …" in line


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"blocks.0.cross_attn.k_img.weight": ones(48, 48)}, "image-to-video"),
        ({"img_emb.proj.0.weight": ones(48)}, "image-to-video"),
        ({"patch_embedding.weight": ones(48, 36, 1, 2, 2)}, "image-to-video"),
        ({"patch_embedding.weight": ones(48, 48, 1, 2, 2)}, "TI2V-5B"),
        ({"vace_blocks.0.before_proj.weight": ones(48, 48)}, "VACE"),
    ],
)
def test_other_models_of_wan(refusal, wan, more, says):
    assert says in refusal(wan | more, "wan")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"blocks.0.ffn.0.weight_scale_2": ones()}, "nvfp4"),
        ({"blocks.0.ffn.0.weight.absmax": ones(3)}, "bitsandbytes"),
        ({"blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4": np.ones(3, np.uint8)}, "bitsandbytes"),
        ({"blocks.0.ffn.0.qweight": np.ones((3, 4), np.int8), "blocks.0.ffn.0.wscales": ones(3)}, "nunchaku"),
        ({"blocks.0.ffn.0.comfy_quant": np.frombuffer(b'{"format": "mxfp8"}', np.uint8)}, "mxfp8"),
        (
            {
                "blocks.0.ffn.0.comfy_quant": np.frombuffer(
                    b'{"format": "float8_e4m3fn", "convrot": true}', np.uint8
                )
            },
            "convrot",
        ),
        ({"blocks.0.ffn.0.comfy_quant": np.frombuffer(b"{no json", np.uint8)}, "cannot be read"),
        ({"blocks.0.ffn.0.weight": np.ones((40, 48), np.int8)}, "stores weights as I8"),
    ],
)
def test_forms_of_quantisation_that_are_not_read(refusal, wan, more, says):
    assert says in refusal(wan | more, "wan")


def test_a_form_named_in_the_metadata(refusal, wan):
    metadata = {"_quantization_metadata": '{"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}'}
    assert "nvfp4" in refusal(wan, "wan", metadata)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "LoRA"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "LoRA"),
        ("decoder.conv_in.weight", "VAE"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "text encoder"),
        ("down_blocks.0.resnets.0.conv1.weight", "its tensors are down_blocks.0.resnets.0.conv1.weight"),
    ],
)
def test_files_of_other_things(refusal, name, says):
    assert says in refusal({name: ones(4, 4)})


def test_two_names_of_one_tensor(refusal, flux1):
    twice = {"double_blocks.0.img_attn.norm.key_norm.weight": ones(16)}
    assert "two names of one tensor" in refusal(flux1 | twice)


def test_rows_that_cannot_be_cut(refusal, flux1):
    assert "cannot be cut" in refusal(flux1 | {"double_blocks.0.img_attn.qkv.weight": ones(143, 48)})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.pt", b"anything", "pickle"),
        ("model.ckpt", b"", "pickle"),
        ("model.bin", b"anything", "pickle"),
        ("model.pth", b"anything", "pickle"),
        ("model.safetensors", b"PK\3\4 and so on", "pickle"),
        ("model.safetensors", b"\x80\2\x8a\nl\xfc\x9cF\xf9", "pickle"),
        ("model.safetensors", b"", "truncated or no safetensors"),
        ("model.gguf", b"GGUF\3\0\0\0", "truncated or no GGUF"),
        ("model.json", b"{}", "is damaged"),
    ],
)
def test_files_that_are_not_read(flux1_folder, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert says in one_line(flux1_folder, tmp_path / name)


def test_paths_that_are_none(flux1_folder, tmp_path):
    assert "does not exist" in one_line(flux1_folder, tmp_path / "a")
    (tmp_path / "empty").mkdir()
    line = one_line(flux1_folder, tmp_path / "empty")
    assert "holds 0 files of weights" in line
    (tmp_path / "empty" / "model.bin").touch()
    line = one_line(flux1_folder, tmp_path / "empty")
    assert "pickles are never loaded" in line


def test_without_a_pipeline_it_is_the_demos(refused, bfl):
    assert "does not fit the pipeline's" in refused("--transformer-weights-path", str(bfl))
