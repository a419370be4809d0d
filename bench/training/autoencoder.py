"""Trains the demo's autoencoder: FLUX.1's latent layout (16 channels, 8× down), a small size.

    cd bench && python -m training.autoencoder --state DIR --steps 4500
    cd bench && python -m training.autoencoder --state DIR --steps 10000 --adversarial
    cd bench && python -m training.autoencoder --state DIR --steps 15000 --adversarial --decoder-only

Training goes on from the state in DIR to step `--steps`. With `--adversarial`, a small patch discriminator is
trained too. It sees faults that pixel losses miss, such as ragged edges and blocks. With `--decoder-only`,
latents keep their meaning, so the transformer can be trained at the same time.

The decoder learns to reconstruct pictures, and to turn low-passed latents into small pictures.
Progressive-resolution sampling decodes and grows such latents. This second task also makes the latents'
spectrum fall off with frequency like that of the pictures.
"""

import argparse
import copy
import itertools
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from training import landscapes

# Sides of the crops in pixels and crops per batch, used in turn. Small crops are cheap. Full pictures give
# the group norms the statistics that the model will be used with.
CROPS = ((64, 16), (128, 4), (128, 4), (256, 1))
# Weight of the small pictures. A larger weight makes them better and the full pictures worse.
SMALL_WEIGHT = 0.15
# Weight of the texture term. The pixel loss alone prefers the mean of all possible grass, which looks like
# felt.
TEXTURE_WEIGHT = 0.08
KL_WEIGHT = 5e-5
# Weight of squares beside absolute values. Absolute values alone prefer the median, which replaces rare
# flowers by grass.
SQUARE_WEIGHT = 8.0
# Weight of the differences of neighbours by their place modulo 8, which show the decoder's blocks.
BLOCK_WEIGHT = 0.1
BLOCK = 8
# The discriminator's gradient at the decoder's last layer, as a share of the other losses' gradient (as in
# VQGAN, arXiv 2012.09841, section 3.1), and the weight of matching its features.
ADVERSARIAL_SHARE = 0.3
FEATURE_WEIGHT = 0.02
ADVERSARY_RATE = 1e-3
WINDOW = 32
# Power of rounding to 8 bits within a window. Nothing below it is visible.
TEXTURE_FLOOR = 3e-3
# Luminance, and two differences of colours, to which the eye is less sensitive.
OPPONENT = torch.tensor([[0.2126, 0.7152, 0.0722], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]])
OPPONENT_WEIGHTS = torch.tensor([1.0, 0.4, 0.4])
FRESH = 2_000_000  # first seed of pictures that are not used in training


def half_precision() -> torch.autocast:
    """Computes in bfloat16 if the CPU supports it. Emulating it would take eighty times as long."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())


def build(channels=(32, 64, 96, 128), layers=1, groups=8) -> AutoencoderKL:
    """An untrained AutoencoderKL without the parts that FLUX.1's lacks."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=16,
        norm_num_groups=groups,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _picture(seed: int) -> np.ndarray:
    return landscapes.sample(seed)[0]


