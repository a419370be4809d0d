"""Trains the demo's transformer, which has FLUX.1's architecture, with diffusers' class.

    cd bench && python -m training.transformer --state DIR --steps 20000 --cooldown 4000

This goes on from the state in DIR to step 20,000. The learning rate falls to zero over the last 4,000 steps.
The average of the weights is written to DIR/transformer now and then. `training.latents` makes the data; new
shards are used as soon as they appear. Without a state, training goes on from the shipped demo, an earlier
run's average.

Each step sees latents at full, half or quarter resolution. The coarser ones are the low DCT frequencies at
unchanged amplitude. The staged sampler gives the transformer exactly such latents before it grows the grid
(arXiv 2605.18736).
"""

import argparse
import copy
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from jaxspd.hub import DEMO
from jaxspd.models.packing import pack
from training import landscapes
from training.autoencoder import half_precision, halve
from training.latents import shard_seeds

CONFIG = {
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 7,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 14, 14),
}
# For each grid: how often it is halved, samples per step (all steps cost about the same), the exponential
# shift of σ, and the share of steps, first and last. Sampling uses coarse grids only at high noise, so
# training uses mostly high noise there. They teach composition cheaply, so their steps come first.
GRIDS = ((0, 24, 0.7, (0.3, 0.7)), (1, 72, 1.6, (0.6, 0.25)), (2, 96, 2.3, (0.1, 0.05)))
TURN_STEPS = 2800  # over these the shares change from first to last
EMPTY_PROMPT_SHARE = 0.05
WARM_STEPS = 200
BEGINNING, BEGUN = DEMO / "transformer", 2525  # and its number of training steps
# The average of the weights spans about the last tenth of all steps, as in Karras et al. (arXiv 2312.02696).
AVERAGE_POWER = 9
SAVE_STEPS = 25


def image_ids(side: int) -> torch.Tensor:
    """Position ids [side², 3] of a square grid of tokens."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()


def build() -> FluxTransformer2DModel:
    """The untrained transformer. Gates and output start at zero, as in DiT (arXiv 2212.09748)."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**CONFIG)
    for name, parameter in model.named_parameters():
        if is_modulation(name) or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return model


def is_modulation(name: str) -> bool:
    return name.endswith(("norm1.linear.weight", "norm1_context.linear.weight", "norm.linear.weight")) or (
        name.startswith("norm_out.linear")
    )


def optimisers(model) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices except modulations, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
        (matrices if inside and parameter.ndim == 2 and not is_modulation(name) else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0),
    ]


class Data:
    """Latents in shards, and the features of their captions."""

    def __init__(self, state: Path):
        self.folder = state / "latents"
        with np.load(state / "text.npz") as text:
            self.t5, self.clip = (torch.from_numpy(text[name]) for name in ("t5", "clip"))
            self.row = {caption: row for row, caption in enumerate(text["captions"].tolist())}
        self.shards, self.captions = [], []
        self.look()

    def look(self) -> None:
        """Opens new shards; waits until there is at least one."""
        while True:
            files = [p for p in sorted(self.folder.glob("[0-9]*.npy")) if ".part" not in p.name]
            for file in files[len(self.shards) :]:
                seeds = shard_seeds(int(file.stem))
                rows = [self.row[landscapes.describe(seed)[1]] for seed in seeds]
                self.captions.append(np.repeat(rows, 2))  # a drawing and its mirror image
                self.shards.append(np.load(file, mmap_mode="r"))
            if self.shards:
                return
            time.sleep(20)

    def batch(self, count: int, rng: np.random.Generator):
        """Random latents [count, 16, 32, 32] with their T5 states and CLIP vectors, float32."""
        shards = rng.integers(len(self.shards), size=count)
        rows = rng.integers(len(self.shards[0]), size=count)
        latents = np.stack([self.shards[s][r] for s, r in zip(shards, rows, strict=True)])
        captions = np.array([self.captions[s][r] for s, r in zip(shards, rows, strict=True)])
        captions[rng.random(count) < EMPTY_PROMPT_SHARE] = 0
        text = torch.from_numpy(captions)
        return torch.from_numpy(latents).float(), self.t5[text].float(), self.clip[text].float()


