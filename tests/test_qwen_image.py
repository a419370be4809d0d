"""Qwen-Image beside diffusers' own modules: transformer, loop, and from prompt to pixels."""

import shutil
from dataclasses import replace

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from jaxspd import DiffGenerator
from jaxspd.convert.qwen_image import RULES
from jaxspd.families import family_class, open_family
from jaxspd.models.qwen_image import QwenImageConfig, QwenImageTransformer
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.sampling.noise import stage_noises
from tests import tiny
from tests.compare import relative
from tests.components import components
from tests.parity import Loop, assert_each_within, assert_matters, flax_transformer
from torch_ref.qwen_image import QwenImageReference

GRIDS = [(4, 4), (3, 5)]
PROMPTS, NEGATIVES = ["a lake", "a wide green meadow under the midday sun"], [" ", " "]


# The transformer


class Pair:
    """Our transformer and diffusers' from one pipeline folder, called with the same arrays."""

    def __init__(self, pipeline):
        self.theirs = QwenImageTransformer2DModel.from_pretrained(pipeline / "transformer")
        self.config, self.ours = flax_transformer(
            QwenImageTransformer, QwenImageConfig, RULES, pipeline, static=[1]
        )

    def inputs(self, grid, tokens=10, seed=0):
        """Two elements; the second one's text is shorter, and what follows it must not matter."""
        draw = np.random.default_rng(seed)
        image = draw.standard_normal((2, grid[0] * grid[1], self.config.in_channels), dtype=np.float32)
        text = draw.standard_normal((2, tokens, self.config.joint_attention_dim), dtype=np.float32)
        return [image, grid, text, np.array([tokens, 4]), np.array([0.95, 0.2], np.float32)]

    @torch.no_grad()
    def official(self, image, grid, text, lengths, sigma):
        """One by one and unpadded."""
        return np.concatenate(
            [
                self.theirs(
                    hidden_states=torch.from_numpy(image[i : i + 1]),
                    encoder_hidden_states=torch.from_numpy(text[i : i + 1, : lengths[i]]),
                    timestep=torch.from_numpy(sigma[i : i + 1]),
                    img_shapes=[[(1, *grid)]],
                ).sample.numpy()
                for i in range(len(image))
            ]
        )


@pytest.fixture(scope="module")
def pair(qwen_image_folder):
    return Pair(qwen_image_folder)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_padded_velocity_is_diffusers_unpadded_one(pair, grid):
    inputs = pair.inputs(grid)
    ours = pair.ours(*inputs)
    chex.assert_shape(ours, inputs[0].shape)
    assert ours.dtype == jnp.float32
    assert_each_within(1e-5, ours, pair.official(*inputs))


def test_padding_is_not_seen(pair):
    inputs = pair.inputs(GRIDS[1])
    before = np.asarray(pair.ours(*inputs))
    inputs[2] = inputs[2].copy()
    inputs[2][1, 4:] = 7.0
    np.testing.assert_allclose(pair.ours(*inputs), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 1, "out_channels": 16},
        {"out_channels": None},
        {"num_layers": 1, "axes_dims_rope": (8, 4, 4)},
    ],
    ids=["patches of one", "as many out as in", "other rope axes"],
)
def test_any_configuration_of_the_official_class(tmp_path, options):
    tiny.qwen_image_transformer(seed=4, **options).save_pretrained(tmp_path / "transformer")
    pair = Pair(tmp_path)
    inputs = pair.inputs(GRIDS[0])
    assert_each_within(1e-5, pair.ours(*inputs), pair.official(*inputs))


@pytest.mark.parametrize("position", [0, 2, 4], ids=["image", "text", "sigma"])
def test_every_input_matters_to_its_own_batch_element_only(pair, position):
    # Not by scaling it, to which the text's norm is blind.
    assert_matters(pair.ours, pair.inputs(GRIDS[1]), position, np.square)


def test_bfloat16_is_as_close_to_float32_as_diffusers_is(tmp_path):
    tiny.write_qwen_image(tmp_path, dtype=torch.bfloat16)
    exact = Pair(tmp_path)
    inputs = exact.inputs(GRIDS[1])
    reference = exact.official(*inputs)
    _, ours = flax_transformer(QwenImageTransformer, QwenImageConfig, RULES, tmp_path, jnp.bfloat16, [1])
    half = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    image, grid, text, lengths, sigma = inputs
    mask = np.arange(text.shape[1]) < lengths[:, None]
    with torch.no_grad():
        theirs = half(
            hidden_states=torch.from_numpy(image).bfloat16(),
            encoder_hidden_states=torch.from_numpy(text).bfloat16(),
            encoder_hidden_states_mask=torch.from_numpy(mask),
            timestep=torch.from_numpy(sigma),
            img_shapes=[[(1, *grid)]] * 2,
        ).sample
    theirs = theirs.float().numpy()
    assert relative(ours(*inputs).astype(np.float32), reference) <= 1.5 * relative(theirs, reference)


# The loop


