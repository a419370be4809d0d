"""What stays in memory between calls: encoders and VAE where there is room, on the device or the host."""

import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, T5EncoderModel

from jaxspd import DiffGenerator
from jaxspd.families import residency, torch_parts, wan
from jaxspd.families.residency import Residency

GIB = 2**30
FAMILIES = ["flux1", "flux2_dev", "klein", "wan", "z_image", "qwen_image"]


@pytest.fixture
def host(monkeypatch):
    """A function that says how many GiB of the host's 64 are free; all of them at first."""

    def free(gib):
        monkeypatch.setattr(residency, "host_memory", lambda: (gib * GIB, 64 * GIB))

    free(64)
    return free


def make(model, prompt="a lake"):
    request = {"prompt": prompt, "height": 64, "width": 64, "num_inference_steps": 2, "num_frames": 1}
    return model.generate(request, save_output=False, show_progress=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_call_reads_nothing(name, request, tmp_path, host):
    """The folder is gone by then."""
    whole = request.getfixturevalue(f"{name}_folder")
    fresh = make(DiffGenerator.from_pretrained(whole, compilation_cache=False), "a wide meadow")
    folder = shutil.copytree(whole, tmp_path / "model")
    model = DiffGenerator.from_pretrained(folder, compilation_cache=False)
    first = make(model)
    assert first.resident == {part: "host" for part in sorted({"transformer", *model.family.weights})}
    shutil.rmtree(folder)
    second = make(model, "a wide meadow")
    assert second.resident == first.resident == second.report()["resident"]
    np.testing.assert_array_equal(second.frames[0], fresh.frames[0])


def test_what_has_no_room_is_read_again(flux1_folder, monkeypatch, host):
    read = []
    for module in (AutoencoderKL, CLIPTextModel, T5EncoderModel):
        inner = module.from_pretrained
        monkeypatch.setattr(
            module,
            "from_pretrained",
            # Configurations are checked without weights, on the device "meta".
            lambda folder, inner=inner, **options: (
                (None if "device_map" in options else read.append(folder.name)) or inner(folder, **options)
            ),
        )
    model = DiffGenerator.from_pretrained(flux1_folder, compilation_cache=False)
    host(15)  # a quarter stays free
    for _ in range(2):
        assert make(model).resident == {"transformer": "host"}
    parts = ["text_encoder", "text_encoder_2", "vae"]
    assert read == parts + parts
    host(17)
    make(model)
    assert read == 3 * parts
    assert set(make(model).resident) == {*parts, "transformer"}
    assert read == 3 * parts


def test_a_vae_that_stays_forgets_its_tiles(wan_folder, monkeypatch, host):
    model = DiffGenerator.from_pretrained(wan_folder, compilation_cache=False)
    large, tiled = 64 * 64 - 1, []
    inner = torch_parts.decode_here
    monkeypatch.setattr(
        torch_parts, "decode_here", lambda vae, latents: tiled.append(vae.use_tiling) or inner(vae, latents)
    )
    for limit in (large, 64 * 64, large):
        monkeypatch.setattr(wan, "UNTILED", limit)
        make(model)
    assert tiled == [True, False, True]


# The policy


class Module:
    """Of so many GiB on a device, as far as the policy looks at it."""

    def __init__(self, gib, device="cuda"):
        self.tensor, self.device = type("Tensor", (), {"nbytes": gib * GIB}), torch.device(device)

    def parameters(self):
        return [self.tensor]

    def buffers(self):
        return []

    def to(self, place):
        self.device = torch.device(place)
        return self


def key(name):
    return (Module, Path("model") / name, "auto")


def test_the_device_keeps_what_its_share_holds_and_the_host_the_rest(monkeypatch, host):
    monkeypatch.setattr(residency, "device_room", lambda: 10 * GIB)
    held = Residency()
    assert held.keep(key("text_encoder"), Module(8))
    assert held.keep(key("text_encoder_2"), Module(3))
    assert held.keep(key("vae"), Module(2))
    assert held.places() == {"text_encoder": "device", "text_encoder_2": "host", "vae": "device"}
    host(20)
    assert held.keep(key("another"), Module(4))
    assert not held.keep(key("one too many"), Module(5))
    assert held.take(key("another")).device.type == "cpu"
    assert held.take(key("another")) is None
    # What the GPU must give up goes to the host while that has room.
    held.leave_device()
    assert held.places() == {"text_encoder_2": "host", "vae": "host"}


def test_weights_that_are_still_read_have_their_place(host):
    held = Residency()
    host(40)
    held.to_come = 25 * GIB
    assert not held.keep(key("vae"), Module(1, "cpu"))
    held.to_come = 24 * GIB
    assert held.keep(key("vae"), Module(1, "cpu"))


def test_jax_may_take_all_that_it_is_allowed(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 60 * GIB}

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(residency.jax, "devices", lambda: [Device()])
    assert residency.device_room() == 10 * GIB


def test_what_is_kept_makes_room_for_what_is_needed(flux1_folder, monkeypatch, host):
    """A module that does not fit on the GPU is tried again without those that only wait there."""
    held, tries = Residency(), []
    monkeypatch.setattr(residency, "device_room", lambda: 10 * GIB)
    waiting = Module(8)
    held.keep(key("text_encoder"), waiting)

    def move(module, device):
        tries.append(device)
        if device == "cuda" and waiting.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return module

    monkeypatch.setattr(torch_parts, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(AutoencoderKL, "to", move)
    with held, torch_parts.torch_module(AutoencoderKL, flux1_folder / "vae"):
        assert tries == ["cuda", "cpu", "cuda"]
        assert waiting.device.type == "cpu"


def test_a_module_that_failed_is_not_kept(flux1_folder, host):
    held = Residency()
    module = torch_parts.torch_module(AutoencoderKL, flux1_folder / "vae")
    with pytest.raises(KeyboardInterrupt), held, module:
        raise KeyboardInterrupt
    assert held.places() == {}


def test_kept_weights_go_with_their_generator(flux1_folder, host):
    held = Residency()
    with held, torch_parts.torch_module(T5EncoderModel, flux1_folder / "text_encoder_2") as t5:
        weights = [weakref.ref(tensor) for tensor in t5.state_dict(keep_vars=True).values()]
    assert all(weight() is not None for weight in weights)
    del held, t5
    assert not any(weight() is not None for weight in weights)
