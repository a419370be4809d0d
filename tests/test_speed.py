"""`--speed`: what it sets, what wins over it, and the measurements it rests on."""

import json
from pathlib import Path

import pytest

from jaxspd import DiffGenerator
from jaxspd.cli import main
from jaxspd.errors import UsageError
from jaxspd.families import PIPELINES, family_class, open_family
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.speed import SPEEDS

POINTS = Path(__file__).parents[1] / "bench" / "results" / "frontier" / "points.jsonl"


@pytest.mark.parametrize("name", sorted(set(PIPELINES.values())))
def test_each_speed_takes_fewer_flops_than_the_one_before_it(name, klein_base_folder):
    family = open_family(klein_base_folder) if name == "flux2" else family_class(name)()
    plans = [plan_request(family, SamplingParams(speed=speed)) for speed in SPEEDS]
    assert plans[0] == plan_request(family, SamplingParams())
    flops = [plan.flops(family.forward_flops) for plan in plans]
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == 4
    assert flops[0] > 3 * flops[2]
    assert {plan.history for plan in plans[1:]} == {"carry"}


def test_what_is_asked_for_wins():
    family = family_class("flux1")()
    asked = {"num_inference_steps": 30, "scheduler": "euler", "progressive_delta": 0.1}
    request = resolve(family, SamplingParams(speed="fast", **asked))
    assert {name: getattr(request, name) for name in asked} == asked
    assert (request.progressive_mode, request.progressive_history) == ("dct_rewind", "carry")
    full = resolve(family, SamplingParams(speed="fast", progressive_mode="fullres"))
    assert (full.progressive_mode, full.scheduler) == ("fullres", "unipc")
    sigmas = plan_request(family, SamplingParams(speed="fast", progressive_sigmas=[0.7]))
    assert sigmas.delta is None
    assert sigmas.stages[1].sigma <= 0.7


def test_no_speed_asks_for_more_steps_than_the_model_card(flux1_folder):
    class Krea(type(open_family(flux1_folder))):
        default_steps = 16

    family = Krea(**vars(open_family(flux1_folder)))
    steps = [resolve(family, SamplingParams(speed=speed)).num_inference_steps for speed in SPEEDS]
    assert steps == [16, 16, 14, 8]


def test_a_distilled_model_stays_as_it_is(z_image_turbo_folder, caplog):
    family = open_family(z_image_turbo_folder)
    assert plan_request(family, SamplingParams(speed="fast")) == plan_request(family, SamplingParams())
    assert "Z-Image is distilled for 8 steps" in caplog.text


def test_plan_tells_what_a_speed_means(capsys):
    flags = ["plan", "--family", "flux1", "--speed", "fast"]
    assert main([*flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    told = plan["speed"]
    assert told["sets"] == SPEEDS["fast"].sets
    assert told["faster"] == pytest.approx(plan["flop_speedup"] * 50 / plan["steps"])
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert f"--num-inference-steps {told['sets']['num_inference_steps']} --scheduler unipc" in said
    assert f"{told['faster']:.2f}× fewer FLOPs than 50 steps at full resolution" in said
    assert main(["plan", "--family", "flux1", "--speed", "warp"]) == 2
    assert capsys.readouterr().err == "jaxspd: unknown speed 'warp'; use one of exact, high, fast, fastest\n"


def test_a_speed_takes_the_place_of_what_a_configuration_file_says_in_other_words(tmp_path, monkeypatch):
    """As the file of a picture made at another speed does, which holds all that it meant."""
    asked = []

    def iterate(self, values, **_):
        asked.append(values)
        raise UsageError("enough")

    opened = type("Opened", (), {"iterate": iterate})()
    monkeypatch.setattr(DiffGenerator, "from_pretrained", lambda **_: opened)
    picture = {"prompt": "a lake", "height": 64, "progressive_sigmas": [0.5], **SPEEDS["fastest"].sets}
    (tmp_path / "picture.json").write_text(json.dumps(picture))
    flags = ["--speed", "exact", "--num-inference-steps", "3"]
    assert main(["generate", "--config", str(tmp_path / "picture.json"), *flags]) == 2
    assert asked == [{"prompt": "a lake", "height": 64, "speed": "exact", "num_inference_steps": 3}]


def test_a_picture_holds_what_its_speed_meant(flux1_folder):
    family = open_family(flux1_folder)
    request = resolve(family, SamplingParams(speed="fastest", progressive_delta=0.3))
    assert request.speed is None
    for name, value in (SPEEDS["fastest"].sets | {"progressive_delta": 0.3}).items():
        assert getattr(request, name) == value


def test_the_table_holds_what_was_measured():
    """`python bench/frontier.py` measures the demo and writes the table's figures."""
    points = [json.loads(line) for line in POINTS.read_text().splitlines()[1:]]
    for speed in SPEEDS.values():
        sets = speed.sets or {"scheduler": "euler", "num_inference_steps": 50, "forecast": None}
        [point] = [p for p in points if sets.items() <= p["settings"].items() and len(p["settings"]) <= 6]
        for figure, value in speed.demo.items():
            assert value == pytest.approx(point[figure], abs=0.06), (sets, figure)
