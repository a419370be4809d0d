"""Videos from the command and from Python: official result, sizes, files, compilation, bad input."""

import json
import re
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from jaxspd import DiffGenerator, UsageError
from jaxspd.cli import main
from jaxspd.components.denoiser import Denoiser
from jaxspd.families import family_class
from jaxspd.families import wan as wan_family
from jaxspd.models.vae import Coder
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.sampling.noise import stage_noises
from tests import tiny
from tests.compare import relative
from tests.components import components

SMALL = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 12, "progressive_delta": 0.6}


@pytest.fixture(scope="module")
def generator(wan_folder):
    return DiffGenerator.from_pretrained(model_path=str(wan_folder), compilation_cache=False)


def make(generator, **values):
    request = {"prompt": "a lake", **SMALL, **values}
    return generator.generate(request, save_output=False, show_progress=False)


# The method's published numbers


@pytest.mark.parametrize(
    ("delta", "split", "limit"),
    [(0.01, [23, 27], 1.68), (0.02, [27, 23], 1.91), (0.05, [33, 17], 2.39), (0.10, [37, 13], 2.87)],
)
def test_published_splits_and_flop_limits(delta, split, limit):
    family = family_class("wan")()  # 1.3B at 480×832×81
    params = {"progressive_mode": "dct_rewind", "progressive_delta": delta, "flow_shift": 5.0}
    plan = plan_request(family, SamplingParams(**params))
    assert [stage.latent for stage in plan.stages] == [(30, 52), (60, 104)]
    assert [stage.tokens for stage in plan.stages] == [8190, 32760]
    assert [stage.steps for stage in plan.stages] == split
    assert plan.flop_speedup(family.forward_flops) == pytest.approx(limit, abs=0.005)


@pytest.mark.parametrize(
    ("delta", "split", "limit", "published"), [(0.01, [29, 21], 2.11, 2.18), (0.05, [38, 12], 3.22, 3.34)]
)
def test_splits_at_720p(delta, split, limit, published):
    family = family_class("wan")()
    params = {"progressive_mode": "dct_rewind", "progressive_delta": delta, "flow_shift": 5.0}
    # 720 rows make no even grids.
    plan = plan_request(family, SamplingParams(height=720, width=1280, **params))
    assert [stage.latent for stage in plan.stages] == [(44, 80), (88, 160)]
    assert [stage.tokens for stage in plan.stages] == [18480, 73920]
    assert [stage.steps for stage in plan.stages] == split
    assert plan.flop_speedup(family.forward_flops) == pytest.approx(limit, abs=0.005)
    # What was published lies between these steps and one coarse step more.
    coarse, fine = (family.forward_flops(stage.tokens) for stage in plan.stages)
    further = 50 * fine / ((split[0] + 1) * coarse + (split[1] - 1) * fine)
    assert limit < published < further


def test_what_the_authors_lead_away_from_is_the_default():
    family = family_class("wan")()
    completed = resolve(family, SamplingParams(prompt="a"))
    assert completed.negative_prompt.startswith("色调艳丽，过曝，静态，细节模糊不清，字幕")
    assert completed.negative_prompt.endswith("杂乱的背景，三条腿，背景人很多，倒着走")
    assert resolve(family, SamplingParams(prompt="a", negative_prompt="")).negative_prompt == ""
    assert resolve(family, SamplingParams(prompt="a", guidance_scale=1.0)).negative_prompt is None


# Against the official pipeline


@pytest.mark.parametrize(
    ("guidance", "negative"), [(5.0, "blur"), (4.0, ""), (1.0, None)], ids=["cfg", "empty", "off"]
)
def test_full_resolution_equals_the_official_pipeline(generator, wan_folder, guidance, negative):
    """From prompt to pixels, with the pipeline's own encoder, loop and decoder."""
    prompt = " a  wide &amp; quiet lake "  # cleaned as the pipeline cleans it
    ours = make(generator, prompt=prompt, guidance_scale=guidance, negative_prompt=negative).frames[0]
    pipeline = WanPipeline.from_pretrained(wan_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt,
        negative_prompt=negative,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=12,
        guidance_scale=guidance,
        latents=torch.from_numpy(stage_noises([42], (4, 3), [(8, 12)])[0]),
        max_sequence_length=generator.family.text_tokens,
        output_type="np",
    ).frames
    assert ours.shape == (9, 64, 96, 3)
    assert np.abs(ours / 255 - theirs[0]).max() <= 1 / 255


