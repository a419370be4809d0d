"""What all tests share: the CPU, no network, and small checkpoints in the official layout."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
import torch

from jaxspd import DiffGenerator
from jaxspd.cli import main
from tests import tiny, toy

COMPILE = "/jax/core/compile/backend_compile_duration"


def pytest_configure(config):
    # Parity is asserted in float32 on the CPU. Only a run of the `gpu` tests uses other devices.
    if config.getoption("markexpr") != "gpu":
        jax.config.update("jax_platforms", "cpu")
        # Tiny tensors gain nothing from more threads, which would wait for shared cores.
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() == "cpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, and JAX sees none"))


@pytest.fixture(scope="session", autouse=True)
def _own_compilation_cache(tmp_path_factory, worker_id):
    """Gives the tests their own compilation cache instead of the user's. It also keeps small programs."""
    base = tmp_path_factory.getbasetemp()
    cache = (base if worker_id == "master" else base.parent) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def compiled():
    """A list that grows by one whenever XLA compiles a program."""
    events = []

    def listen(event, duration, **_):
        if event == COMPILE:
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, checks that it refuses as it should, and returns its line."""

    def run(*flags, model=None, prompt="a lake"):
        out = tmp_path / "out"
        command = ["generate", "--output-path", str(out), "--prompt", prompt]
        command += ["--model-path", str(model)] if model else []
        code = main([*command, *flags])
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        assert not out.exists()
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        return lines[0]

    return run


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """The folder of a model of the family in `tests/toy.py`, which is registered meanwhile. Its programs
    compile quickly.
    """
    with pytest.MonkeyPatch.context() as patch:
        toy.register(patch.setitem)
        yield toy.write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy_generator(toy_folder):
    return DiffGenerator.from_pretrained(toy_folder, compilation_cache=False)


@pytest.fixture(scope="session")
def flux1_folder(tmp_path_factory):
    return tiny.write_flux1(tmp_path_factory.mktemp("flux1") / "dev")


@pytest.fixture(scope="session")
def schnell_folder(tmp_path_factory):
    return tiny.write_flux1(tmp_path_factory.mktemp("flux1") / "schnell", schnell=True)


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    return tiny.write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def qwen_image_folder(tmp_path_factory):
    return tiny.write_qwen_image(tmp_path_factory.mktemp("qwen_image"))


@pytest.fixture(scope="session")
def z_image_folder(tmp_path_factory):
    return tiny.write_z_image(tmp_path_factory.mktemp("z_image") / "base")


@pytest.fixture(scope="session")
def z_image_turbo_folder(tmp_path_factory):
    return tiny.write_z_image(tmp_path_factory.mktemp("z_image") / "turbo", turbo=True)


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory):
    return tiny.write_flux2(tmp_path_factory.mktemp("flux2") / "klein")


@pytest.fixture(scope="session")
def klein_base_folder(tmp_path_factory):
    return tiny.write_flux2(tmp_path_factory.mktemp("flux2") / "klein-base", distilled=False)


@pytest.fixture(scope="session")
def flux2_dev_folder(tmp_path_factory):
    return tiny.write_flux2(tmp_path_factory.mktemp("flux2") / "dev", klein=False)
