"""Every family's pixels to normalised latents, judged by diffusers' own pipelines."""

from types import SimpleNamespace

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from jaxspd.components.pipeline import Components
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.models.vae import Coder
from tests.compare import relative


def picture(vae, image):
    """As FLUX.1's pipeline that edits pictures encodes them; Z-Image's VAE is the same."""
    return diffusers.FluxKontextPipeline._encode_vae_image(SimpleNamespace(vae=vae), image, None)


def flux2(vae, image):
    pipeline = SimpleNamespace(vae=vae, _patchify_latents=diffusers.Flux2Pipeline._patchify_latents)
    return diffusers.Flux2Pipeline._encode_vae_image(pipeline, image, None)


def qwen_image(vae, image):
    pipeline = SimpleNamespace(vae=vae, latent_channels=vae.config.z_dim)
    return diffusers.QwenImageEditPipeline._encode_vae_image(pipeline, image[:, :, None], None)[:, :, 0]


def wan(vae, video):
    """What the pipeline that starts from a video adds noise to."""
    pipeline = SimpleNamespace(
        vae=vae,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        scheduler=SimpleNamespace(add_noise=lambda latents, noise, time: latents),
    )
    return diffusers.WanVideoToVideoPipeline.prepare_latents(
        pipeline, video, len(video), vae.config.z_dim, *video.shape[-2:], torch.float32, "cpu", timestep=0
    )


FAMILIES = [
    ("flux1_folder", diffusers.AutoencoderKL, picture, 1),
    ("schnell_folder", diffusers.AutoencoderKL, picture, 1),
    ("z_image_folder", diffusers.AutoencoderKL, picture, 1),
    ("klein_folder", diffusers.AutoencoderKLFlux2, flux2, 1),
    ("qwen_image_folder", diffusers.AutoencoderKLQwenImage, qwen_image, 1),
    ("wan_folder", diffusers.AutoencoderKLWan, wan, 1),
    ("wan_folder", diffusers.AutoencoderKLWan, wan, 9),
]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@pytest.fixture(params=FAMILIES, ids=lambda row: f"{row[0]}-{row[3]}")
def case(request):
    folder, vae_class, judge, frames = request.param
    return open_family(request.getfixturevalue(folder)), vae_class, judge, frames


def test_latents_are_those_of_diffusers(case):
    family, vae_class, judge, frames = case
    given = pixels(2, frames, 32, 64)
    components = Components(family, jnp.float32)
    ours, again = components.encode(given), components.encode(given)
    scale = family.pixels_per_latent
    assert ours.shape == (2, *family.leading(frames), 32 // scale, 64 // scale)
    assert ours.dtype == np.float32
    assert (ours == again).all()
    vae = vae_class.from_pretrained(family.folder / "vae").eval()
    # The official preprocessing, too.
    processor = diffusers.image_processor.VaeImageProcessor()
    flat = [Image.fromarray(image) for image in given.reshape(-1, 32, 64, 3)]
    images = processor.preprocess(flat).unflatten(0, (2, frames))
    images = images.movedim(2, 1) if judge is wan else images[:, 0]
    with torch.no_grad():
        theirs = judge(vae, images)
    assert relative(ours, theirs) <= 1e-5


def test_encoding_undoes_decoding(case, monkeypatch):
    """With a VAE that does nothing between the two, latents come back."""
    family, _, _, frames = case
    components = Components(family, jnp.float32)
    latents = np.random.default_rng(1).standard_normal((2, *family.leading(frames), 4, 8), np.float32)
    raw = []
    # What the VAE would be given when it decodes is what it gives when it encodes.
    monkeypatch.setattr(Coder, "decode", lambda self, given: raw.append(given) or np.zeros((2, 1, 1, 3)))
    components.decode(latents)
    [given] = raw
    monkeypatch.setattr(Coder, "encode", lambda self, pixels, splits: given)
    back = components.encode(pixels(2, frames, 32, 64))
    assert relative(given.ravel(), latents.ravel()) > 0.05
    assert relative(back, latents) <= 1e-6


def test_too_large_a_picture_is_a_usage_error(flux1_folder):
    components = Components(open_family(flux1_folder), jnp.float32)
    coder = components.autoencoder._coder
    coder.budget = coder._compile("encode", (1, 128, 64, 3), (1, 1)).bytes - 1
    with pytest.raises(UsageError, match="64×128 pixels needs more memory"):
        components.encode(pixels(1, 1, 128, 64))
