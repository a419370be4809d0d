"""Outputs one by one: each is there when it is made, and what ends the rest leaves it there."""

import errno
import json
import os
import signal
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jaxspd import DiffGenerator, SamplingParams, UsageError, conditioning, generator, progress, running
from jaxspd.cli import main
from jaxspd.components.denoiser import Denoiser
from jaxspd.components.transformer import Transformer
from jaxspd.families import open_family
from jaxspd.media import output
from jaxspd.media.metadata import read_request
from tests.compare import relative
from tests.components import components

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}
PROMPTS = ["a lake", "a meadow", "a hill at dawn", "snow"]
FAMILIES = ["flux1", "flux2_dev", "klein", "wan", "z_image", "qwen_image"]


@pytest.fixture(scope="module")
def flux1(flux1_folder):
    return DiffGenerator.from_pretrained(flux1_folder, compilation_cache=False)


@pytest.fixture(scope="module")
def klein(klein_base_folder):
    """Of a guided family."""
    return DiffGenerator.from_pretrained(klein_base_folder, compilation_cache=False)


def iterate(model, out, **values):
    own = ("skip_existing", "save_output", "shard")
    options = {name: values.pop(name) for name in own if name in values}
    request = {"prompt": PROMPTS, "output_path": out, **SMALL, **values}
    return model.iterate(request, show_progress=False, **options)


def command(folder, out, *flags):
    prompts = out.with_suffix(".txt")
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS))
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    where = ["--model-path", str(folder), "--output-path", str(out), "--prompt-path", str(prompts)]
    return ["generate", *where, *sizes, *flags]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fails(monkeypatch, module, name, error, at):
    """Makes the `at`-th call of a function raise `error`."""
    inner, calls = getattr(module, name), []

    def call(*arguments, **keywords):
        calls.append(name)
        if len(calls) == at:
            raise error
        return inner(*arguments, **keywords)

    monkeypatch.setattr(module, name, call)


# One by one


