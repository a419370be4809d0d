"""What stays in memory between calls: what is used again, where there is room."""

import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspd import DiffGenerator
from jaxspd.components.pipeline import Components
from jaxspd.convert.loader import StoredWeight
from jaxspd.families import open_family
from jaxspd.runtime import residency
from jaxspd.runtime.residency import Residency

GIB = 2**30
FAMILIES = ["flux1", "flux2_dev", "klein", "wan", "z_image", "qwen_image"]


@pytest.fixture
def host(monkeypatch):
    """A function that says how many GiB of the host's 64 are free; all of them at first."""

    def free(gib):
        monkeypatch.setattr(residency, "host_memory", lambda: (gib * GIB, 64 * GIB))

    free(64)
    return free


@pytest.fixture
def read(monkeypatch):
    """The folders of which weights are read, once for each time in a row."""
    folders = []

    def remember(self, *args, inner=StoredWeight.fetch):
        if folders[-1:] != [self.checkpoint.folder.name]:
            folders.append(self.checkpoint.folder.name)
        return inner(self, *args)

    monkeypatch.setattr(StoredWeight, "fetch", remember)
    return folders


def make(model, prompt="a lake"):
    request = {"prompt": prompt, "height": 64, "width": 64, "num_inference_steps": 2, "num_frames": 1}
    return model.generate(request, save_output=False, show_progress=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_third_call_reads_nothing_but_tokens(name, request, tmp_path, host, monkeypatch):
    whole = request.getfixturevalue(f"{name}_folder")
    fresh = make(DiffGenerator.from_pretrained(whole, compilation_cache=False), "a wide meadow")
    folder = shutil.copytree(whole, tmp_path / "model")
    model = DiffGenerator.from_pretrained(folder, compilation_cache=False)
    # Of what is needed once, the text encoders, nothing stays; they are all in memory when used again.
    assert make(model).resident == {"transformer": "host", "vae": "host"}
    second = make(model)
    assert second.resident == {part: "host" for part in sorted({"transformer", *model.family.weights})}
    monkeypatch.setattr(StoredWeight, "fetch", None)
    third = make(model, "a wide meadow")
    assert third.resident == second.resident == third.report()["resident"]
    np.testing.assert_array_equal(third.frames[0], fresh.frames[0])


def test_what_has_no_room_is_read_again(flux1_folder, read, host):
    model = DiffGenerator.from_pretrained(flux1_folder, compilation_cache=False)
    model._denoiser.load().result()
    read.clear()
    host(15)  # a quarter stays free
    parts = ["text_encoder", "text_encoder_2", "vae"]
    for _ in range(3):
        assert make(model).resident == {"transformer": "host"}
    assert read == 3 * parts
    host(17)
    make(model)
    assert read == 4 * parts
    assert set(make(model).resident) == {*parts, "transformer"}
    assert read == 4 * parts


@pytest.mark.parametrize(("offload", "kept"), [(True, set()), (False, {"text_encoder", "text_encoder_2"})])
def test_the_flag_overrides_the_policy(flux1_folder, host, offload, kept):
    model = DiffGenerator.from_pretrained(
        flux1_folder, compilation_cache=False, text_encoder_cpu_offload=offload
    )
    host(1)  # no room, which who asks for it knows better
    for _ in range(2):
        assert set(make(model).resident) - {"transformer"} == kept


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_layers_give_what_layers_in_memory_give(name, request, host):
    family = open_family(request.getfixturevalue(f"{name}_folder"))
    streamed, held = (Components(family, jnp.float32, offload) for offload in (True, False))
    ours, theirs = (one.encode_text(["a lake", "a wide meadow"]) for one in (streamed, held))
    assert held.residency.places()
    assert not streamed.residency.places()
    for key, values in ours.items():
        np.testing.assert_array_equal(values, theirs[key])


# The policy


class Stored:
    """A weight of so many GiB, as far as the policy looks at it."""

    def __init__(self, gib):
        self.nbytes = gib * GIB

    def fetch(self):
        return self


def test_weights_that_are_still_read_have_their_place(host):
    held = Residency()
    vae, other = held.weights("vae", [Stored(1)]), held.weights("another", [Stored(1)])
    host(40)
    held.to_come = 23 * GIB
    vae()
    assert held.places() == {"vae": "host"}
    held.to_come = 24 * GIB
    other()
    assert held.places() == {"vae": "host"}


def test_what_is_held_gives_way_to_work_that_needs_its_place(monkeypatch):
    monkeypatch.setattr(residency, "device_memory", lambda device: (60 * GIB, 80 * GIB))
    held = Residency(offload=False)
    held.weights("text_encoder", [Stored(4), Stored(6)], streamed=True)()
    held.leave(needed=70 * GIB)
    assert set(held.places()) == {"text_encoder"}
    held.leave(needed=71 * GIB)
    assert held.places() == {}


def test_a_device_that_does_not_tell_its_memory_keeps_nothing():
    class Device:
        platform = "tpu"

        def memory_stats(self):
            return None

    assert not Residency(target=SimpleNamespace(device=Device())).has_room(1)
