"""What `bench/compare.py` compares: models, sizes, and ways to grow the grid.

Weights are random, except the demo's, because speed does not depend on them. The options of transformer and
VAE are those of diffusers' classes, where they differ from the published model.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from jaxspd.families import family_class
from jaxspd.families.base import BaseFamily

FULLRES = "full resolution"
# The source of the published seconds beside the models. They are not our results.
PUBLISHED_ON = "SGLang's page on progressive resolution, one NVIDIA RTX A6000"


@dataclass(frozen=True)
class Cell:
    """One way to grow the grid. If `delta` is None, it is full resolution.

    `published` are the seconds that SGLang reports, and `published_speedup` is its speed-up, which SGLang
    sometimes rounds and sometimes truncates.
    """

    delta: float | None = None
    levels: int = 1
    published: float | None = None
    published_speedup: float | None = None

    @property
    def name(self) -> str:
        if self.delta is None:
            return FULLRES
        return f"δ {self.delta:g}" + (f", {self.levels} levels" if self.levels > 1 else "")

    @property
    def request(self) -> dict[str, Any]:
        """The request parameters of this cell."""
        if self.delta is None:
            return {"progressive_mode": "fullres"}
        return {
            "progressive_mode": "dct_rewind",
            "progressive_noise": "fresh",  # as published, and as both frameworks get it
            "progressive_delta": self.delta,
            "progressive_levels": self.levels,
        }


@dataclass(frozen=True)
class Model:
    """A model, with the request parameters that all its cells share in `request`.

    Without a `family` it is the demo that comes with the package. The others' weights are drawn at random.
    """

    name: str
    family: str | None
    request: dict[str, Any]
    cells: tuple[Cell, ...]
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    note: str = ""  # on the published seconds
    quantize: str | None = None

    def recipe(self) -> BaseFamily:
        """The model's family, with the configuration of this transformer."""
        family = family_class(self.family)()
        known = {item.name for item in fields(family.config)}
        options = {name: value for name, value in self.transformer.items() if name in known}
        return replace(family, config=replace(family.config, **options), quantize=self.quantize)


@dataclass(frozen=True)
class Preset:
    """Models and how they run.

    They run in `dtype`, with `rounds` processes of each framework and `repeats` timed runs in each process. A
    framework's first process compiles anew. `matmul` is the side of the square matrix product that shows what
    the hardware can do. Latents further than `bound` (relative, in the 2-norm) from eager PyTorch's are
    wrong.
    """

    models: tuple[Model, ...]
    dtype: str
    repeats: int
    rounds: int
    matmul: int
    bound: float


def grown(*deltas: float) -> tuple[Cell, ...]:
    """The cells of full resolution and, for each δ, of one level."""
    return (Cell(), *map(Cell, deltas))


def cells(*grown: tuple[float, float, float], fullres: float) -> tuple[Cell, ...]:
    """The cells of full resolution and, for each (δ, published seconds, published speed-up), of one level."""
    return (Cell(published=fullres), *(Cell(delta, 1, *published) for delta, *published in grown))


def size(height: int, width: int, steps: int, **others) -> dict[str, Any]:
    return {"height": height, "width": width, "num_inference_steps": steps, **others}


def blocks(*channels: int) -> dict[str, Any]:
    """The options of an AutoencoderKL with `channels` on its grids."""
    kinds = {f"{way}_block_types": (f"{name}Block2D",) * len(channels) for way, name in WAYS.items()}
    return {"block_out_channels": channels, **kinds}


WAYS = {"down": "DownEncoder", "up": "UpDecoder"}

