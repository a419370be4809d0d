"""Models without a spectrum of their own grow by FLUX.1's, and say so once."""

import json
import logging

import pytest

from jaxspd import DiffGenerator
from jaxspd.cli import main

NOTICE = "grows by FLUX.1's power spectrum"
GROWING = ["--progressive-mode", "dct_rewind"]


def notices(capsys):
    """How often what the command wrote says it."""
    said = capsys.readouterr()
    return (said.out + said.err).count(NOTICE)


@pytest.mark.parametrize("family", ["flux2", "qwen_image"])
@pytest.mark.parametrize("flags", [[], ["--json"], ["--num-inference-steps", "30", "--speed", "fast"]])
def test_plan_says_once_whose_spectrum_it_is(family, flags, capsys):
    assert main(["plan", "--family", family, *GROWING, *flags]) == 0
    assert notices(capsys) == 1


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        *((family, GROWING) for family in ("flux1", "wan", "z_image")),
        ("qwen_image", []),
        ("qwen_image", [*GROWING, "--progressive-levels", "0"]),
        ("qwen_image", [*GROWING, "--progressive-sigmas", "0.9"]),
    ],
)
def test_nothing_is_said_where_no_spectrum_is_borrowed(family, flags, capsys):
    assert main(["plan", "--family", family, *flags]) == 0
    assert notices(capsys) == 0


def test_a_measured_spectrum_is_not_borrowed(qwen_image_folder, tmp_path, capsys):
    """Even if it has the numbers of FLUX.1's."""
    measured = json.dumps({"amplitude": 203.615097, "exponent": 1.915461})
    given = tmp_path / "measured.json"
    given.write_text(measured)
    assert main(["plan", "--family", "qwen_image", *GROWING, "--spectrum", str(given)]) == 0
    copy = tmp_path / "model"
    copy.mkdir()
    for part in qwen_image_folder.iterdir():
        (copy / part.name).symlink_to(part)
    (copy / "spectrum.json").write_text(measured)
    assert main(["plan", "--model-path", str(copy), *GROWING]) == 0
    assert notices(capsys) == 0


def test_generate_says_it_once_before_anything_is_loaded(klein_folder, tmp_path, capsys):
    empty_share = ["--shard", "2/2", "--output-path", str(tmp_path), "--prompt", "a lake"]
    assert main(["generate", "--model-path", str(klein_folder), *GROWING, *empty_share]) == 0
    assert notices(capsys) == 1


def test_a_generator_says_it_for_the_first_request_alone(qwen_image_folder, monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("jaxspd"), "handlers", [handler])
    generator = DiffGenerator.from_pretrained(qwen_image_folder, compilation_cache=False)
    counts = []
    for mode in ("fullres", "dct_rewind", "dct"):
        request = {"prompt": "a lake", "height": 64, "width": 64, "progressive_mode": mode}
        generator.iterate(request, save_output=False)
        counts.append(sum(NOTICE in line for line in said))
    assert counts == [0, 1, 1]
