"""Measures how far 8-bit weights move the demo's velocities and pictures from those of whole weights.

    python bench/quantized.py    # three minutes on two cores

Velocities are those of one forward on noise at each of some σ, and their distance is relative in the 2-norm.
Pictures have the same prompts, seeds and steps, and their distance is PSNR in dB. Beside it stands the PSNR
of the same pictures with whole weights in one step less, which is a harmless change.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxspd import DiffGenerator
from jaxspd.convert.orbax_store import load_transformer
from jaxspd.models.quantized import DTYPES
from jaxspd.runtime.layerwise import Layerwise

PROMPTS = (
    "a serene mountain lake at golden hour with snow",
    "a green valley at noon with a river",
    "a desert at night under a full moon",
    "a calm sea at sunset with clouds",
)
REQUEST = {"prompt": list(PROMPTS), "num_inference_steps": 20}
SIGMAS = (0.95, 0.7, 0.4, 0.1)


def psnr(one: list[np.ndarray], other: list[np.ndarray]) -> list[float]:
    """The peak signal-to-noise ratio of each picture in `one` to that in `other`, in dB."""
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(one, other, strict=True)]
    return [10 * np.log10(255**2 / error) for error in errors]


def velocities(family, inputs: list[tuple]) -> list[np.ndarray]:
    """The denoiser's velocity for each of `inputs`: latents, σ and conditioning."""
    abstract = family.abstract_parameters(jnp.float32)
    parameters = load_transformer(family.folder, abstract, family.rules)
    program = Layerwise(family.velocity_function(jnp.float32), abstract, *inputs[0])
    return [np.asarray(program(parameters, *one)) for one in inputs]


def drawn(family) -> list[tuple]:
    """Latents, σ and conditioning at each of `SIGMAS`. Latents and conditioning are N(0, 1)."""
    rng, grid = np.random.default_rng(0), [side // family.pixels_per_latent for side in family.default_size]
    conditioning = {
        name: rng.standard_normal(a.shape).astype(a.dtype)
        for name, a in family.abstract_conditioning(1).items()
    }
    latents = rng.standard_normal((1, *family.leading(1), *grid)).astype(np.float32)
    return [(latents, np.float32(sigma), conditioning) for sigma in SIGMAS]


def main() -> None:
    def pictures(kind: str | None, steps: int) -> list[np.ndarray]:
        generator = DiffGenerator.from_pretrained(quantize=kind)
        asked = REQUEST | {"num_inference_steps": steps}
        return generator.generate(asked, save_output=False, show_progress=False).frames

    def distances(found: list[np.ndarray]) -> str:
        values = psnr([frames[0] for frames in found], [frames[0] for frames in exact])
        return f"{np.mean(values):.1f} dB ({min(values):.1f} to {max(values):.1f})"

    family, steps = DiffGenerator.from_pretrained().family, REQUEST["num_inference_steps"]
    inputs = drawn(family)
    answers, exact = velocities(family, inputs), pictures(None, steps)
    print(f"jax {jax.__version__}; a step less: {distances(pictures(None, steps - 1))}")
    for kind in DTYPES:
        found = velocities(replace(family, quantize=kind), inputs)
        errors = [
            f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2%} at σ {sigma:g}"
            for a, b, sigma in zip(found, answers, SIGMAS, strict=True)
        ]
        print(f"{kind}: velocities {', '.join(errors)}; pictures {distances(pictures(kind, steps))}")


if __name__ == "__main__":
    main()