@pytest.fixture(scope="module")
def loop(qwen_image_folder):
    return Loop(qwen_image_folder, QwenImageReference.from_pretrained(qwen_image_folder), text_tokens=64)


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    ("mode", "levels", "split"),
    [("fullres", 0, [14]), ("dct", 1, [5, 9]), ("dct_rewind", 1, [5, 9]), ("dct_rewind", 2, [2, 3, 9])],
)
def test_latents_are_the_references(loop, mode, levels, split, guidance):
    plan = loop.plan(mode, levels, steps=14, delta=0.05)
    assert [stage.steps for stage in plan.stages] == split
    assert_each_within(1e-4, *loop.both(plan, PROMPTS, NEGATIVES, guidance))


def test_guidance_keeps_each_tokens_norm(loop):
    draw = np.random.default_rng(0)
    positive, negative = (draw.standard_normal((2, 4, 4, 6), dtype=np.float32) for _ in range(2))
    scale = np.array([4.0, 9.0], np.float32).reshape(2, 1, 1, 1)
    guided = np.asarray(loop.family.combine(positive, negative, scale))

    def norms(v):
        return np.linalg.norm(
            v.reshape(2, 4, 2, 2, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(2, 6, -1), axis=-1
        )

    np.testing.assert_allclose(norms(guided), norms(positive), rtol=1e-5)
    assert relative(guided, positive) > 0.1


# From prompt to pixels


@pytest.fixture(scope="module")
def generator(qwen_image_folder):
    return DiffGenerator.from_pretrained(model_path=str(qwen_image_folder), compilation_cache=False)


def make(generator, **values):
    request = {"prompt": "a lake", "height": 64, "width": 96, "num_inference_steps": 12, **values}
    return generator.generate(request, save_output=False, show_progress=False)


def official(folder):
    pipeline = QwenImagePipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "haze"}, {"negative_prompt": ""}]
)
def test_full_resolution_equals_the_official_pipeline(generator, qwen_image_folder, options):
    ours = make(generator, prompt="a wide lake", **options).frames[0]
    pipeline = official(qwen_image_folder)
    theirs = pipeline(
        "a wide lake",
        negative_prompt=options.get("negative_prompt", " "),
        true_cfg_scale=options.get("guidance_scale", 4.0),
        height=64,
        width=96,
        num_inference_steps=12,
        latents=pipeline._pack_latents(
            torch.from_numpy(stage_noises([42], (4,), [(8, 12)])[0][:, None]), 1, 4, 8, 12
        ),
        output_type="np",
    ).images
    assert np.abs(ours / 255 - theirs).max() <= 1 / 255


def test_text_is_encoded_as_the_official_pipeline_does(qwen_image_folder):
    family, prompts = open_family(qwen_image_folder), ["a lake", "", "a wide meadow " * 60]
    ours = components(family).encode_text(prompts)
    pipeline = official(qwen_image_folder)
    assert ours["text"].shape[1] == 512
    for prompt, text, length in zip(prompts, ours["text"], ours["lengths"], strict=True):
        with torch.no_grad():
            theirs, mask = pipeline.encode_prompt([prompt], max_sequence_length=512)
        assert mask is None
        assert length == theirs.shape[1]
        assert relative(text[:length], theirs[0].numpy()) <= 1e-5
        assert (text[length:] == 0).all()
    assert ours["lengths"].tolist()[2] == 512  # cut, as there


def test_decoding_is_the_official_one(qwen_image_folder, loop):
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 12), dtype=np.float32)
    theirs = loop.reference.decode(torch.from_numpy(latents))
    ours = components(loop.family).decode(latents)
    assert ours.shape == (2, 1, 64, 96, 3)
    # Nothing but rounding to 256 levels between them.
    assert np.abs(ours[:, 0] / 255 - theirs).max() <= 0.5 / 255 + 1e-4


def test_no_prompt_length_compiles_anything(qwen_image_folder, compiled):
    generator = DiffGenerator.from_pretrained(model_path=str(qwen_image_folder), compilation_cache=False)
    # A threshold that falls among the steps of so small a picture.
    settings = {"progressive_mode": "dct_rewind", "progressive_delta": 0.6, "num_inference_steps": 40}
    settings |= {"height": 128, "width": 128}
    assert make(generator, prompt="a wide lake", **settings).programs == 2
    compiled.clear()
    assert make(generator, prompt="green hills and a house " * 30, **settings).programs == 0
    assert compiled == []


def test_a_shorter_text_is_the_same_text(qwen_image_folder, caplog):
    """Padding is masked, so that less of it changes nothing, until it is the prompt that is cut."""
    generator = DiffGenerator.from_pretrained(model_path=str(qwen_image_folder), compilation_cache=False)
    settings = {"prompt": "a wide lake", "num_inference_steps": 2, "height": 128, "width": 128}
    whole, short, cut = (
        make(generator, **settings, max_sequence_length=length).frames[0] for length in (None, 48, 4)
    )
    assert "reads 4 of the prompt's" in caplog.text
    assert np.abs(whole.astype(int) - short).max() <= 1
    assert np.abs(whole.astype(int) - cut).max() > 1
    plans = [
        make(generator, **settings, progressive_mode="dct", progressive_sigmas=[0.9], max_sequence_length=n)
        for n in (512, 64)
    ]
    long, fast = (made.plan["flop_speedup"] for made in plans)
    assert fast > long


