"""The comparison with PyTorch: a small run of it all, and the arithmetic of its report."""

import json
from dataclasses import replace

import compare
import compare_numbers
import compare_report
import jax_worker
import numpy as np
import prepare
import pytest
import torch
import torch_worker
from checkpoints import write_checkpoint
from presets import FULLRES, PRESETS, Cell, Model, Preset, size

from jaxspd.convert.checkpoint import Checkpoint, read_config
from jaxspd.convert.loader import flat_parameters, load_parameters
from jaxspd.families import family_class, open_family
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams

GROWN = "δ 0.05"
COMPILED = "PyTorch, compiled, progressive"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`(arguments, output, exit code)` of the `ci` preset, in processes of its own."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["--preset", "ci", "--work", str(folder / "work"), "--output", str(folder / "out")]
    return arguments, folder / "out", compare.main(arguments)


def report_of(output):
    return json.loads((output / "compare.json").read_text())


def test_ci_preset(finished):
    _, output, code = finished
    assert code == 0
    report = report_of(output)
    model = report["models"]["tiny FLUX.1"]
    assert set(model["processes"]) == set(compare.FRAMEWORKS)
    for framework, (answer,) in model["processes"].items():
        for cell, measured in answer["cells"].items():
            assert measured["distance"] <= 1e-4, (framework, cell)
            stages = len(model["cells"][cell]["steps"])
            assert np.shape(measured["denoise"]) == (report["preset"]["repeats"], stages)
            assert np.min(measured["denoise"]) > 0
        assert answer["compiled_later"] == 0
        assert min(answer["load"], answer["decode"], answer["peak"]["host"], *answer["matmul_flops"]) > 0
    # torch.compile compiles again when the grid grows; one size needs it once.
    assert model["processes"][COMPILED][0]["cells"][GROWN]["recompiles"] == 1
    assert model["processes"]["PyTorch, compiled"][0]["cells"][FULLRES]["recompiles"] == 0
    text = (output / "compare.md").read_text()
    assert all(f"| {GROWN} | {name} |" in text for name in ("jaxspd", "PyTorch, eager", COMPILED))
    assert (output / "compare.png").stat().st_size > 1000


def test_goes_on_where_it_was_interrupted(finished, monkeypatch):
    arguments, output, _ = finished
    before, asked = report_of(output), []
    work = compare.Path(arguments[3])
    kept = json.loads((work / "answers.json").read_text())
    del kept["processes"]["tiny FLUX.1 · jaxspd · 1"]
    (work / "answers.json").write_text(json.dumps(kept))
    run = compare.run

    def counted(script, job, compiled=None):
        asked.append(script)
        # What is asked first compiles anew, whatever the interrupted process has left.
        assert compiled is None or not compiled.exists()
        return run(script, job, compiled)

    monkeypatch.setattr(compare, "run", counted)
    assert compare.main(arguments) == 0
    assert asked == ["prepare.py", "jax_worker.py"]
    processes = report_of(output)["models"]["tiny FLUX.1"]["processes"]
    assert processes[COMPILED] == before["models"]["tiny FLUX.1"]["processes"][COMPILED]
    # Whatever changes in the code that is measured, nothing old is taken for new.
    monkeypatch.setattr(compare, "sources", lambda: "other")
    monkeypatch.setattr(compare, "run", lambda *_: (_ for _ in ()).throw(SystemExit("asked anew")))
    assert not compare.Answers(work, {**kept["setting"], "sources": "other"}).values["processes"]


def test_time_that_is_up_reports_what_has_run(finished, tmp_path, monkeypatch, capsys):
    arguments, output, _ = finished
    two = replace(PRESETS["ci"], rounds=2)
    monkeypatch.setitem(PRESETS, "ci", two)
    work = compare.Path(arguments[3])
    kept = json.loads((work / "answers.json").read_text())
    kept["setting"]["preset"]["rounds"] = 2
    (tmp_path / "answers.json").write_text(json.dumps(kept))
    asked = []
    prepared = {"checkpoint": None, **report_of(output)["models"]["tiny FLUX.1"]}
    monkeypatch.setattr(compare, "prepare", lambda *_: (prepared, dict.fromkeys(prepared["cells"])))
    monkeypatch.setattr(compare, "ask", lambda framework, *_, anew: asked.append(framework))
    late = ["--preset", "ci", "--work", str(tmp_path), "--output", str(tmp_path / "out"), "--minutes", "0"]
    assert compare.main(late) == 0
    assert not asked
    assert "tiny FLUX.1: 1 of 2 rounds have run" in capsys.readouterr().err
    assert len(report_of(tmp_path / "out")["models"]["tiny FLUX.1"]["processes"]["jaxspd"]) == 1
    # A process that fails costs its round, and the exit code says it.

    def fails(framework, *_, anew):
        raise compare.ProcessFailed(f"{framework} failed")

    monkeypatch.setattr(compare, "ask", fails)
    assert compare.main(late[:-2]) == 1
    assert "tiny FLUX.1: PyTorch, eager failed" in capsys.readouterr().err
    (tmp_path / "answers.json").unlink()
    with pytest.raises(SystemExit, match="no model has run in every framework"):
        compare.main(late)


