"""Bad input: one line on stderr that says what to change, exit code 2, nothing written."""

import json
import re
import shutil

import pytest

from jaxspd.cli import main

PROGRESSIVE = ("--height", "64", "--width", "64", "--progressive-mode", "dct_rewind")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--progressive-mode", "wavelet"], "use one of fullres, dct, dct_rewind"),
        ([*PROGRESSIVE, "--progressive-delta", "0"], "between 0 and 1"),
        ([*PROGRESSIVE, "--progressive-delta", "1"], "between 0 and 1"),
        ([*PROGRESSIVE, "--progressive-delta", "nan"], "between 0 and 1|must be a number"),
        ([*PROGRESSIVE, "--progressive-delta", "-0.1"], "between 0 and 1"),
        ([*PROGRESSIVE, "--progressive-levels", "-1"], "0 or more"),
        ([*PROGRESSIVE, "--progressive-levels", "3"], "use at most 2"),
        ([*PROGRESSIVE, "--num-inference-steps", "1"], "use more steps"),
        (["--num-inference-steps", "0"], "1 or more"),
        (["--num-inference-steps", "2.5"], "num-inference-steps"),
        (["--height", "100", "--width", "64"], "nearest to 100 by 64 is 96 by 64"),
        ([*PROGRESSIVE, "--height", "80"], "nearest to 80 by 64 is 64 by 64"),
        ([*PROGRESSIVE, "--progressive-grid", "patchified"], "no 'patchified' grid to grow; use latent"),
        ([*PROGRESSIVE, "--progressive-scales", "0.5", "0.9"], "end in 1"),
        ([*PROGRESSIVE, "--progressive-scales", "32", "48"], "end in the picture's height, 64, not 48"),
        ([*PROGRESSIVE, "--progressive-scales", "half", "1"], "cannot read the progressive scale 'half'"),
        ([*PROGRESSIVE, "--progressive-scales", "0.5", "1", "--progressive-levels", "1"], "not both"),
        ([*PROGRESSIVE, "--progressive-transform", "dst"], "use one of dct, fft, dwt"),
        (
            [*PROGRESSIVE, "--progressive-transform", "dwt", "--progressive-scales", "0.75", "1"],
            "dwt grows a grid to exactly 2 times its size, not 6×6 to 8×8",
        ),
        ([*PROGRESSIVE, "--progressive-sigmas", "0.9", "0.5"], "change of resolution, 1 in all, not 2"),
        ([*PROGRESSIVE, "--progressive-sigmas", "1.2"], "between 0 and 1 and decrease"),
        ([*PROGRESSIVE, "--progressive-sigmas", "0.8", "--progressive-delta", "0.1"], "replace"),
        ([*PROGRESSIVE, "--progressive-sigmas", "high"], "progressive-sigmas"),
        ([*PROGRESSIVE, "--progressive-respace", "perhaps"], "true or false"),
        ([*PROGRESSIVE, "--progressive-shift", "half"], "use full or stage"),
        ([*PROGRESSIVE, "--progressive-history", "keep"], "use forget or carry"),
        ([*PROGRESSIVE, "--spectrum", "nowhere.json"], "cannot read a spectrum from nowhere.json"),
        (["--height", "0"], "1 or more"),
        (["--num-outputs-per-prompt", "0"], "1 or more"),
        (["--seed", "-1"], "0 or more"),
        (["--seed", str(2**64)], f"seed.* must be {2**64 - 1} or less"),
        (["--seed", str(2**64 - 1), "--num-outputs-per-prompt", "2"], "1 added for each further output"),
        (["--seed", "9" * 4000], "not a number of more than 40 digits"),
        (["--height", "1000000"], "height must be 16384 or less, not 1000000"),
        (["--height", "16384", "--width", "16384"], "noise levels do not fall from step to step"),
        (["--num-inference-steps", "1000000000"], "--num-inference-steps must be 1000000 or less"),
        (["--num-outputs-per-prompt", "1000000000000"], "--num-outputs-per-prompt must be 10000 or less"),
        (["--fps", "10000000000"], "fps must be 1000 or less"),
        (
            ["--progressive-levels", "100000000000000", "--height", "8"],
            "--progressive-levels must be 16 or less",
        ),
        ([*PROGRESSIVE, "--progressive-scales", "1e999999999", "1"], "cannot read the progressive scale"),
        (["--prompt", "a \udcff"], "holds bytes or escapes that are no text"),
        (["--output-file-name", "a" * 300 + ".png"], "File name too long"),
        (["--model-path", "~nobody-of-this-name/x"], "give the whole path"),
        (["--prompt", "  "], "prompt is empty"),
        (["--negative-prompt", "people"], "no negative prompt"),
        (["--output-file-name", "a/b.png"], "plain file name"),
        (["--output-file-name", "b.jpg"], "end it in .png"),
        (["--stepz", "3"], "--stepz"),
        (["--dit-cpu-offload", "maybe"], "true or false"),
    ],
)
def test_impossible_requests(refused, flux1_folder, flags, says):
    assert re.search(says, refused(*flags, model=flux1_folder))


def test_a_prompt_is_needed(capsys):
    assert main(["generate"]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_an_output_path_that_is_a_file(flux1_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--model-path", str(flux1_folder), "--prompt", "a", "--output-path", str(tmp_path / "file")]
    assert main(["generate", *flags]) == 2
    assert "choose another --output-path" in capsys.readouterr().err


def test_a_missing_folder(refused, tmp_path):
    assert "does not exist" in refused(model=tmp_path / "nowhere")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "model_index.json is missing" in refused(model=tmp_path / "empty")


@pytest.fixture
def damaged(flux1_folder, tmp_path):
    return shutil.copytree(flux1_folder, tmp_path / "damaged")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(refused, damaged, part):
    shutil.rmtree(damaged / part)
    assert f"lacks {part}" in refused(model=damaged)


def test_another_pipeline_is_named(refused, damaged):
    (damaged / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert "StableDiffusionPipeline" in refused(model=damaged)


WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.mark.parametrize("part", WEIGHTS)
def test_truncated_weights(refused, damaged, part):
    weights = damaged / part / WEIGHTS[part]
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{part}" in refused("--height", "64", "--width", "64", model=damaged)


@pytest.mark.parametrize("part", WEIGHTS)
def test_pickles_are_never_loaded(refused, damaged, part):
    weights = damaged / part / WEIGHTS[part]
    weights.rename(weights.with_suffix(".bin"))
    assert "pickles" in refused("--height", "64", "--width", "64", model=damaged)


def test_a_transformer_of_another_shape(refused, damaged):
    config = damaged / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "num_layers": values["num_layers"] + 1}))
    line = refused("--height", "64", "--width", "64", model=damaged)
    assert "missing: transformer_blocks.2." in line


@pytest.mark.parametrize(
    ("text", "says"),
    [("- a", "keys and values"), ("heigth: 64", "did you mean 'height'"), ("a: [", "cannot read")],
)
def test_a_wrong_config_file(refused, tmp_path, text, says):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert says in refused("--config", str(config))


def test_a_picture_of_another_program(refused, tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    assert "not written by jaxspd" in refused("--config", str(tmp_path / "other.png"))


def test_a_prompt_file_without_prompts(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\n")
    assert main(["generate", "--prompt-path", str(tmp_path / "prompts.txt")]) == 2
    assert "one a line" in capsys.readouterr().err
