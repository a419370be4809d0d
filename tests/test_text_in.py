"""Text that a user gives: configurations, prompt files, spectra, and words on the command line."""

import json

import pytest

from jaxspd.cli import main
from jaxspd.errors import UsageError
from jaxspd.request import SamplingParams
from jaxspd.request_files import read_config_file, read_prompts
from jaxspd.spectral.spectrum import Spectrum
from jaxspd.yaml_core import parse_yaml


def config(tmp_path, text, name="config.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# JSON


@pytest.mark.parametrize("name", ["config.json", "config.JSON", "config.yaml", "config"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_json_is_json_whatever_its_file_is_called(tmp_path, name, start):
    values = {"prompt": "a 🌄, no", "progressive_delta": 1e-05, "seed": 7}
    text = json.dumps(values, indent="\t")
    assert "\\ud83c" in text  # half of the emoji
    assert "1e-05" in text
    assert "\t" in text
    assert read_config_file(config(tmp_path, start + text, name)) == values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("height: 64", "Expecting value"),
        ('{"height": 64,}', "line 1 column"),
        ('{"height": 64, "height": 65}', "it gives 'height' twice"),
        ('{"output-path": "a", "output_path": "b"}', "it gives 'output_path' twice"),
        ('{"guidance_scale": NaN}', "NaN is no number in JSON"),
        ('{"guidance_scale": -Infinity}', "-Infinity is no number in JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "must hold keys and values"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json_configuration(refused, tmp_path, text, says):
    line = refused("--config", str(config(tmp_path, text, "config.json")))
    assert says in line
    assert "config.json" in line


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("On", "On"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("010", 10),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("5e-2", 0.05),
        ("1e5", 1e5),
        ("1e-05", 1e-05),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5E+3", -1500.0),
        ("-.inf", float("-inf")),
        ("2024-01-01", "2024-01-01"),
        ("1/3 2/3 1", "1/3 2/3 1"),
        ('"\\ud83c\\udf04 \\U0001F304"', "🌄 🌄"),
        ("dawn\u2028noon\u2029dusk\x85night", "dawn\u2028noon\u2029dusk\x85night"),
        ("[1, 0.5, a]", [1, 0.5, "a"]),
        ("{amplitude: 20, exponent: 3.0}", {"amplitude": 20, "exponent": 3.0}),
    ],
)
def test_yaml_is_read_by_its_core_schema(tmp_path, text, value):
    read = read_config_file(config(tmp_path, f"key: {text}\n"))
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("height: 64\nheight: 65", "it gives 'height' twice"),
        ("seed: &a [1]\nprompt: *a", "aliases are not read, write out the value, line 2"),
        ("seed: &a [*a]", "aliases are not read"),
        ("seed: " + "[" * 100_000, "nested too deeply"),
        ("? [a]\n: b", "unhashable"),
        ("seed: !!python/name:os.system", "could not determine a constructor"),
        ("spectrum: {amplitude: !!binary aGk=, exponent: 1}", "could not determine a constructor"),
        ("seed: !!int many", "many"),
        ("seed: !!bool many", "many"),
        ("seed: !!map [1]", "cannot unpack"),
        ("\theight: 64", "line 1"),
        ("a: b\n---\nc: d", "another document"),
        ("progressive_respace: yes", "must be true or false, not 'yes'"),
        ("progressive_delta: .nan", "must be a number, not nan"),
        ("prompt: 2024", "prompt must be text, not 2024"),
        ("prompt: '" + "x" * 300 + "'\nseed: '" + "x" * 300 + "'", "not 'xxxxx"),
        ('prompt: "half \\ud83c"', "prompt holds bytes or escapes that are no text"),
        ("seed: 0x" + "f" * 9000, "seed must be a whole number"),
    ],
)
def test_what_is_no_yaml_configuration(tmp_path, text, says):
    with pytest.raises(UsageError) as raised:
        SamplingParams.from_mapping(read_config_file(config(tmp_path, text)))
    line = str(raised.value)
    assert "\n" not in line
    assert says in line
    assert len(line.replace(str(tmp_path), "")) < 200


def test_an_explicit_tag_is_honoured():
    assert parse_yaml("[!!str 1, !!float 1, !!int '010']") == ["1", 1.0, 10]


# Prompt files


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    assert read_prompts(config(tmp_path, "\ufeffa lake\na meadow")) == ["a lake", "a meadow"]


def test_prompts_end_at_line_feeds_only(tmp_path):
    odd = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\x0cb", "a\x1cb", "a\rb"]
    assert read_prompts(config(tmp_path, "\r\n".join(odd) + "\n\n \n")) == odd
    assert read_prompts(config(tmp_path, "\n".join(odd))) == odd


# All of them


READERS = {
    "prompts from": read_prompts,
    "the configuration in": read_config_file,
    "a spectrum from": Spectrum.from_file,
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("latin-1", "(it is no UTF-8 text); save it as UTF-8"),
        ("utf-16", "(it is no UTF-8 text); save it as UTF-8"),
        ("utf-16-le", "(it is no UTF-8 text); save it as UTF-8"),
        ("missing", "(No such file or directory)"),
        ("folder", "(it is a folder); give a file"),
    ],
)
def test_a_file_that_is_no_text_is_one_line(tmp_path, what, kind, says):
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes("a höhe".encode(kind))
    line = f"cannot read {what} {path} {says}"
    if kind == "folder" and what == "the configuration in":  # which may be one of frames
        line = f"{path} was not written by jaxspd: it holds no parameters"
    with pytest.raises(UsageError) as raised:
        READERS[what](path)
    assert str(raised.value) == line


@pytest.mark.parametrize("what", READERS)
def test_a_home_folder_is_found(tmp_path, monkeypatch, what):
    monkeypatch.setenv("HOME", str(tmp_path))
    config(tmp_path, '{"amplitude": 1, "exponent": 2}', "file.json")
    READERS[what]("~/file.json")
    with pytest.raises(UsageError, match=r"home folder in ~nobody-of-this-name/.* is not known"):
        READERS[what]("~nobody-of-this-name/file.json")


@pytest.mark.parametrize("text", ["", "a\0b", "a\udcff"])
@pytest.mark.parametrize("what", READERS)
def test_what_can_be_no_path(what, text):
    with pytest.raises(UsageError, match="is no path"):
        READERS[what](text)


def test_a_spectrum_is_strict_json(tmp_path):
    path = config(tmp_path, '{"amplitude": 1, "exponent": NaN}', "s.json")
    with pytest.raises(UsageError, match=r"cannot read a spectrum from .*NaN is no number"):
        Spectrum.from_file(path)
    path = config(tmp_path, '\ufeff{"amplitude": 1, "exponent": 2}', "s.json")
    assert Spectrum.from_file(path) == Spectrum(1.0, 2.0)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "output_path", "output_file_name"])
def test_bytes_that_are_no_text_on_the_command_line(capsys, name):
    """The system hands them on as halves of a surrogate pair."""
    flags = {"prompt": "a lake", name: b"caf\xe9".decode("utf-8", "surrogateescape")}
    command = [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", value)]
    assert main(["generate", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    option = f"--{name.replace('_', '-')}" if "_" in name else name
    assert line == f"jaxspd: {option} holds bytes or escapes that are no text; give it in UTF-8"