def test_text_is_encoded_as_the_official_pipeline_does(wan_folder):
    opened = components(wan_folder)
    prompts = ["a lake", "a wide green meadow under the midday sun " * 20, ""]
    ours = opened.encode_text(prompts)["text"]
    pipeline = WanPipeline.from_pretrained(wan_folder, transformer=None, vae=None, local_files_only=True)
    text, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=opened.family.text_tokens
    )
    assert relative(ours, text.detach().numpy()) <= 1e-5
    assert (ours[0, 10:] == 0).all()


@pytest.mark.parametrize("text", ["ＡＢＣ，模糊", "schÃ¶n &amp;amp; gut", "  two\u3000 words\n"])
def test_prompts_are_cleaned_as_the_official_pipeline_does(text):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert wan_family.clean(text) == prompt_clean(text)


def test_large_frames_are_decoded_in_tiles(wan_folder, monkeypatch):
    opened, asked = components(wan_folder), []
    latents = np.random.default_rng(0).standard_normal((2, 4, 1, 16, 24), np.float32)
    whole, plan = opened.decode(latents), Coder.plan
    monkeypatch.setattr(Coder, "plan", lambda *args: asked.append(plan(*args)) or asked[-1])
    # Half of what the whole takes, whatever that is.
    coder = opened.autoencoder._coder
    needed = coder._compile("decode", (1, 1, 16, 24, 4), (1, 1)).bytes
    coder.budget = int(0.7 * needed)
    tiled = opened.decode(latents)
    assert asked == [(1, 2)] * 2
    assert tiled.shape == whole.shape == (2, 1, 128, 192, 3)
    assert 0 < np.abs(tiled.astype(int) - whole).mean() < 3


# Sizes and frames


@pytest.mark.parametrize(
    ("asked", "mode", "levels", "given"),
    [
        ((720, 1280), "dct_rewind", 1, (704, 1280)),
        ((720, 1280), "fullres", 1, (720, 1280)),
        ((720, 1280), "dct", 2, (704, 1280)),
        ((500, 850), "fullres", 1, (496, 848)),
        (None, "dct_rewind", 1, (480, 832)),
    ],
)
def test_a_size_is_rounded_down_to_even_grids(asked, mode, levels, given, caplog):
    size = dict(zip(("height", "width"), asked, strict=True)) if asked else {}
    params = SamplingParams(progressive_mode=mode, progressive_levels=levels, **size)
    family = family_class("wan")()
    completed = resolve(family, params)
    assert (completed.height, completed.width) == given
    assert bool(caplog.records) == (asked not in (None, given))
    for stage in plan_request(family, params).stages:
        assert [side % 2 for side in stage.latent] == [0, 0]


def test_the_rounding_is_told_before_anything_runs(wan_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Denoiser, "programs", lambda *_: 1 / 0)
    flags = ["--model-path", str(wan_folder), "--prompt", "a", "--num-frames", "1"]
    flags += ["--height", "100", "--width", "64", "--output-path", str(tmp_path)]
    assert main(["generate", *flags]) == 1
    notice, failure = capsys.readouterr().err.splitlines()
    assert notice.endswith("multiples of 16: 100 by 64 becomes 96 by 64")
    assert "ZeroDivisionError" in failure


@pytest.mark.parametrize(("asked", "nearest"), [(80, 81), (82, 81), (83, 85), (2, 1), (3, 5)])
def test_frames_that_do_not_fit_name_the_nearest(asked, nearest):
    with pytest.raises(UsageError, match=rf"4k \+ 1 frames; the nearest num_frames to {asked} is {nearest}$"):
        resolve(family_class("wan")(), SamplingParams(num_frames=asked))


# Files


def test_the_command_writes_a_video_that_repeats_itself(wan_folder, tmp_path, capsys):
    flags = ["--prompt", "Höhenzug", "--negative-prompt", "blur", "--scheduler", "euler", "--fps", "12"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += ["--progressive-mode", "dct_rewind", "--output-path", str(tmp_path)]
    command = ["generate", "--model-path", str(wan_folder), "--output-file-name", "video.mp4", "--json"]
    assert main([*command, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    request = report["outputs"][0]
    assert request["scheduler"] == "euler"
    assert (request["num_frames"], request["fps"], request["output_format"]) == (9, 12, "mp4")
    with av.open(tmp_path / "video.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", Fraction(12))
        assert len([frame for frame in video.decode(stream)]) == 9
    assert Image.open(tmp_path / "video.poster.png").size == (96, 64)

    for again in ("one", "two"):
        repeat = ["--config", str(tmp_path / "video.mp4"), "--output-path", str(tmp_path)]
        assert main(["generate", *repeat, "--output-format", "frames", "--output-file-name", again]) == 0
    one, two = (
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / name).iterdir())]
        for name in ("one", "two")
    )
    assert len(one) == 9
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[0], np.asarray(Image.open(tmp_path / "video.poster.png")))