def test_results_of_other_hardware_stay(finished, monkeypatch):
    arguments, output, _ = finished
    before = (output / "compare.json").read_bytes()
    monkeypatch.setattr(compare, "hardware", lambda: "another machine")
    with pytest.raises(SystemExit, match="other hardware; give another --output"):
        compare.main(arguments)
    assert (output / "compare.json").read_bytes() == before
    # By default, every machine has a folder of its own.
    assert compare.slug("NVIDIA H200") != compare.slug("NVIDIA A100")


def test_wrong_latents_are_told(finished, monkeypatch, capsys):
    arguments, output, _ = finished
    report = report_of(output)
    answers = report["models"]["tiny FLUX.1"]["processes"]["jaxspd"]
    for distance in (0.5, float("nan")):
        answers[0]["cells"][GROWN]["distance"] = distance
        (line,) = compare_numbers.wrong(report)
        assert line.startswith(f"tiny FLUX.1, jaxspd, {GROWN}")
    monkeypatch.setattr(compare, "measure", lambda *_: [report["models"]])
    assert compare.main(arguments) == 1
    assert f"wrong: {line}" in capsys.readouterr().err


MATMUL = {"jaxspd": [40.0, 60.0], "PyTorch, compiled": [70.0, 80.0], COMPILED: [10.0, 20.0]}


def report_with(seconds):
    """A model whose runs took `seconds[framework][cell]`, a list of stages for each run."""
    flops = {FULLRES: [100e9], GROWN: [10e9, 50e9]}
    steps = {FULLRES: [2], GROWN: [1, 1]}
    grids = {FULLRES: [[8, 8]], GROWN: [[4, 4], [8, 8]]}
    return {
        "cells": {
            name: {
                "flops": {"jax": f, "torch": f},
                "steps": steps[name],
                "plan": {"stages": [{"latent": grid} for grid in grids[name]]},
            }
            for name, f in flops.items()
        },
        "processes": {
            framework: [
                {
                    "matmul_flops": MATMUL[framework],
                    "cells": {c: {"denoise": runs} for c, runs in cells.items()},
                }
            ]
            for framework, cells in seconds.items()
        },
    }


def test_speed_up_is_of_runs_side_by_side_in_the_same_framework():
    model = report_with(
        {
            # The machine slows down after the first round: 8/4, 90/45 and 100/40.
            "jaxspd": {FULLRES: [[8.0], [90.0], [100.0]], GROWN: [[1.0, 3.0], [10.0, 35.0], [10.0, 30.0]]},
            "PyTorch, compiled": {FULLRES: [[12.0]]},
            COMPILED: {GROWN: [[2.0, 4.0]]},
        }
    )
    assert compare_numbers.speed_up(model, "jaxspd", GROWN) == 2.0
    assert compare_numbers.limit(model, "jaxspd", GROWN) == 100 / 60
    # Compiled PyTorch has full resolution in a process of its own.
    assert compare_numbers.speed_up(model, COMPILED, GROWN) == 2.0
    assert compare_numbers.matmul(model) == {"jaxspd": 50.0, "PyTorch": 45.0}
    # Steps of a grid are those of every cell: 4, 45, 50, 3, 35 and 30 seconds at full resolution.
    assert compare_numbers.steps(model) == {
        (4, 4): {"jaxspd": 10.0, "PyTorch, compiled": 2.0},
        (8, 8): {"jaxspd": 32.5, "PyTorch, compiled": 5.0},
    }
    fine = compare_report.step_table(model)[-1]
    assert fine.endswith("| 32.5000 (1.54 GFLOP/s) | 5.0000 (10 GFLOP/s) | 6.50 |")


SMALL = {
    "flux2": ("klein_folder", size(128, 192, 6)),
    "wan": ("wan_folder", size(128, 192, 6, num_frames=5, guidance_scale=5.0, flow_shift=5.0)),
    "z_image": ("z_image_folder", size(128, 192, 12, guidance_scale=4.0)),
    "qwen_image": ("qwen_image_folder", size(128, 192, 6, guidance_scale=4.0)),
}


