"""Small random checkpoints in the official layout for tests. They have the real structure but no trained
weights.

Their widths differ wherever the official ones do, so that no two axes can be confused. No parameter keeps the
zeros or ones with which diffusers initialises it.
"""

from tests.tiny.common import (
    CLIP_LENGTH,
    assert_randomised,
    change_json,
    clip_tokenizer,
    qwen_tokenizer,
    randomise,
    t5_tokenizer,
)
from tests.tiny.flux1 import flux1_scheduler, flux1_transformer, flux1_vae, write_flux1
from tests.tiny.flux2 import flux2_scheduler, flux2_transformer, flux2_vae, write_flux2
from tests.tiny.qwen_image import (
    qwen_image_scheduler,
    qwen_image_transformer,
    qwen_image_vae,
    write_qwen_image,
)
from tests.tiny.wan import wan_scheduler, wan_transformer, wan_vae, write_wan
from tests.tiny.z_image import write_z_image, z_image_scheduler, z_image_transformer

__all__ = [
    "CLIP_LENGTH",
    "assert_randomised",
    "change_json",
    "clip_tokenizer",
    "flux1_scheduler",
    "flux1_transformer",
    "flux1_vae",
    "flux2_scheduler",
    "flux2_transformer",
    "flux2_vae",
    "qwen_image_scheduler",
    "qwen_image_transformer",
    "qwen_image_vae",
    "qwen_tokenizer",
    "randomise",
    "t5_tokenizer",
    "wan_scheduler",
    "wan_transformer",
    "wan_vae",
    "write_flux1",
    "write_flux2",
    "write_qwen_image",
    "write_wan",
    "write_z_image",
    "z_image_scheduler",
    "z_image_transformer",
]
