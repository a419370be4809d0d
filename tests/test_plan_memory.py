"""What `jaxspd plan` says of memory, against what the compilers of cards say."""

import json

import cards
import pytest
from device_models import MODELS, Published
from machine import RESULTS

from jaxspd import cli
from jaxspd.plan_memory import plan_memory
from jaxspd.planning import plan_request

COMPILED = json.loads((RESULTS / "devices" / "devices.json").read_text())
CARDS = ("a6000", "h100")


def counted(published):
    request = published.request
    return plan_memory(published.family, request, plan_request(published.family, request))


@pytest.mark.parametrize("model", [m for m in MODELS if not m.quantize], ids=lambda model: model.name)
def test_formulas_are_within_a_tenth_of_the_compilers_figures(model):
    published = Published(model)
    *_, full = published.grids
    memory, compared = counted(published), 0
    for known in (COMPILED[card].get(model.name, {}) for card in CARDS if card in COMPILED):
        said = {name: answer["bytes"] for name, answer in known.items() if "bytes" in answer}
        encodes = [size for name, size in said.items() if name.startswith("encode")]
        for phase, peak in (
            ("encode_peak", memory.weights + max(encodes, default=0)),
            ("denoise_peak", said.get(f"denoise {full}")),
            ("decode_peak", memory.weights + said.get(f"decode {full}", 0)),
        ):
            if peak is None or peak == memory.weights:
                continue  # not compiled yet
            compared += 1
            # The weights are exact, and would hide what is not.
            beside = getattr(memory, phase) - memory.weights, peak - memory.weights
            assert beside[0] == pytest.approx(beside[1], rel=0.1), (phase, model.name)
        for answer in known.values():
            if answer.get("weights") and answer.get("layers"):
                assert answer["weights"] == memory.weights
    assert compared >= 3


def memory_of(capsys, *flags):
    assert cli.main(["plan", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)["memory"]


def test_weights_may_be_streamed_or_quantised(capsys):
    whole, streamed, rounded = (
        memory_of(capsys, "--family", "flux1", *flags)
        for flags in ([], ["--dit-cpu-offload", "true"], ["--quantize", "int8"])
    )
    # Two layers: a double block has 340 M parameters, and what is no layer 64 M.
    assert streamed["weights"] == pytest.approx(2 * (2 * 340e6 + 64e6), rel=0.01)
    assert 0.5 * whole["weights"] < rounded["weights"] < 0.7 * whole["weights"]
    for other in (streamed, rounded):
        assert other["denoise_peak"] - other["weights"] == whole["denoise_peak"] - whole["weights"]


def test_guidance_takes_both_prompts(capsys):
    memories = [memory_of(capsys, "--family", "wan", "--guidance-scale", scale) for scale in ("1", "5")]
    one, two = (m["denoise_peak"] - m["weights"] for m in memories)
    assert 1.9 * one < two < 2 * one
    assert set(memories[0]) == {"weights", "encode_peak", "denoise_peak", "decode_peak"}


def test_forecasts_remember(capsys):
    plain, forecast = (
        memory_of(capsys, "--family", "wan", *flags)["denoise_peak"] for flags in ([], ["--forecast", "3"])
    )
    latents = 4 * 16 * 21 * 60 * 104
    assert (forecast - plain) % latents == 0
    assert forecast > plain


@pytest.mark.parametrize("name", ["FLUX.2-klein-9B", "Wan2.1-T2V-14B"])
def test_documented_rows_are_what_the_formulas_say(name):
    [model] = (model for model in MODELS if model.name == name)
    assert cards.row(model) in (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