@pytest.mark.parametrize("family", SMALL)
def test_every_family(family, request, tmp_path, monkeypatch):
    """jaxspd and eager PyTorch on random weights without encoders, as the `full` preset runs them."""
    folder, asked = request.getfixturevalue(SMALL[family][0]), SMALL[family][1]
    parts = [
        {k: v for k, v in read_config(folder / part).items() if not k.startswith("_")}
        for part in ("transformer", "vae")
    ]
    preset = Preset((Model(family, family, asked, (Cell(), Cell(0.3)), *parts),), "float32", 1, 1, 64, 1e-4)
    scripts = {"prepare.py": prepare, "jax_worker.py": jax_worker, "torch_worker.py": torch_worker}

    def in_this_process(script, job, compiled=None):
        (tmp_path / "job.json").write_text(json.dumps(job))
        scripts[script].main(str(tmp_path / "job.json"), str(tmp_path / "answer.json"))
        return json.loads((tmp_path / "answer.json").read_text())

    monkeypatch.setattr(compare, "run", in_this_process)
    monkeypatch.setattr(
        compare, "FRAMEWORKS", {name: compare.FRAMEWORKS[name] for name in (compare.JUDGE, "jaxspd")}
    )
    [models] = compare.measure(preset, compare.Answers(tmp_path, {}), tmp_path)
    assert compare_numbers.wrong({"preset": {"bound": 1e-4}, "models": models}) == []
    answer = models[family]["processes"]["jaxspd"][0]
    assert len(answer["cells"]["δ 0.3"]["denoise"][0]) == 2
    assert answer["compiled_later"] == 0
    masked = family in ("z_image", "qwen_image")
    assert (models[family]["text_tokens"]["torch"] < models[family]["text_tokens"]["jax"]) == masked


def test_a_checkpoint_of_other_options_is_written_anew(tmp_path):
    model, folder = PRESETS["ci"].models[0], tmp_path / "model"

    def layers(**options):
        transformer = {**model.transformer, **options}
        write_checkpoint(folder, model.family, transformer, model.vae, torch.float32)
        return read_config(folder / "transformer")["num_layers"]

    assert layers() == 1
    written = (folder / "made_of.json").stat().st_mtime_ns
    assert layers() == 1
    assert (folder / "made_of.json").stat().st_mtime_ns == written
    assert layers(num_layers=2) == 2


def test_written_shards_hold_every_weight(tmp_path):
    model = PRESETS["ci"].models[0]
    folder = write_checkpoint(
        tmp_path / "model", model.family, model.transformer, model.vae, torch.bfloat16, shard_size="50KB"
    )
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    family = open_family(folder)
    parameters = load_parameters(
        Checkpoint(folder / "transformer"), family.abstract_parameters(np.float32), family.rules
    )
    for path, array in flat_parameters(parameters).items():
        assert np.isfinite(array).all(), path
        assert np.std(array) > 0, path


# The stages' steps as published, at the published sizes.
SPLITS = {
    "FLUX.1-dev": [[50], [18, 32], [28, 22], [10, 8, 32]],
    "FLUX.2-klein-4B": [[30], [18, 12], [20, 10]],
    "Wan2.1-T2V-1.3B": [[50], [23, 27], [27, 23], [33, 17], [37, 13]],
    "Z-Image": [[50], [26, 24], [35, 15], [39, 11]],
    "Qwen-Image": [[30], [13, 17], [16, 14], [19, 11]],
    "Wan2.1-T2V-1.3B at 720p": [[50], [29, 21], [38, 12]],
}


def test_presets_are_what_was_published():
    models = PRESETS["full"].models + PRESETS["720p"].models
    assert {model.name for model in models} == set(SPLITS)
    for model in models:
        family = family_class(model.family)()
        for cell, steps in zip(model.cells, SPLITS[model.name], strict=True):
            plan = plan_request(family, SamplingParams(**model.request, **cell.request))
            assert [stage.steps for stage in plan.stages] == steps
            assert cell.published


def test_published_seconds_come_with_what_is_known_of_them():
    (model,) = PRESETS["720p"].models
    published = {cell.name: cell.published for cell in model.cells}
    speedups = {cell.name: cell.published_speedup for cell in model.cells}
    lines = compare_report.published_table(
        {"published": published, "published_speedup": speedups, "published_note": model.note}
    )
    assert "| δ 0.01 | 519.6 | 2.18× |" in lines
    assert "| δ 0.05 | 340.1 | 3.34× |" in lines
    assert lines[-1] == model.note
    # Published seconds and speed-ups agree, rounded or cut off.
    for model in PRESETS["full"].models + PRESETS["720p"].models:
        fullres, *grown = model.cells
        for cell in grown:
            assert fullres.published / cell.published == pytest.approx(cell.published_speedup, abs=0.01)