@pytest.mark.parametrize(
    ("delta", "split", "limit"), [(0.05, [13, 17], 1.51), (0.1, [16, 14], 1.70), (0.2, [19, 11], 1.96)]
)
def test_published_splits_and_flop_limits(delta, split, limit):
    family = family_class("qwen_image")()
    params = {"progressive_mode": "dct_rewind", "progressive_delta": delta, "num_inference_steps": 30}
    plan = plan_request(family, SamplingParams(height=1024, width=1024, **params))
    assert [stage.latent for stage in plan.stages] == [(64, 64), (128, 128)]
    assert [stage.steps for stage in plan.stages] == split
    # The published limits count a prompt of about 57 tokens; ours run with all 512, padding included.
    assert plan.flop_speedup(replace(family, text_tokens=57).forward_flops) == pytest.approx(limit, abs=0.005)
    assert plan.flop_speedup(family.forward_flops) < limit


def test_defaults_are_the_model_cards_example():
    params = resolve(family_class("qwen_image")(), SamplingParams(prompt="a"))
    assert (params.width, params.height, params.num_inference_steps) == (1664, 928, 50)
    assert (params.guidance_scale, params.negative_prompt, params.scheduler) == (4.0, " ", "euler")


@pytest.mark.parametrize("name", ["Qwen-Image-2512", "qwen-image-2512-bf16"])
def test_the_december_model_is_known_by_its_name(qwen_image_folder, tmp_path, caplog, name):
    """Its files are like the first's; the hub's cache keeps it under the repository's name."""
    local = shutil.copytree(qwen_image_folder, tmp_path / name)
    cached = shutil.copytree(local, tmp_path / f"models--Qwen--{name}" / "snapshots" / "0123abcd")
    saved = shutil.copytree(local, tmp_path / "saved")
    tiny.change_json(saved / "model_index.json", _name_or_path=f"Qwen/{name}")
    for folder in (local, cached, saved):
        caplog.clear()
        params = resolve(open_family(folder), SamplingParams(prompt="a"))
        assert params.negative_prompt.startswith("低分辨率，低画质，肢体畸形")
        assert "by its name this is Qwen-Image-2512" in caplog.text
    assert resolve(open_family(local), SamplingParams(prompt="a", negative_prompt="")).negative_prompt == ""


@pytest.mark.parametrize("name", ["my-qwen-image", "Qwen-Image-20251201", "2512"])
def test_other_names_are_the_first_model(qwen_image_folder, tmp_path, caplog, name):
    family = open_family(shutil.copytree(qwen_image_folder, tmp_path / name))
    assert resolve(family, SamplingParams(prompt="a", width=64, height=64)).negative_prompt == " "
    assert not caplog.records


# Bad input


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"zero_cond_t": True}, "zero_cond_t belongs to another model"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope"),
        ({"in_channels": 64}, "do not belong together"),
    ],
)
def test_a_checkpoint_of_another_kind(refused, tmp_path, change, says):
    folder = tiny.write_qwen_image(tmp_path / "model")
    tiny.change_json(folder / "transformer" / "config.json", **change)
    assert says in refused(model=folder)


def test_a_single_step_has_no_room_for_the_terminal(refused, qwen_image_folder):
    flags = ["--height", "64", "--width", "64", "--num-inference-steps"]
    assert "use 2 steps or more" in refused(*flags, "1", model=qwen_image_folder)
    two = open_family(qwen_image_folder).sigmas(2, tokens=64)
    np.testing.assert_allclose(two, [1, 0.02, 0], rtol=1e-6)


def test_a_size_that_does_not_fit_names_the_nearest(refused, qwen_image_folder):
    assert "is 96 by 64" in refused("--height", "100", "--width", "64", model=qwen_image_folder)


@pytest.mark.parametrize(
    ("name", "prompt", "added"),
    [
        ("Qwen-Image", "a lake", ", Ultra HD, 4K, cinematic composition."),
        ("Qwen-Image", "一片湖", ", 超清，4K，电影级构图."),
        ("Qwen-Image-2512", "a lake", ""),
        ("my-qwen-image", "a lake", ""),
    ],
)
def test_the_august_cards_words_follow_the_prompt(qwen_image_folder, tmp_path, name, prompt, added):
    (tmp_path / name).symlink_to(qwen_image_folder)
    generator = DiffGenerator.from_pretrained(tmp_path / name, compilation_cache=False)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "prompt": prompt}
    plain = make(generator, **settings, prompt_suffix="")
    result = make(generator, **settings)
    assert result.requests[0]["prompt_suffix"] == added
    spelled_out = make(generator, **{**settings, "prompt": prompt + added}, prompt_suffix="")
    assert (result.frames[0] == spelled_out.frames[0]).all()
    assert (result.frames[0] != plain.frames[0]).any() == bool(added)
