"""FLUX.1's transformer beside diffusers' own, in float32 on tiny checkpoints."""

import chex
import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding

from jaxspd.convert.flux1 import RULES
from jaxspd.models.flux1 import Flux1Config, Flux1Transformer
from jaxspd.models.layers import LayerNorm, RMSNorm, sinusoidal_embedding
from jaxspd.models.packing import pack, unpack
from tests import tiny
from tests.compare import relative
from tests.parity import assert_matters, flax_transformer

TEXT_TOKENS = 10
GRIDS = [(4, 4), (3, 5)]


class Pair:
    """Our transformer and diffusers' from one pipeline folder, called with the same arrays."""

    def __init__(self, pipeline):
        self.theirs = FluxTransformer2DModel.from_pretrained(pipeline / "transformer")
        self.config, self.ours = flax_transformer(Flux1Transformer, Flux1Config, RULES, pipeline, static=[1])

    def inputs(self, grid, batch=2, seed=0):
        """Two elements that differ in everything, σ, guidance and text included.

        Guidance goes up to the official default: see `test_time_embedding_is_diffusers` for why
        float32 agrees less and less above it.
        """
        draw = np.random.default_rng(seed)
        c, tokens = self.config, grid[0] * grid[1]
        shapes = ((tokens, c.in_channels), (TEXT_TOKENS, c.joint_attention_dim), (c.pooled_projection_dim,))
        normals = [draw.standard_normal((batch, *shape), dtype=np.float32) for shape in shapes]
        sigma = np.linspace(0.95, 0.2, batch, dtype=np.float32)
        guidance = np.linspace(1.0, 3.5, batch, dtype=np.float32) if c.guidance_embeds else None
        return [normals[0], grid, *normals[1:], sigma, guidance]

    @torch.no_grad()
    def official(self, image, grid, text, pooled, sigma, guidance):
        positions = FluxPipeline._prepare_latent_image_ids(len(image), *grid, "cpu", torch.float32)
        image, text, pooled, sigma = map(torch.from_numpy, (image, text, pooled, sigma))
        return self.theirs(
            hidden_states=image,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=None if guidance is None else torch.from_numpy(guidance),
            img_ids=positions,
            txt_ids=torch.zeros(text.shape[1], 3),
        ).sample.numpy()


@pytest.fixture(scope="module")
def dev(flux1_folder):
    return Pair(flux1_folder)


@pytest.fixture(scope="module")
def schnell(schnell_folder):
    return Pair(schnell_folder)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_velocity_is_diffusers(request, name, grid):
    pair = request.getfixturevalue(name)
    assert pair.config.guidance_embeds == (name == "dev")
    inputs = pair.inputs(grid)
    ours = pair.ours(*inputs)
    chex.assert_shape(ours, inputs[0].shape)
    assert ours.dtype == jnp.float32
    for element, reference in zip(ours, pair.official(*inputs), strict=True):
        assert relative(element, reference) <= 1e-5


@pytest.mark.parametrize(("double", "single"), [(0, 2), (2, 0)])
def test_either_kind_of_block_may_be_absent(tmp_path, double, single):
    tiny.flux1_transformer(num_layers=double, num_single_layers=single, seed=5).save_pretrained(
        tmp_path / "transformer"
    )
    pair = Pair(tmp_path)
    assert (pair.config.num_layers, pair.config.num_single_layers) == (double, single)
    inputs = pair.inputs(GRIDS[1])
    assert relative(pair.ours(*inputs), pair.official(*inputs)) <= 1e-5


# Parity is worth nothing where an input is ignored on both sides, or hardly matters.
@pytest.mark.parametrize("position", [0, 2, 3, 4, 5], ids=["image", "text", "pooled", "sigma", "guidance"])
def test_every_input_matters_to_its_own_batch_element_only(dev, position):
    assert_matters(dev.ours, dev.inputs(GRIDS[1]), position)


def test_norms_treat_faint_activations_as_diffusers_does(dev):
    # At this size the norms' ε decides; on activations around 1 it would go unseen.
    faint = 1e-3 * np.random.default_rng(0).standard_normal((2, 5, 48), dtype=np.float32)
    per_head = faint.reshape(2, 5, 3, 16)
    double, single = dev.theirs.transformer_blocks[0], dev.theirs.single_transformer_blocks[0]
    layer_norms = [double.norm1, double.norm1_context, single.norm, dev.theirs.norm_out]
    layer_norms = [*(module.norm for module in layer_norms), double.norm2, double.norm2_context]
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    rms_norms = [*(getattr(double.attn, name) for name in names), single.attn.norm_q, single.attn.norm_k]
    with torch.no_grad():
        ours = LayerNorm(48, dtype=jnp.float32)(faint)
        for theirs in layer_norms:
            assert relative(ours, theirs(torch.from_numpy(faint))) <= 1e-6
        norm = RMSNorm(16, dtype=jnp.float32)
        norm.scale.set_value(jnp.ones(16))
        ours = norm(per_head)
        for theirs in rms_norms:
            assert relative(ours, theirs(torch.from_numpy(per_head)) / theirs.weight) <= 1e-6


# One unit in the last place of float32, relative.
ULP = 2.0**-23


@pytest.mark.parametrize("scalar", [0.02, 0.7, 1.0, 3.5, 10.0])
def test_time_embedding_is_diffusers(scalar):
    # Frequencies are exp(x) in float32, which libraries round differently in the last place. The
    # angle 1000·scalar·frequency carries that on: 0.0004 rad at the first frequencies of guidance
    # 3.5, with which no other rounding in the model compares.
    t = np.array([1000 * scalar], np.float32)
    theirs = get_timestep_embedding(torch.from_numpy(t), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    ours = np.asarray(jax.jit(sinusoidal_embedding)(t))
    assert ours.dtype == np.float32
    angles = t * np.exp(-np.log(10_000) * np.arange(128) / 128)
    # Once for the frequency, once for the angle's own rounding, and a little for sine and cosine.
    bound = 2 * ULP * np.concatenate([angles, angles]) + 2 * ULP
    assert (np.abs(ours[0] - theirs[0].numpy()) <= bound).all()


# Packing


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 4, 6, 10)])
def test_packing_is_the_pipelines(shape):
    batch, channels, height, width = shape
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    theirs = FluxPipeline._pack_latents(torch.from_numpy(latents), batch, channels, height, width)
    ours = pack(jnp.asarray(latents))
    chex.assert_trees_all_equal(np.asarray(ours), theirs.numpy())
    # The pipeline counts in pixels, eight to a latent.
    back = FluxPipeline._unpack_latents(theirs, 8 * height, 8 * width, 8)
    unpacked = unpack(ours, (height // 2, width // 2))
    chex.assert_trees_all_equal(np.asarray(unpacked), back.numpy())
    chex.assert_trees_all_equal(np.asarray(unpacked), latents)


@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (1, 4, 6, 5)])
def test_odd_latents_do_not_pack(shape):
    with pytest.raises(einops.EinopsError):
        pack(jnp.zeros(shape))
