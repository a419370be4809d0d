"""LoRA files that cannot be merged: one line each, before any weight is read."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxspd.convert.lora import changes, transformer
from jaxspd.convert.lora_file import LoraFile
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.loras import Loras
from tests.test_lora import stored

LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture
def line(tmp_path, flux1_folder):
    """Writes a file of zeros of such shapes, merges it, and gives the line that refuses it."""

    def refuse(shapes, folder=flux1_folder):
        path = tmp_path / "lora.safetensors"
        save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, path)
        family = open_family(folder)
        with pytest.raises(UsageError) as error:
            changes([(LoraFile(path), 1.0)], transformer(family.name, stored(family), family.rules))
        [text] = str(error.value).splitlines()
        return text

    return refuse


@pytest.fixture
def dim(flux1_folder):
    return stored(open_family(flux1_folder)).shape("transformer_blocks.0.attn.to_q.weight")[0]


def pair(name, rows, columns, rank=2):
    return {f"{name}.lora_A.weight": (rank, columns), f"{name}.lora_B.weight": (rows, rank)}


def test_layers_that_the_model_has_not_are_named(line, dim):
    strange = {}
    for number in range(5):
        strange |= pair(f"transformer.transformer_blocks.{number + 90}.attn.to_q", dim, dim)
    told = line(pair(LAYER, dim, dim) | strange)
    assert "does not have: " in told
    assert told.count("lora_") == 3


def test_another_familys_lora_is_called_so(line, dim, wan_folder):
    assert "is a LoRA for Wan, not for FLUX.1" in line(pair("diffusion_model.blocks.0.cross_attn.q", 4, 4))
    kohya = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (2, dim),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (3 * dim, 2),
    }
    assert "is a LoRA for FLUX.1 or FLUX.2, not for Wan" in line(kohya, wan_folder)


def test_other_sizes_are_told(line, dim):
    told = line(pair(LAYER, dim, dim + 1))
    assert f"changes {dim}×{dim + 1} numbers" in told
    assert f"takes {dim}×{dim}" in told
    # A fused one whose rows are in no equal parts.
    assert "does not fit" in line(pair("double_blocks.0.img_attn.qkv", 3 * dim + 1, dim))


@pytest.mark.parametrize("number", [0, 1])
def test_half_a_lora(line, dim, number):
    key, shape = list(pair(LAYER, dim, dim).items())[number]
    other = "lora_up or lora_B" if number == 0 else "lora_down or lora_A"
    assert f"half a LoRA: {key} without {other}" in line({key: shape})


def test_half_of_other_forms(line, dim):
    whole = pair(LAYER, dim, dim)
    assert "without lokr_w2" in line({"lycoris_x.lokr_w1": (2, 2)})
    assert "without lokr_w1_b" in line({"x.lokr_w1_a": (2, 2), "x.lokr_w2": (2, 2)})
    assert "without hada_w2_b" in line({f"x.hada_{n}": (2, 2) for n in ("w1_a", "w1_b", "w2_a")})
    assert "half a LoRA: x.alpha without" in line(whole | {"x.alpha": ()})


def test_factors_of_different_ranks(line, dim):
    shapes = {f"{LAYER}.lora_A.weight": (2, dim), f"{LAYER}.lora_B.weight": (dim, 3)}
    assert "are of rank 2 and 3" in line(shapes)
    assert "are of rank 0 and 0" in line(pair(LAYER, dim, dim, rank=0))


def test_forms_that_are_not_merged(line, dim):
    whole = pair(LAYER, dim, dim)
    assert "is a DoRA" in line(whole | {f"{LAYER}.dora_scale": (dim, 1)})
    assert "is a DoRA" in line(whole | {f"{LAYER}.lora_magnitude_vector.default.weight": (dim,)})
    assert "need a picture" in line(whole | {f"{LAYER}.lora_B.bias": (dim,)})
    assert "factors of convolutions" in line(whole | {f"{LAYER}.lora_mid.weight": (2, 2)})
    assert "no part of a LoRA: double_blocks.0.img_attn.norm.key_norm.scale" in line(
        whole | {"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}
    )
    assert "no part of a LoRA" in line(whole | {"x.oft_blocks": (2, 2)})


def test_one_layer_under_two_names(line, dim):
    twice = pair(LAYER, dim, dim) | pair(LAYER.removeprefix("transformer."), dim, dim)
    assert "are two names of one layer" in line(twice)
    adapters = {f"{LAYER}.lora_A.{name}.weight": (2, dim) for name in ("one", "other")}
    assert "are two names of one tensor" in line(adapters)


def test_image_to_video(line, wan_folder):
    dim = stored(open_family(wan_folder)).shape("blocks.0.attn1.to_q.weight")[0]
    name = "diffusion_model.blocks.0.cross_attn"
    assert "for Wan image-to-video" in line(
        pair(f"{name}.q", dim, dim) | pair(f"{name}.k_img", dim, dim), wan_folder
    )


def test_what_is_no_lora(line):
    assert "is no LoRA: its tensors are x.weight" in line({"x.weight": (2, 2)})
    assert "is no LoRA: it has no tensors" in line({})
    assert "is no LoRA: its tensors are x.alpha" in line({"x.alpha": ()})


def test_an_alpha_that_is_no_number(flux1_folder, tmp_path, dim):
    tensors = {key: np.zeros(shape, np.float32) for key, shape in pair(LAYER, dim, dim).items()}
    for alpha in (np.float32(np.nan), np.zeros(2, np.float32)):
        save_file(tensors | {f"{LAYER}.alpha": np.asarray(alpha)}, tmp_path / "lora.safetensors")
        with pytest.raises(UsageError, match="alpha is no finite number"):
            LoraFile(tmp_path / "lora.safetensors")


def test_numbers_of_scales(refused, tmp_path):
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    told = refused("--lora-path", *files, "--lora-scale", "1")
    assert "1 --lora-scale for 2 --lora-path" in told
    assert "--lora-scale needs a --lora-path" in refused("--lora-scale", "1")
    with pytest.raises(UsageError, match="lora_scale must be a number"):
        Loras.of("a", "much")


def test_files_that_are_none(refused, tmp_path):
    assert "does not exist" in refused("--lora-path", str(tmp_path / "none.safetensors"))
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert "pickle" in refused("--lora-path", str(path))
    path.write_bytes(b"\x10" + bytes(7) + b"{}")
    assert "truncated or no safetensors" in refused("--lora-path", str(path))
