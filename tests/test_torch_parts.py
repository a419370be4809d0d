"""PyTorch's share of the device: what does not fit there runs on the CPU."""

import weakref

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