def draw_pictures(path: Path, count: int, first_seed: int, workers: int = 2) -> np.ndarray:
    """Draws uint8 [count, 256, 256, 3] into the file `path` unless it exists; returns it as a memory map."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        array = np.lib.format.open_memmap(part, "w+", np.uint8, (count, 256, 256, 3))
        with multiprocessing.Pool(workers) as pool:
            seeds = range(first_seed, first_seed + count)
            for i, picture in enumerate(pool.imap(_picture, seeds, chunksize=16)):
                array[i] = picture
        array.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    x = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    return x.contiguous().float() / 127.5 - 1


def to_pictures(x: torch.Tensor) -> np.ndarray:
    """float [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def _dct_matrix(n: int) -> torch.Tensor:
    """Orthonormal DCT-II as a matrix [frequency, position]."""
    k, x = torch.arange(n)[:, None], torch.arange(n)[None]
    matrix = torch.cos(math.pi * k * (2 * x + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def halve(latents: torch.Tensor) -> torch.Tensor:
    """Low-passes latents [N, C, H, W] to half the side by truncating the DCT. Constants are kept."""
    for dim in (-2, -1):
        n = latents.shape[dim]
        # Keeping the mean takes a division by 2; each of the two sides divides by sqrt(2).
        matrix = _dct_matrix(n // 2).T @ _dct_matrix(n)[: n // 2] / math.sqrt(2)
        latents = torch.einsum("...n,mn->...m", latents.movedim(dim, -1), matrix).movedim(-1, dim)
    return latents


def pixel_loss(output, target, scales):
    """L1 and squared error of the values, plus L1 of the differences of neighbours at `scales` scales."""
    loss = F.l1_loss(output, target) + SQUARE_WEIGHT * F.mse_loss(output, target)
    error = output - target
    for scale in range(scales):
        dx = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
        dy = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        loss = loss + 0.3 * (dx + dy)
        if scale + 1 < scales:
            error = F.avg_pool2d(error, 2)
    return loss


def _rings() -> torch.Tensor:
    """The ring of frequencies to which each coefficient of a window's FFT belongs, as a matrix that averages
    each ring.
    """
    fy = torch.fft.fftfreq(WINDOW)[:, None] * WINDOW
    fx = torch.fft.rfftfreq(WINDOW)[None] * WINDOW
    ring = torch.hypot(fy, fx).round().long().flatten()
    matrix = F.one_hot(ring.clamp(max=WINDOW // 2)).float()
    # The first two rings hold the mean, which the window spreads. They tell nothing about texture.
    matrix = matrix[:, 2:]
    return matrix / matrix.sum(0)


_RINGS = _rings()
_HANN = torch.hann_window(WINDOW)[:, None] * torch.hann_window(WINDOW)


def ring_powers(x: torch.Tensor, offset: tuple[int, int]) -> torch.Tensor:
    """The log power [windows, 3, rings] of opponent colours of pictures [N, 3, H, W] in overlapping windows.

    The windows overlap by half and start at `offset`. Fixed blocks would not see their own borders, where the
    decoder would learn to hide errors.
    """
    x = torch.einsum("oc,nchw->nohw", OPPONENT, x[:, :, offset[0] :, offset[1] :])
    windows = x.unfold(2, WINDOW, WINDOW // 2).unfold(3, WINDOW, WINDOW // 2)
    power = torch.fft.rfft2(windows * _HANN).abs().square().flatten(-2) @ _RINGS
    return torch.log(power + TEXTURE_FLOOR).permute(0, 2, 3, 1, 4).flatten(0, 2)


def texture_loss(output, target, rng) -> torch.Tensor:
    """The mean absolute difference of log power over windows, rings of frequency and colours."""
    room = min(WINDOW // 2, output.shape[-1] - WINDOW + 1)
    offset = tuple(rng.integers(room, size=2))
    difference = (ring_powers(output, offset) - ring_powers(target, offset)).abs().mean((0, 2))
    return (difference * OPPONENT_WEIGHTS).sum()


def block_loss(output, target) -> torch.Tensor:
    """The mean log ratio of the differences of neighbours, by their place modulo 8 in a picture. The part
    that all places share is subtracted, since it belongs to texture.
    """

    def differences(x, axis):
        change = x.mean(1).diff(dim=axis).abs().mean(3 - axis)  # of grey: [N, side - 1]
        whole = change.shape[1] // BLOCK * BLOCK
        return torch.log(change[:, :whole].unflatten(1, (-1, BLOCK)).mean(1) + 1e-3)

    loss = output.new_zeros(())
    for axis in (1, 2):
        ratio = differences(output, axis) - differences(target, axis)
        loss = loss + (ratio - ratio.mean(1, keepdim=True)).abs().mean()
    return loss


class Discriminator(torch.nn.Module):
    """Tells patches of drawings from decoded patches; returns its verdicts and its layers' features."""

    def __init__(self, widths=(32, 64, 96)):
        super().__init__()
        norm = torch.nn.utils.parametrizations.spectral_norm
        sizes = [3, *widths]
        self.layers = torch.nn.ModuleList(
            norm(torch.nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in itertools.pairwise(sizes)
        )
        self.verdict = norm(torch.nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x):
        seen = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            seen.append(x.float())
        return self.verdict(x).float(), seen


def _crops(pictures, side, batch, rng):
    out = np.empty((batch, side, side, 3), np.uint8)
    room = pictures.shape[1] - side + 1
    for i in range(batch):
        y, x = rng.integers(room, size=2)
        out[i] = pictures[rng.integers(len(pictures)), y : y + side, x : x + side]
        if rng.random() < 0.5:
            out[i] = out[i, :, ::-1]
    return to_tensor(out)


class Training:
    """Weights, their moving average, the discriminator and the optimisers, kept in one file."""

    KEPT = ("vae", "average", "optimiser", "discriminator", "adversary")

    def __init__(self, state: Path):
        torch.manual_seed(0)
        self.file = state / "autoencoder.pt"
        self.vae = build()
        self.average = copy.deepcopy(self.vae).requires_grad_(False)
        self.optimiser = torch.optim.Adam(self.vae.parameters(), lr=0.0, betas=(0.9, 0.98))
        self.discriminator = Discriminator()
        self.adversary = torch.optim.Adam(
            self.discriminator.parameters(), lr=ADVERSARY_RATE, betas=(0.5, 0.9)
        )
        self.step, self.frozen_at = 0, None
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            for name in self.KEPT:
                if name in saved:
                    getattr(self, name).load_state_dict(saved[name])
            self.step, self.frozen_at = saved["step"], saved["frozen_at"]
            for group in self.adversary.param_groups:
                group["lr"] = ADVERSARY_RATE

    def save(self) -> None:
        values = {name: getattr(self, name).state_dict() for name in self.KEPT}
        part = self.file.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**values, "step": self.step, "frozen_at": self.frozen_at}, part)
        os.replace(part, self.file)

    def freeze_encoder(self) -> None:
        """Fixes the encoder at the average of its weights so far."""
        if self.frozen_at is None:
            self.frozen_at = self.step
            self.vae.encoder.load_state_dict(self.average.encoder.state_dict())
        self.vae.encoder.requires_grad_(False)

    def run(self, pictures, steps: int, cooldown: int, peak_rate: float, adversarial: bool) -> None:
        """Trains to step `steps`. Over the last `cooldown` steps the learning rate falls to 0."""
        recent, begin = [], time.time()
        while self.step < steps:
            # Random numbers depend on the step alone, so a resumed run equals an uninterrupted one.
            rng = np.random.default_rng([0, self.step])
            torch.manual_seed(self.step)
            rate = peak_rate * min(1, (self.step + 1) / 100, (steps - self.step) / max(cooldown, 1))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            side, batch = CROPS[self.step % len(CROPS)]
            recent.append(self._step(_crops(pictures, side, batch, rng), rng, adversarial))
            if self.step % 100 == 0:
                means = {name: np.mean([r[name] for r in recent]) for name in recent[0]}
                shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
                print(f"step {self.step} {shown} {(time.time() - begin) / len(recent):.2f} s", flush=True)
                recent, begin = [], time.time()
                self.save()
        self.save()

    def _step(self, x, rng, adversarial: bool) -> dict[str, float]:
        # On a CPU that supports bfloat16, its convolutions take 0.6 of float32's time.
        with half_precision():
            with torch.set_grad_enabled(self.frozen_at is None):
                posterior = DiagonalGaussianDistribution(self.vae.encoder(x).float())
                latents = posterior.sample()
            output = self.vae.decode(latents).sample.float()
            small = None
            if self.step % 3 == 0 and x.shape[-1] > WINDOW * 2:
                small = self.vae.decode(halve(posterior.mean)).sample.float()
        terms = {
            "pixels": pixel_loss(output, x, 3),
            "texture": texture_loss(output, x, rng),
            "blocks": block_loss(output, x),
            "kl": (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2,
        }
        total = (
            terms["pixels"]
            + TEXTURE_WEIGHT * terms["texture"]
            + BLOCK_WEIGHT * terms["blocks"]
            + KL_WEIGHT * terms["kl"]
        )
        if small is not None:
            target = F.avg_pool2d(x, 2)
            total = total + SMALL_WEIGHT * (
                pixel_loss(small, target, 2) + TEXTURE_WEIGHT * texture_loss(small, target, rng)
            )
        if adversarial:
            with half_precision():
                verdict, seen = self.discriminator(output)
                with torch.no_grad():
                    _, wanted = self.discriminator(x)
            features = sum(F.l1_loss(a, b) / b.abs().mean() for a, b in zip(seen, wanted, strict=True))
            terms["features"] = features
            total = total + FEATURE_WEIGHT * features / len(seen)
            last = self.vae.decoder.conv_out.weight
            fooled = -verdict.mean()
            (ours,) = torch.autograd.grad(total, last, retain_graph=True)
            (theirs,) = torch.autograd.grad(fooled, last, retain_graph=True)
            weight = (ADVERSARIAL_SHARE * ours.norm() / (theirs.norm() + 1e-6)).clamp(max=1.0)
            total = total + weight.detach() * fooled
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.vae.parameters() if p.requires_grad], 1.0)
        self.optimiser.step()
        if adversarial:
            with half_precision():
                true, false = self.discriminator(x)[0], self.discriminator(output.detach())[0]
            hinge = F.relu(1 - true).mean() + F.relu(1 + false).mean()
            terms["hinge"] = hinge
            self.adversary.zero_grad(set_to_none=True)
            hinge.backward()
            self.adversary.step()
        self.step += 1
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.vae.parameters()), 1 - decay)
        return {name: term.item() for name, term in terms.items()}


@torch.no_grad()
def encode(vae, pictures, batch=8) -> torch.Tensor:
    """The posterior's means float32 [N, 16, 32, 32], not normalised, of pictures uint8 [N, 256, 256, 3]."""
    parts = range(0, len(pictures), batch)
    return torch.cat([vae.encode(to_tensor(pictures[i : i + batch])).latent_dist.mean for i in parts])


@torch.no_grad()
def decode(vae, latents, batch=8) -> np.ndarray:
    """Pictures uint8 [N, 8 H, 8 W, 3] of latents [N, 16, H, W] that are not normalised."""
    parts = range(0, len(latents), batch)
    return np.concatenate([to_pictures(vae.decode(latents[i : i + batch]).sample) for i in parts])


def export(vae: AutoencoderKL, pictures: np.ndarray, out: Path) -> AutoencoderKL:
    """Writes `vae` in float16 to `out` and returns the model that the folder holds. Its scale and shift give
    the latents of `pictures` mean 0 and variance 1.
    """
    latents = encode(vae, pictures)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )
    copy.deepcopy(vae).half().save_pretrained(out)
    return AutoencoderKL.from_pretrained(out, torch_dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--steps", type=int, required=True, help="step to train to, from the first on")
    parser.add_argument("--count", type=int, default=5000, help="pictures to train on")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument(
        "--cooldown", type=int, default=1000, help="last steps, over which the rate falls to 0"
    )
    parser.add_argument("--adversarial", action="store_true", help="train against a patch discriminator")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder fixed from now on")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pictures = draw_pictures(args.state / "pictures.npy", args.count, first_seed=1_000_000)
    training = Training(args.state)
    if args.decoder_only:
        training.freeze_encoder()
    training.run(pictures, args.steps, args.cooldown, args.rate, args.adversarial)
    export(training.average.eval(), np.asarray(pictures[:300]), args.state / "vae")


if __name__ == "__main__":
    main()
