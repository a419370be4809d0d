"""Single files' layouts: every name and every row where the authors' own files and diffusers have them."""

import re

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils

from jaxspd.convert.errors import UsageError
from jaxspd.convert.layouts import LAYOUTS, find
from tests.layouts import in_layout
from tests.test_full_size import CHECKPOINTS
from tests.test_official_keys import of_rules, with_shapes

# Of the names and shapes in real files, as in test_official_keys.py; and how many there are.
HASHES = {
    "FLUX.1-dev": ("bfl", 780, "a29710fea6dddb0314663ee823598e50"),
    "FLUX.1-schnell": ("bfl", 776, None),
    "FLUX.2-klein-9B": ("bfl", 201, None),
    "Wan2.1-T2V-1.3B": ("wan", 825, "9269f8db9040a9d860eaca435be61814"),
    "Wan2.1-T2V-14B": ("wan", 1095, "aafcfd9672c3a2456dc46e1cb6e52c70"),
    "Z-Image": ("comfyui", 453, None),
}
# A tensor of another block than the first.
LATER = re.compile(r"(\w*blocks|layers|\w+_refiner)\.[1-9]")
# What diffusers reads single files with.
CONVERTERS = {
    "flux1": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}


@pytest.mark.parametrize("checkpoint", HASHES)
def test_names_and_shapes_are_the_real_files(checkpoint):
    layout, count, expected = HASHES[checkpoint]
    shapes = of_rules(checkpoint)
    # Arrays without memory of their own, which only their shapes matter of.
    found = {
        source: (sum(shapes[t.key][0] for t in targets), *shapes[targets[0].key][1:])
        for source, targets in find(CHECKPOINTS[checkpoint][0], layout).sources(shapes).items()
    }
    assert len(found) == count
    assert expected in (None, with_shapes(found))


@pytest.mark.parametrize(
    ("family", "checkpoint"),
    [
        ("flux1", "FLUX.1-dev"),
        ("flux2", "FLUX.2-klein-4B"),
        ("wan", "Wan2.1-T2V-1.3B"),
        ("z_image", "Z-Image"),
    ],
)
def test_every_row_goes_where_diffusers_puts_it(family, checkpoint):
    """One column of every tensor in the first block, of the official height."""
    layout = LAYOUTS[family][1]
    shapes = {key: shape for key, shape in of_rules(checkpoint).items() if not LATER.match(key)}
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.standard_normal((shape[0], *(1 for _ in shape[1:]))).astype(np.float32)
        for key, shape in shapes.items()
    }
    stored = in_layout(layout, tensors)
    ours = {target.key: target.take(array) for key, array in stored.items() for target in layout.targets(key)}
    theirs = CONVERTERS[family]({key: torch.from_numpy(array.copy()) for key, array in stored.items()})
    assert ours.keys() == theirs.keys() == tensors.keys()
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key].numpy(), err_msg=key)
        np.testing.assert_array_equal(array, tensors[key], err_msg=key)


@pytest.mark.parametrize("family", LAYOUTS)
def test_names_that_a_layout_does_not_have(family):
    for layout in LAYOUTS[family]:
        for key in ("", "weight", ".weight", "unet.conv.weight", "blocks.0.nothing", "blocks..modulation"):
            assert layout.targets(key) is None


def test_a_norms_weight_has_two_names():
    layout = find("flux1", "bfl")
    scale, weight = (
        layout.targets(f"double_blocks.12.img_attn.norm.key_norm.{name}") for name in ("scale", "weight")
    )
    assert scale == weight
    assert scale[0].key == "transformer_blocks.12.attn.norm_k.weight"


def test_rows_in_unequal_parts_are_refused():
    query, *_ = find("flux1", "bfl").targets("double_blocks.0.img_attn.qkv.weight")
    with pytest.raises(UsageError, match="10 rows"):
        query.shape((10, 4))


def test_parts_are_views():
    """Nothing is copied, so that of a file no more is read than a part."""
    fused = np.arange(21.0).reshape(7, 3)
    *_, mlp = find("flux1", "bfl").targets("single_blocks.3.linear1.weight")
    assert mlp.key == "single_transformer_blocks.3.proj_mlp.weight"
    assert np.shares_memory(mlp.take(fused), fused)
    np.testing.assert_array_equal(mlp.take(fused), fused[3:])
