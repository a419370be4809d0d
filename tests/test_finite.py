"""What is not a finite number stops the run with one line, and no black picture is written."""

import re
import shutil
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxspd.cli import main
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import euler
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.spectrum import Spectrum
from tests.components import components
from tests.plans import plan_of

SMALL = ("--height", "64", "--width", "64", "--num-inference-steps", "6")


@pytest.fixture
def stopped(tmp_path, capsys):
    """Runs the command, which computes before it stops, and returns its last line."""

    def run(model, *flags):
        out = tmp_path / "out"
        command = ["generate", "--model-path", str(model), "--prompt", "a lake", "--output-path", str(out)]
        assert main([*command, *SMALL, *flags]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert not out.exists() or not list(out.iterdir())
        assert "Traceback" not in captured.err
        return captured.err.splitlines()[-1]

    return run


def poison(folder, part, key, value=np.nan):
    """Puts `value` into one weight of a checkpoint's part."""
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    tensors[key].reshape(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def damaged(flux1_folder, tmp_path):
    return shutil.copytree(flux1_folder, tmp_path / "damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_weight_of_the_transformer(stopped, damaged, value):
    poison(damaged, "transformer", "proj_out.bias", value)
    line = stopped(damaged)
    assert re.search(r"after stage 1 of 1, step 1 of 6 \(σ 1.0000 to 0.\d{4}\)", line)


def test_guidance_beyond_float32(stopped, wan_folder):
    line = stopped(wan_folder, "--num-frames", "5", "--guidance-scale", "1e39")
    assert "after stage 1 of 1, step 1 of 6" in line


def test_an_embedded_guidance_beyond_float32(stopped, flux1_folder):
    assert "after stage 1 of 1, step 1 of 6" in stopped(flux1_folder, "--guidance-scale", "1e39")


def test_the_stage_is_named_where_only_a_later_one_fails():
    """A denoiser that fails on the fine grid at a middle step."""
    sigmas = np.linspace(1, 0, 11, dtype=np.float32)
    plan = plan_of(halvings((8, 8), 1), sigmas, Spectrum(20.0, 3.0), mode="dct", delta=0.6, tokens=prod)
    fine = plan.stages[1]
    assert plan.stages[0].steps > 1
    assert fine.steps > 3
    bad = fine.start + 2
    threshold = float(sigmas[bad])
    seen = []

    def velocity(parameters, latents, sigma, conditioning):
        broken = (sigma <= threshold + 1e-6) & (latents.shape[-1] == 8)
        return jnp.where(broken, jnp.nan, 0.1 * latents)

    programs = Programs(velocity, euler)
    programs.prepare(plan, (1, 3), {}, {})
    noises = stage_noises([0], (3,), [stage.latent for stage in plan.stages])
    with pytest.raises(UsageError, match=rf"stage 2 of 2, step {bad + 1} of 10 \(σ {threshold:.4f} to"):
        denoise(programs, plan, {}, {}, noises, lambda step: seen.append(step.number))
    assert seen == list(range(bad))


ENCODERS = [
    ("flux1_folder", "text_encoder", "final_layer_norm.bias"),
    ("flux1_folder", "text_encoder_2", "encoder.final_layer_norm.weight"),
    ("klein_folder", "text_encoder", "model.layers.5.input_layernorm.weight"),
    ("flux2_dev_folder", "text_encoder", "language_model.model.layers.5.input_layernorm.weight"),
    ("qwen_image_folder", "text_encoder", "model.norm.weight"),
    ("wan_folder", "text_encoder", "encoder.final_layer_norm.weight"),
    ("z_image_folder", "text_encoder", "model.layers.1.input_layernorm.weight"),
]


@pytest.mark.parametrize(("family", "part", "key"), ENCODERS)
def test_a_broken_weight_of_a_text_encoder(request, tmp_path, family, part, key):
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "damaged")
    poison(folder, part, key)
    with pytest.raises(UsageError, match=rf"{part} makes NaN or infinity"):
        components(folder).encode_text(["a lake"])


VAES = [
    ("flux1_folder", "decoder.conv_in.bias"),
    ("klein_folder", "bn.running_mean"),
    ("qwen_image_folder", "decoder.conv_in.bias"),
    ("wan_folder", "decoder.conv_in.bias"),
    ("z_image_folder", "decoder.conv_in.bias"),
]


@pytest.mark.parametrize(("family", "key"), VAES)
def test_a_broken_weight_of_a_decoder(request, tmp_path, family, key):
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "damaged")
    poison(folder, "vae", key)
    opened = open_family(folder)
    latents = np.zeros((1, *opened.leading(1), 8, 8), np.float32)
    with pytest.raises(UsageError, match="VAE makes NaN or infinity of the latents"):
        components(opened).decode(latents)


@pytest.mark.parametrize("family", ["flux1_folder", "klein_folder", "wan_folder"])
def test_a_broken_weight_of_an_encoder_is_not_measured(request, tmp_path, family):
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "damaged")
    poison(folder, "vae", "encoder.conv_in.bias")
    with pytest.raises(UsageError, match="of a file"):
        components(folder).encode(np.zeros((1, 1, 64, 64, 3), np.uint8))