# This has one kind of block only, because torch.compile is slow even for that.
TINY = Model(
    "tiny FLUX.1",
    "flux1",
    size(128, 192, 4, guidance_scale=3.5),
    grown(0.05),
    {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 0,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    {**blocks(4, 4, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2},
)

DEMO = Model("demo", None, size(256, 256, 50), grown(0.05, 0.20))
# Each family has few and narrow layers here, with text of the official width, and all δ that are published
# for it.
SMALL_FLUX = Model(
    "small FLUX.1",
    "flux1",
    size(512, 512, 20, guidance_scale=3.5),
    (*grown(0.01, 0.05), Cell(0.01, 2)),
    {"num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128, "num_attention_heads": 5},
    blocks(32, 64, 128, 128),
)
SMALL_FLUX2 = Model(
    "small FLUX.2",
    "flux2",
    size(512, 512, 20),
    grown(0.05, 0.10),
    {
        "num_layers": 1,
        "num_single_layers": 4,
        "num_attention_heads": 5,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    blocks(32, 64, 128, 128),
)
# Videos of 17 frames.
SMALL_WAN = Model(
    "small Wan 2.1",
    "wan",
    size(256, 416, 20, num_frames=17, guidance_scale=5.0, flow_shift=5.0),
    grown(0.01, 0.02, 0.05, 0.10),
    {"num_attention_heads": 3, "num_layers": 8, "ffn_dim": 1536},
    {"base_dim": 16},
)
# The text's own length (`WORDS` in prepare.py). PyTorch runs these families without padding, so jaxspd does
# too.
SHORT = {"max_sequence_length": 64}
# The noise levels that Z-Image's published stage splits use.
LEVELS = {"noise_levels": "scheduler"}
SMALL_Z_IMAGE = Model(
    "small Z-Image",
    "z_image",
    size(512, 512, 20, guidance_scale=4.0, **SHORT, **LEVELS),
    grown(0.01, 0.05, 0.10),
    {"dim": 640, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 5, "n_kv_heads": 5},
    blocks(32, 64, 128, 128),
)
SMALL_QWEN_IMAGE = Model(
    "small Qwen-Image",
    "qwen_image",
    size(512, 512, 20, guidance_scale=4.0, **SHORT),
    grown(0.05, 0.10, 0.20),
    {"num_layers": 4, "num_attention_heads": 5},
    {"base_dim": 8},
)

WAN_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
# Roughly the fastest and smallest first, so that most have been measured when time or disk run out.
OFFICIAL = (
    Model(
        "FLUX.2-klein-4B",
        "flux2",
        size(1024, 1024, 30),
        cells((0.05, 5.50, 1.77), (0.10, 5.03, 1.93), fullres=9.72),
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    Model(
        "FLUX.1-dev",
        "flux1",
        size(1024, 1024, 50, guidance_scale=3.5),
        (*cells((0.01, 27.67, 1.32), (0.05, 22.58, 1.62), fullres=36.65), Cell(0.01, 2, 26.48, 1.38)),
    ),
    Model(
        "Z-Image",
        "z_image",
        size(1024, 1024, 50, guidance_scale=4.0, **SHORT, **LEVELS),
        cells((0.01, 34.38, 1.53), (0.05, 26.03, 2.03), (0.10, 22.65, 2.33), fullres=52.72),
        note="At δ 0.1 the page prints 42+8 steps. Its own formula gives 39+11 there, which its seconds fit, "
        "and 42+8 at δ 0.2.",
    ),
    Model(
        "Qwen-Image",
        "qwen_image",
        size(1024, 1024, 30, guidance_scale=4.0, **SHORT),
        cells((0.05, 33.25, 1.29), (0.10, 33.86, 1.27), (0.20, 25.40, 1.69), fullres=43.00),
    ),
    Model(
        "Wan2.1-T2V-1.3B",
        "wan",
        size(480, 832, 50, num_frames=81, guidance_scale=5.0, flow_shift=5.0),
        cells(
            (0.01, 161.5, 1.65),
            (0.02, 142.7, 1.86),
            (0.05, 114.7, 2.32),
            (0.10, 95.9, 2.78),
            fullres=266.8,
        ),
        WAN_1_3B,
    ),
)
# This model has its own preset: one such video takes longer than one output of each model above.
WAN_720P = Model(
    "Wan2.1-T2V-1.3B at 720p",
    "wan",
    size(704, 1280, 50, num_frames=81, guidance_scale=5.0, flow_shift=5.0),
    cells((0.01, 519.6, 2.18), (0.05, 340.1, 3.34), fullres=1137),
    WAN_1_3B,
    note="From the pull request that brought the method to SGLang. The formula gives 29+21 and 38+12 steps, "
    "whose FLOPs allow 2.11× and 3.22×: less than what is published, which would fit one coarse step more "
    "(2.20× and 3.42×).",
)

PRESETS = {
    "ci": Preset((TINY,), "float32", repeats=2, rounds=1, matmul=512, bound=1e-3),
    "cpu": Preset(
        (DEMO, SMALL_FLUX, SMALL_FLUX2, SMALL_WAN, SMALL_Z_IMAGE, SMALL_QWEN_IMAGE),
        "float32",
        repeats=2,
        rounds=3,
        matmul=2048,
        bound=1e-3,
    ),
    # bfloat16 rounds to 1 part in 256 at each operation, and the frameworks round in different places.
    "full": Preset(OFFICIAL, "bfloat16", repeats=2, rounds=2, matmul=8192, bound=0.1),
    "720p": Preset((WAN_720P,), "bfloat16", repeats=2, rounds=2, matmul=8192, bound=0.1),
}