class Training:
    """Weights, their moving average and the optimisers, kept in one file."""

    def __init__(self, state: Path):
        self.state, self.file = state, state / "transformer.pt"
        self.model = build()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimisers = optimisers(self.model)
        self.velocity = self.model
        # The learning rate warms up at the first steps, and again if the optimisers start without a state.
        self.step = self.first = 0
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            for optimiser, values in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(values)
            self.step, self.first = saved["step"], saved["first"]
        elif BEGINNING.exists():
            weights = load_file(BEGINNING / "diffusion_pytorch_model.safetensors")
            for model in (self.model, self.average):
                model.load_state_dict(weights)
            self.step = self.first = BEGUN

    def save(self) -> None:
        values = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "first": self.first,
        }
        part = self.file.with_suffix(".part")
        torch.save(values, part)
        os.replace(part, self.file)
        copy.deepcopy(self.average).half().save_pretrained(self.state / "transformer")

    def run(self, data: Data, steps: int, cooldown: int, peak_rate: float) -> None:
        recent: dict[int, list[float]] = {halvings: [] for halvings, *_ in GRIDS}
        begin = time.time()
        while self.step < steps:
            # Random numbers depend on the step alone, so a resumed run goes on as if never stopped.
            rng = np.random.default_rng([1, self.step])
            torch.manual_seed(self.step)
            warm = (self.step + 1 - self.first) / WARM_STEPS
            rate = peak_rate * min(1, warm, (steps - self.step) / max(cooldown, 1))
            turn = min(1, self.step / TURN_STEPS)
            shares = [first + (last - first) * turn for *_, (first, last) in GRIDS]
            halvings, count, shift, _ = GRIDS[rng.choice(len(GRIDS), p=shares)]
            recent[halvings].append(self._step(data.batch(count, rng), halvings, shift, rate))
            if self.step % SAVE_STEPS == 0:
                seconds = (time.time() - begin) / SAVE_STEPS
                losses = " ".join(f"{np.mean(v):.4f}" if v else "-" for v in recent.values())
                print(f"step {self.step} loss {losses} {len(data.shards)} shards {seconds:.2f} s", flush=True)
                recent, begin = {halvings: [] for halvings in recent}, time.time()
                self.save()
                data.look()
        self.save()

    def _step(self, batch, halvings: int, shift: float, rate: float) -> float:
        """Trains one step on the flow-matching loss, the mean of (v - (ε - x_0))²; returns the loss."""
        clean, t5, clip = batch
        for _ in range(halvings):
            clean = halve(clean)
        n, side = len(clean), clean.shape[-1] // 2
        noise = torch.randn_like(clean)
        # One σ comes from each of n equal slices, so every step sees all noise levels.
        uniform = (torch.arange(n) + torch.rand(n)) / n
        factor = float(np.exp(shift))
        sigma = factor * uniform / (1 + (factor - 1) * uniform)
        weight = sigma[:, None, None, None]
        with half_precision():
            velocity = self.velocity(
                hidden_states=pack((1 - weight) * clean + weight * noise),
                encoder_hidden_states=t5,
                pooled_projections=clip,
                timestep=sigma,
                img_ids=image_ids(side),
                txt_ids=torch.zeros(t5.shape[1], 3),
                return_dict=False,
            )[0]
        loss = (velocity.float() - pack(noise - clean)).square().mean()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        pull = min(1.0, (AVERAGE_POWER + 1) / self.step)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), pull)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--steps", type=int, required=True, help="step to train to, from the first on")
    parser.add_argument("--cooldown", type=int, default=0, help="last steps, over which the rate falls to 0")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training = Training(args.state)
    # Each grid's program takes minutes to compile, but its steps take two thirds of the time.
    training.velocity = torch.compile(training.model, dynamic=False)
    training.run(Data(args.state), args.steps, args.cooldown, args.rate)


if __name__ == "__main__":
    main()