def test_one_frame_is_a_picture(wan_folder, tmp_path):
    flags = ["--height", "64", "--width", "64", "--num-frames", "1", "--num-inference-steps", "4"]
    flags += ["--prompt", "a lake", "--output-path", str(tmp_path), "--output-file-name", "a"]
    assert main(["generate", "--model-path", str(wan_folder), *flags]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# Compilation


def test_nothing_but_a_new_shape_or_solver_compiles(wan_folder, compiled):
    generator = DiffGenerator.from_pretrained(model_path=str(wan_folder), compilation_cache=False)
    base = {"progressive_mode": "dct_rewind", "num_inference_steps": 30, "negative_prompt": "blur"}
    assert make(generator, **base).programs == 2
    compiled.clear()
    other = {"prompt": "a wide green meadow at dawn " * 30, "negative_prompt": None, "seed": 9}
    other |= {"guidance_scale": 3.0, "flow_shift": 7.0, "num_inference_steps": 40, "fps": 8}
    assert make(generator, **{**base, **other}).programs == 0
    assert compiled == []
    # Each of these is another program at both resolutions.
    for change in (
        {"guidance_scale": 1.0, "negative_prompt": None},
        {"num_frames": 5},
        {"scheduler": "euler"},
    ):
        assert make(generator, **{**base, **change}).programs == 2


def test_a_seed_gives_the_same_video_whatever_is_beside_it(generator):
    alone = make(generator, seed=6).frames[0]
    beside = make(generator, seed=5, num_outputs_per_prompt=2).frames[1]
    np.testing.assert_array_equal(alone, beside)


def test_the_negative_prompt_counts(generator):
    images = [make(generator, negative_prompt=text).frames[0] for text in ("blur", "people", None)]
    assert (images[0] != images[1]).any()
    assert (images[0] != images[2]).any()


# Bad input


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-frames", "80"], "nearest --num-frames to 80 is 81"),
        (["--num-frames", "0"], "1 or more"),
        (["--num-frames", "2.5"], "num-frames"),
        (["--fps", "0"], "fps must be 1 or more"),
        (["--num-frames", "1000000001"], "--num-frames must be 1000000 or less"),
        (["--num-frames", "999997", "--height", "480", "--width", "832"], "tokens for Wan 2.1; the most is"),
        (["--flow-shift", "1e300"], "from 0.001 to 1000"),
        (["--flow-shift", "inf"], "from 0.001 to 1000, not inf"),
        (["--fps", "fast"], "fps"),
        (["--scheduler", "ddim"], "use one of euler, unipc"),
        (["--flow-shift", "0"], "above 0, from 0.001 to 1000, not 0"),
        (["--max-sequence-length", "0"], "1 or more"),
        (["--max-sequence-length", "33"], "reads at most 32 tokens of text; lower --max-sequence-length"),
        (["--flow-shift", "nan"], "above 0|must be a number"),
        (["--guidance-scale", "nan"], "finite|must be a number"),
        (["--guidance-scale", "1", "--negative-prompt", "blur"], "raise --guidance-scale above 1"),
        (["--height", "8"], "nearest to 8 by 832 is 16 by 832"),
        (["--output-file-name", "a.png"], "write mp4, gif or frames"),
        (["--output-format", "webm"], "use one of png, mp4, gif, frames"),
        (
            ["--progressive-mode", "dct", "--height", "64", "--width", "64", "--progressive-levels", "3"],
            "at most 2",
        ),
    ],
)
def test_impossible_requests(refused, wan_folder, flags, says):
    assert re.search(says, refused(*flags, model=wan_folder))


@pytest.mark.parametrize("flags", [["--num-frames", "5"], ["--fps", "8"]])
def test_a_model_of_pictures_makes_no_video(refused, flux1_folder, flags):
    assert "makes pictures" in refused(*flags, "--height", "64", "--width", "64", model=flux1_folder)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("model_index.json", {"boundary_ratio": 0.875}, "lacks transformer_2"),
        ("model_index.json", {"expand_timesteps": True}, "Wan 2.2's TI2V-5B"),
        ("transformer/config.json", {"image_dim": 1280}, "animates pictures"),
        ("transformer/config.json", {"in_channels": 36}, "do not belong together"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "names DDIMScheduler"),
        ("scheduler/scheduler_config.json", {"solver_order": 3}, "solver_order 3"),
    ],
)
def test_a_checkpoint_of_another_kind(refused, tmp_path, part, change, says):
    folder = tiny.write_wan(tmp_path / "model")
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert says in refused(model=folder)
