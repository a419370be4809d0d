"""The frontier's measurements: what they say of errors that are known, and a small run of it all."""

import json
import sys

import frontier
import frontier_check
import numpy as np
import pytest
from PIL import Image


def test_a_bands_error_is_its_share_of_the_power():
    draw = np.random.default_rng(0)
    truth = draw.standard_normal((4, 3, 32, 32))
    assert frontier.band_errors(1.1 * truth, truth) == pytest.approx([-20] * 4)
    # An offset is in the lowest band alone.
    low, *others = frontier.band_errors(truth + 5, truth)
    assert low > 0
    assert max(others) < -200


def test_the_front_is_what_no_other_beats_in_both():
    pairs = [(1, 50), (2, 50), (2, 40), (3, 45), (4, 30), (3, 45)]
    points = [{"faster": faster, "latents": latents} for faster, latents in pairs]
    assert [(p["faster"], p["latents"]) for p in frontier.front(points)] == [(2, 50), (3, 45), (4, 30)]


def test_candidates_are_the_same_in_every_run_and_the_rivals_come_first():
    settings = frontier.candidates()
    assert settings == frontier.candidates()
    assert all("progressive_mode" not in one for one in settings[: 2 * len(frontier.STEPS)])
    assert len({frontier.title(one) for one in settings}) == len(settings) > 500


def test_a_run_from_end_to_end_and_a_second_that_has_nothing_left_to_do(flux1_folder, tmp_path, monkeypatch):
    settings = [
        frontier.full("unipc", 5),
        frontier.full("unipc", 2),
        frontier.grown("unipc", 5, 0.5, history="carry"),
        frontier.grown("unipc", 5, 0.49, history="carry"),  # the same steps
        frontier.grown("unipc", 1, 0.5, history="carry"),  # a stage would have none
    ]
    monkeypatch.setattr(frontier, "candidates", lambda: settings)
    monkeypatch.setattr(frontier, "SPEEDS", {"exact": None})
    (tmp_path / "prompts.txt").write_text("a lake\na hill\n")
    flags = ["--model-path", str(flux1_folder), "--prompts", str(tmp_path / "prompts.txt"), "--truth", "6"]
    flags += ["--common", '{"height": 64, "width": 64}']
    flags += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(frontier.Trial, "at_speed", lambda *_: settings[1])
    monkeypatch.setattr(sys, "argv", ["frontier.py", *flags])
    frontier.main()
    header, *points = map(json.loads, (tmp_path / "out" / "points.jsonl").read_text().splitlines())
    assert header["prompts"] == 2
    assert [point["title"] for point in points] == ["unipc 2", "unipc 5", "unipc 5, δ 0.5, carried"]
    assert [point["faster"] for point in points[:2]] == pytest.approx([25, 10])
    assert points[2]["faster"] > 10
    assert points[1]["latents"] > points[0]["latents"]
    assert "speed exact" in (tmp_path / "out" / "frontier.md").read_text()
    for name in ("frontier.png", "sheet.jpg"):
        with Image.open(tmp_path / "out" / name) as image:
            image.load()

    monkeypatch.setattr(frontier.Trial, "make", None)  # whatever were made now would fail
    frontier.main()
    monkeypatch.setattr(sys, "argv", ["frontier.py", *flags, "--truth", "7"])
    with pytest.raises(SystemExit, match="holds other measurements"):
        frontier.main()


def test_the_check_compares_what_the_frontier_measured():
    titles = [cell.name for cell in frontier_check.cells()]
    assert titles[0] == "euler 50"
    assert len(set(titles)) == len(titles)
    points = (frontier.RESULTS / "frontier" / "points.jsonl").read_text().splitlines()[1:]
    assert set(titles) <= {json.loads(point)["title"] for point in points}
