"""PyTorch's share of the device: what does not fit there runs on the CPU."""

import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5EncoderModel

from jaxspd.families import torch_parts


@pytest.mark.parametrize("fits", [True, False])
def test_a_module_that_does_not_fit_on_the_gpu_runs_on_the_cpu(flux1_folder, monkeypatch, caplog, fits):
    asked = []

    def move(module, device):
        asked.append(device)
        if device == "cuda" and not fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return module

    monkeypatch.setattr(torch_parts, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(AutoencoderKL, "to", move)
    with torch_parts.torch_module(AutoencoderKL, flux1_folder / "vae") as vae:
        assert not vae.training
        assert asked == (["cuda"] if fits else ["cuda", "cpu"])
    assert ("vae does not fit" in caplog.text) == (not fits)


@pytest.mark.parametrize(("module", "part"), [(AutoencoderKL, "vae"), (T5EncoderModel, "text_encoder_2")])
def test_a_module_leaves_no_weights_behind(flux1_folder, module, part):
    with torch_parts.torch_module(module, flux1_folder / part) as held:
        weights = [weakref.ref(tensor) for tensor in held.state_dict(keep_vars=True).values()]
        assert weights
    assert not any(weight() is not None for weight in weights)


def test_what_the_gpu_has_no_room_to_decode_is_decoded_on_the_cpu(flux1_folder, monkeypatch, caplog):
    monkeypatch.setattr(torch_parts.log, "propagate", True)
    latents = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    with torch_parts.torch_module(AutoencoderKL, flux1_folder / "vae", torch.float32) as vae:
        wanted = torch_parts.decode(vae, latents)
        decode, failures = vae.decode, []

        def short(one):
            # Of a GPU that is nearly full: the first picture fits, the second no longer.
            if not failures and torch.equal(one[0], torch.from_numpy(latents[1])):
                failures.append(one)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(one)

        monkeypatch.setattr(vae, "decode", short)
        np.testing.assert_array_equal(torch_parts.decode(vae, latents), wanted)
    assert len(failures) == 1
    assert "it runs on the CPU" in caplog.text
