"""The parity suite: a tiny run of it all, and that it fails where jaxspd computes something else."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import parity
import parity_jax
import parity_report
import parity_torch
import prepare
import pytest
from compare import ProcessFailed
from flax import nnx
from presets import OFFICIAL, Model, size

from jaxspd.convert.checkpoint import read_config
from jaxspd.families import PIPELINES, family_class

SCRIPTS = {"prepare.py": prepare, "parity_jax.py": parity_jax, "parity_torch.py": parity_torch}
load = parity_jax.load_transformer


@pytest.fixture
def suite(tmp_path, klein_folder, qwen_image_folder, monkeypatch):
    """`suite()` is `(exit code, report)` of a tiny FLUX.2, a tiny Qwen-Image, which is guided and masks its
    padding, and a little attention; all in this process.
    """

    def tiny(name, family, folder):
        options = (
            {k: v for k, v in read_config(folder / part).items() if not k.startswith("_")}
            for part in ("transformer", "vae")
        )
        return Model(name, family, size(128, 192, 4, guidance_scale=4.0), (), *options)

    models = (
        tiny("tiny FLUX.2", "flux2", klein_folder),
        tiny("tiny Qwen-Image", "qwen_image", qwen_image_folder),
    )

    def in_this_process(script, job):
        (tmp_path / "job.json").write_text(json.dumps(job))
        SCRIPTS[script].main(str(tmp_path / "job.json"), str(tmp_path / "answer.json"))
        return json.loads((tmp_path / "answer.json").read_text())

    monkeypatch.setattr(parity, "run", in_this_process)
    monkeypatch.setattr(parity, "OFFICIAL", models)
    monkeypatch.setattr(parity, "VAES", {model.family: model.vae for model in models})
    scale = replace(parity.SCALES["cpu"], attention=(320, 96, 2))
    monkeypatch.setitem(parity.SCALES, "cpu", scale)

    def run():
        code = parity.main(["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")])
        return code, json.loads((tmp_path / "out" / "parity.json").read_text())

    yield run
    jax.config.update("jax_default_matmul_precision", None)


def test_a_tiny_run_passes_and_is_kept(suite, tmp_path, monkeypatch, capsys):
    code, report = suite()
    assert code == 0, capsys.readouterr().err
    assert list(report["parts"]) == [
        "attention",
        "tiny FLUX.2, 1 layer of each kind",
        "tiny Qwen-Image, 1 layer of each kind",
    ]
    kinds = [f"{keys}{padded}" for keys in ("320 keys", "96 keys") for padded in ("", ", padded")]
    assert list(report["parts"]["attention"]["cases"]) == [f"320 queries, {kind}" for kind in kinds]
    for name, part in list(report["parts"].items())[1:]:
        coarse, fine, loop = part["cases"]
        grids = ("4×6", "8×12") if "FLUX.2" in name else ("8×12", "16×24")
        assert (coarse, fine) == tuple(f"velocity, {grid} latents" for grid in grids)
        before, after = loop.removeprefix("whole loop, ").removesuffix(" steps").split(" + ")
        assert min(int(before), int(after)) > 0
    assert report["skipped"] == {f"{m.name}, full size": "needs a GPU" for m in parity.OFFICIAL}
    # bfloat16 was bfloat16, and float32 was not.
    for _, _, values in parity_report.cases(report):
        assert min(values["jax"], values["torch"]) > 1e-4
        assert 0 < values["float32"] < 1e-5
    assert "All within bounds" in (tmp_path / "out" / "parity.md").read_text()
    # Nothing is left of checkpoints and outputs, and nothing is asked twice.
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["answers.json"]
    monkeypatch.setattr(parity, "run", lambda *_: pytest.fail("asked again"))
    assert suite() == (0, report)


def test_a_wrong_weight_is_found(suite, monkeypatch, capsys):
    def wrong(folder, abstract, rules):
        parameters = load(folder, abstract, rules)
        _, last = nnx.to_flat_state(parameters)[-1]
        last.set_value(1.01 * last.get_value())
        return parameters

    monkeypatch.setattr(parity_jax, "load_transformer", wrong)
    code, report = suite()
    assert code == 1
    told = capsys.readouterr().err
    for name, part in list(report["parts"].items())[1:]:
        for case in part["cases"]:
            assert f"wrong: {name}, {case}: " in told
    assert "from PyTorch in float32, above" in told
    assert "wrong: attention" not in told


def test_less_than_bfloat16_is_found(suite, monkeypatch, capsys):
    def rounded(folder, abstract, rules):
        parameters = load(folder, abstract, rules)
        if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract)):  # biases always are
            return parameters
        # Three bits of mantissa, as in float8.
        return jax.tree.map(lambda a: a.astype(jnp.float8_e4m3fn).astype(a.dtype), parameters)

    monkeypatch.setattr(parity_jax, "load_transformer", rounded)
    code, report = suite()
    assert code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wrong")]
    assert all("times as far from float32 as PyTorch, above 1.2" in line for line in lines)
    for name, part in list(report["parts"].items())[1:]:
        for case in list(part["cases"])[:2]:
            assert any(line.startswith(f"wrong: {name}, {case}: ") for line in lines)


def test_a_part_that_fails_is_told_and_the_others_are_compared(suite, monkeypatch, capsys):
    def fails(job):
        raise ProcessFailed("parity_torch.py failed")

    monkeypatch.setattr(parity_torch, "model_outputs", fails)
    code, report = suite()
    assert code == 1
    assert list(report["parts"]) == ["attention"]
    assert set(report["failed"].values()) == {"parity_torch.py failed"}
    assert "wrong: tiny FLUX.2, 1 layer of each kind: parity_torch.py failed" in capsys.readouterr().err


def case(**values):
    right = {"float32": 1e-6, "jax": 0.01, "torch": 0.01, "ratio": 1.0, "apart": 0.01}
    return {"parts": {"attention": {"cases": {"a case": {**right, **values}}}}, "failed": {}}


@pytest.mark.parametrize(
    "values",
    [{"float32": 2e-5}, {"float32": float("nan")}, {"ratio": 1.21}, {"ratio": float("nan")}],
    ids=["float32", "no float32", "ratio", "no ratio"],
)
def test_what_is_out_of_bounds_or_no_number_is_wrong(values):
    assert parity_report.wrong(case(ratio=1.19, float32=9e-6)) == []
    assert len(parity_report.wrong(case(**values))) == 1


def test_official_width_and_every_kind_of_layer():
    assert {model.family for model in OFFICIAL} == set(PIPELINES.values())
    for model in OFFICIAL:
        config = family_class(model.family)().config
        counts = {name for name in vars(config) if "layers" in name}
        assert counts
        assert counts <= parity.LAYERS
        few = parity.few_layers(model, 2)
        changed = {key for key in few.transformer if few.transformer[key] != model.transformer.get(key)}
        assert changed <= counts
        assert parity.parameters(few) < parity.parameters(model)


def test_full_size_runs_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "memory_limit", lambda device: 43e9)
    monkeypatch.setattr(parity, "host_memory", lambda: (128e9, 128e9))
    asked = {name: ask for name, ask in parity.parts("gpu", tmp_path) if name.endswith("full size")}
    assert list(asked) == [
        f"{name}, full size"
        for name in ("Wan2.1-T2V-1.3B", "FLUX.2-klein-4B", "Z-Image", "FLUX.1-dev", "Qwen-Image")
    ]
    skipped = {name for name, ask in asked.items() if isinstance(ask, str)}
    assert skipped == {"FLUX.1-dev, full size", "Qwen-Image, full size"}
    assert asked["FLUX.1-dev, full size"] == "float32 takes 58 GB, the device has 43 GB"
    monkeypatch.setattr(parity, "host_memory", lambda: (8e9, 8e9))
    assert parity.lacking(10**9, tmp_path) == "float32 takes 10 GB, the host has 8 GB"


def test_frameworks_on_different_devices_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(parity.torch.cuda, "is_available", lambda: True)
    assert parity.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("parity: JAX runs on a cpu, PyTorch on a gpu: ")


@pytest.mark.gpu
def test_attention_through_cudnn_is_as_near_as_pytorchs(tmp_path):
    found = parity.ask_attention(1024, 512, 8, tmp_path)
    assert found["cudnn"]
    assert parity_report.wrong({"parts": {"attention": found}, "failed": {}}) == []