def test_each_output_is_written_before_it_is_given(flux1, tmp_path):
    outputs = iterate(flux1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for number, made in enumerate(outputs, 1):
        assert len(names(tmp_path / "out")) == number
        assert made.request["prompt"] == PROMPTS[number - 1]
        assert read_request(made.path) == made.request
        assert made.frames.shape == (1, 64, 64, 3)
        assert len(made.seconds["denoise"]) == 1
        assert outputs.result.paths[-1] == made.path
    assert len(outputs.result.requests) == len(PROMPTS) == number
    assert outputs.result.frames == []


def test_what_was_given_is_held_no_longer(flux1, tmp_path):
    held = []
    for made in iterate(flux1, tmp_path, prompt=PROMPTS * 2, save_output=False):
        assert not any(frames() is not None for frames in held)
        held.append(weakref.ref(made.frames))
        del made
    assert len(held) == 2 * len(PROMPTS)


def test_shares_are_the_whole_and_no_output_twice(flux1, tmp_path):
    plain = [made.path.name for made in iterate(flux1, tmp_path / "one", num_outputs_per_prompt=2)]
    options, out, made = {"num_outputs_per_prompt": 2, "skip_existing": True}, tmp_path / "many", []
    for number in (3, 1, 2):
        outputs = iterate(flux1, out, shard=f"{number}/3", **options)
        made.append([one.path.name for one in outputs])
        assert made[-1] == plain[number - 1 :: 3]
        assert outputs.asked == len(made[-1])
    assert names(out) == names(tmp_path / "one")
    # What a lost machine left out is made by whoever takes its share, and nothing else is.
    (out / plain[1]).unlink()
    outputs = iterate(flux1, out, shard="2/3", **options)
    assert [one.path.name for one in outputs] == plain[1:2]
    assert [path.name for path in outputs.result.skipped] == plain[4::3]


def test_a_share_of_nothing_loads_nothing(flux1, tmp_path, monkeypatch):
    monkeypatch.setattr(Denoiser, "load", None)
    assert list(iterate(flux1, tmp_path, shard="5/5")) == []


def test_generate_gathers_what_iterate_gives(flux1, tmp_path):
    request = {"prompt": PROMPTS[:2], "num_outputs_per_prompt": 2, "output_path": tmp_path, **SMALL}
    whole = flux1.generate(request, save_output=False, show_progress=False)
    single = list(flux1.iterate(request, save_output=False, show_progress=False))
    assert whole.requests == [made.request for made in single]
    assert [request["seed"] for request in whole.requests] == [42, 43, 42, 43]
    for frames, made in zip(whole.frames, single, strict=True):
        np.testing.assert_array_equal(frames, made.frames)
    assert whole.seconds["denoise"][0] > 0
    assert names(tmp_path) == []


def test_what_cannot_be_served_is_refused_at_the_call(flux1, tmp_path):
    with pytest.raises(UsageError, match="nearest to 100 by 64"):
        iterate(flux1, tmp_path, height=100)


# Text


@pytest.fixture
def encoded(monkeypatch, klein):
    """The texts of every call to the encoders."""
    texts, inner = [], type(klein.family).encode
    monkeypatch.setattr(
        type(klein.family),
        "encode",
        lambda family, prompts, encoders: texts.append(prompts) or inner(family, prompts, encoders),
    )
    return texts


def test_text_is_encoded_in_batches_when_it_is_needed(klein, encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(conditioning, "TEXT_BATCH", 2)
    options = {"negative_prompt": "fog", "num_outputs_per_prompt": 2, "save_output": False}
    outputs = iterate(klein, tmp_path, **options)
    seen = [len(encoded) for _ in outputs]
    # Each text once: the negative prompt too, and those with several outputs.
    assert encoded == [["fog", PROMPTS[0]], PROMPTS[1:3], PROMPTS[3:]]
    assert seen == [1, 1, 2, 2, 2, 2, 3, 3]


def test_batches_make_the_pictures_that_single_prompts_make(klein, monkeypatch, tmp_path):
    monkeypatch.setattr(conditioning, "TEXT_BATCH", 3)
    options = {"negative_prompt": "fog", "save_output": False}
    together = [made.frames for made in iterate(klein, tmp_path, **options)]
    alone = [next(iterate(klein, tmp_path, prompt=prompt, **options)).frames for prompt in PROMPTS]
    assert any((a != b).any() for a, b in pairwise(alone))
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_encoded_alike_whatever_is_beside_it(name, request):
    family = open_family(request.getfixturevalue(f"{name}_folder"))
    prompts = ["a lake", "a wide green meadow under the midday sun " * 5, "", "snow " * 600]
    opened = components(family)
    together = opened.encode_text(prompts)
    for row, prompt in enumerate(prompts):
        for key, alone in opened.encode_text([prompt]).items():
            assert relative(together[key][row : row + 1], alone) <= 1e-6, (key, prompt)


# What exists


def test_only_what_is_missing_is_made(flux1, tmp_path):
    first = list(iterate(flux1, tmp_path))
    times = {made.path: made.path.stat().st_mtime_ns for made in first}
    first[1].path.unlink()
    again = iterate(flux1, tmp_path, skip_existing=True)
    (made,) = again
    assert made.path == first[1].path
    np.testing.assert_array_equal(made.frames, first[1].frames)
    assert again.result.skipped == [one.path for one in first if one is not first[1]]
    assert again.result.report()["skipped"] == [str(path) for path in again.result.skipped]
    assert all(path.stat().st_mtime_ns == times[path] for path in again.result.skipped)
    assert "skip_existing" not in made.request


def test_an_output_of_another_request_is_no_output_of_this(flux1, tmp_path):
    """By its own name, and by the name that this request would give it."""
    named = {"output_file_name": "a", "skip_existing": True}
    first = list(iterate(flux1, tmp_path, **named))
    assert not list(iterate(flux1, tmp_path, **named))
    changed = list(iterate(flux1, tmp_path, **named, prompt=["another", *PROMPTS[1:]]))
    assert [made.path.name for made in changed] == ["a_0.png"]
    assert read_request(tmp_path / "a_0.png")["prompt"] == "another"

    (default,) = iterate(flux1, tmp_path, prompt="a lake")
    default.path.write_bytes((tmp_path / "a_1.png").read_bytes())
    (again,) = iterate(flux1, tmp_path, prompt="a lake", skip_existing=True)
    assert again.path == default.path
    np.testing.assert_array_equal(again.frames, first[0].frames)


@pytest.mark.parametrize("kind", ["mp4", "gif", "frames"])
def test_videos_that_exist_are_skipped(wan_folder, tmp_path, kind):
    model = DiffGenerator.from_pretrained(wan_folder, compilation_cache=False)
    request = {"num_frames": 5, "output_format": kind, "prompt": PROMPTS[:2]}
    first = list(iterate(model, tmp_path, **request))
    again = iterate(model, tmp_path, **request, skip_existing=True)
    assert not list(again)
    assert again.result.skipped == [made.path for made in first]


def test_nothing_is_loaded_where_all_exists(flux1_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(command(flux1_folder, out)) == 0
    capsys.readouterr()
    monkeypatch.setattr(Transformer, "_load", lambda *_: 1 / 0)
    monkeypatch.setattr(Denoiser, "programs", lambda *_: 1 / 0)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(command(flux1_folder, out, "--skip-existing", "true")) == 0
    assert "existed already: 4" in capsys.readouterr().out
    config = tmp_path / "config.yaml"
    config.write_text("skip-existing: true")
    assert main(command(flux1_folder, out, "--config", str(config), "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["outputs"], len(report["skipped"])) == ([], 4)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


# What ends a run


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_is_written(flux1_folder, tmp_path, sent, code):
    out = tmp_path / "out"
    out.with_suffix(".txt").write_text("\n".join(f"lake {number}" for number in range(500)))
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxspd", *command(flux1_folder, out, "--compilation-cache=false")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        # What a shell starts in the background ignores interrupts, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(sent)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    said = [line for line in (*lines, *rest.splitlines()) if line.startswith("wrote ")]
    written = len(names(out))
    assert 2 <= written < 500
    assert written - len(said) in (0, 1)
    assert all(read_request(out / name)["prompt"].startswith("lake") for name in names(out))
    last = errors.splitlines()[-1]
    assert last.startswith("jaxspd: interrupted; ")
    assert f"; {len(said)} of 500 outputs are written" in last or f"; {written} of 500" in last
    assert "Traceback" not in errors


def test_an_interrupt_before_the_first_output_says_so(flux1_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "denoise", interrupted)
    assert main(command(flux1_folder, tmp_path / "out", "--json")) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "jaxspd: interrupted; no output is written"


def test_an_interrupt_between_outputs_closes_the_bar_first(flux1_folder, tmp_path, monkeypatch, capsys):
    fails(monkeypatch, progress, "say", KeyboardInterrupt(), at=2)
    assert main(command(flux1_folder, tmp_path / "out")) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("jaxspd: interrupted; 2 of 4 outputs are written")


def test_sigterm_is_left_as_it_was(flux1_folder, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert main(command(flux1_folder, tmp_path / "out")) == 0
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("where", [(output, "write_png"), (generator, "write_output")])
def test_a_full_disk_keeps_what_is_written(flux1_folder, tmp_path, monkeypatch, capsys, where):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fails(patch, *where, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), at=3)
        assert main(command(flux1_folder, out)) == 2
    captured = capsys.readouterr()
    wrote = [line.removeprefix("wrote ") for line in captured.out.splitlines()]
    assert sorted(wrote) == sorted(str(path) for path in out.iterdir())
    assert len(wrote) == 2
    (line,) = [line for line in captured.err.splitlines() if line.startswith("jaxspd:")]
    assert "No space left on device" in line
    assert "; 2 of 4 outputs are written; --skip-existing true goes on from there" in line
    # And so it does.
    assert main(command(flux1_folder, out, "--skip-existing", "true", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert [made["prompt"] for made in report["outputs"]] == PROMPTS[2:]
    assert report["skipped"] == wrote
    assert len(names(out)) == 4


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "disk full"), 2)]
)
def test_a_report_tells_of_what_was_written(flux1_folder, tmp_path, monkeypatch, capsys, error, code):
    fails(monkeypatch, output, "write_png", error, at=3)
    assert main(command(flux1_folder, tmp_path / "out", "--json")) == code
    report = json.loads(capsys.readouterr().out)
    assert [made["prompt"] for made in report["outputs"]] == PROMPTS[:2]
    assert sorted(made["path"] for made in report["outputs"]) == sorted(
        str(path) for path in (tmp_path / "out").iterdir()
    )


def test_a_line_for_each_output_comes_at_once(flux1_folder, tmp_path, monkeypatch, capsys):
    said, inner = [], running.denoise
    monkeypatch.setattr(running, "denoise", lambda *a: said.append(capsys.readouterr().out) or inner(*a))
    assert main(command(flux1_folder, tmp_path / "out")) == 0
    assert said[0] == ""
    assert all(part.startswith("wrote ") and part.count("\n") == 1 for part in said[1:])
    assert capsys.readouterr().out.startswith("wrote ")


# What the API takes


def test_a_request_may_be_parameters_or_a_mapping(flux1, tmp_path):
    values = {"prompt": "a lake", "output_path": tmp_path, **SMALL}
    params = SamplingParams(**values)
    options = {"save_output": False, "show_progress": False}
    results = [
        flux1.generate(params, **options),
        flux1.generate(values, **options),
        flux1.generate(sampling_params_kwargs=values, **options),
        flux1.generate(sampling_params_kwargs=params, **options),
    ]
    results.append(flux1.generate(results[0].requests[0], **options))  # which names its model
    assert all(result.requests == results[0].requests for result in results)
    assert all((result.frames[0] == results[0].frames[0]).all() for result in results)
    assert next(flux1.iterate(params, **options)).request == results[0].requests[0]
    assert flux1.plan(params) == flux1.plan(values) == flux1.plan(params=values)


def test_what_is_no_request_is_told(flux1):
    for wrong in ("a lake", None, 3):
        for call in (flux1.generate, flux1.iterate, flux1.plan):
            with pytest.raises(UsageError, match="SamplingParams or a mapping"):
                call(wrong)
    with pytest.raises(UsageError, match="this request is for elsewhere"):
        flux1.generate({"prompt": "a lake", "model_path": "elsewhere"})


def test_paths_may_be_path_objects(flux1_folder, tmp_path):
    spectrum = tmp_path / "spectrum.json"
    spectrum.write_text('{"amplitude": 20.0, "exponent": 3.0}')
    results = []
    for kind in (Path, str):
        model = DiffGenerator.from_pretrained(kind(flux1_folder), compilation_cache=False)
        paths = {"output_path": tmp_path / "out", "output_file_name": "a.png", "spectrum": spectrum}
        request = {"prompt": "a lake", **SMALL, **{name: kind(path) for name, path in paths.items()}}
        results.append(model.generate(request, show_progress=False))
    assert results[0].paths == results[1].paths == [tmp_path / "out" / "a.png"]
    assert results[0].requests == results[1].requests
    assert json.loads(json.dumps(results[0].requests)) == results[0].requests
    with pytest.raises(UsageError, match="prompt must be text"):
        SamplingParams(prompt=Path("a lake"))
    with pytest.raises(UsageError, match="does not exist"):
        DiffGenerator.from_pretrained(tmp_path / "nowhere")
