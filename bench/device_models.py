"""What `bench/devices.py` compiles: published models at published sizes, and their programs."""

import ast
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from presets import OFFICIAL, WAN_720P, Model, size

from jaxspd.families.base import BaseFamily
from jaxspd.models.flux2 import Flux2Config
from jaxspd.planning import grids, reading
from jaxspd.request import Request, SamplingParams
from jaxspd.resolving import resolve

ROOT = Path(__file__).resolve().parents[1]
GROWN = {"progressive_mode": "dct_rewind", "progressive_delta": 0.05}
WAN_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
WIDE = {"num_frames": 81, "guidance_scale": 5.0, "flow_shift": 5.0}
KLEIN_4B, FLUX1, *_, WAN_1_3B = OFFICIAL
# The text is as long as each model reads, unlike in the comparison with PyTorch.
MODELS = (
    FLUX1,
    KLEIN_4B,
    Model("FLUX.2-klein-9B", "flux2", size(1024, 1024, 30), (), KLEIN_9B),
    Model("FLUX.2-dev", "flux2", size(1024, 1024, 50), (), asdict(Flux2Config())),
    WAN_1_3B,
    WAN_720P,
    Model("Wan2.1-T2V-14B", "wan", size(480, 832, 50, **WIDE), (), WAN_14B),
    Model("Wan2.1-T2V-14B at 720p", "wan", size(704, 1280, 50, **WIDE), (), WAN_14B),
    Model("Z-Image", "z_image", size(1024, 1024, 50, guidance_scale=4.0), ()),
    Model("Qwen-Image", "qwen_image", size(1024, 1024, 30, guidance_scale=4.0), ()),
    Model("Qwen-Image at 1664×928", "qwen_image", size(928, 1664, 50, guidance_scale=4.0), ()),
)
# The models that a card of 24, 32 or 48 GB holds in 8 bits.
LARGE = ("FLUX.1-dev", "FLUX.2-dev", "Wan2.1-T2V-14B", "Wan2.1-T2V-14B at 720p", "Qwen-Image")
MODELS += tuple(
    replace(model, name=f"{model.name} in {kind}", quantize=kind)
    for kind in ("int8", "fp8")
    for model in MODELS
    if model.name in LARGE
)
# Several devices together, and the models whose steps are compiled for them. Weights are whole on each
# device. For large models, steps with sharded weights are compiled too.
MESHES = ("h100-2", "h100-4", "h100-8", "a6000-4", "v6e-8")
SPREAD = (
    "FLUX.1-dev",
    "FLUX.2-klein-4B",
    "FLUX.2-dev",
    "FLUX.2-dev in int8",
    "Wan2.1-T2V-1.3B",
    "Wan2.1-T2V-14B at 720p",
    "Wan2.1-T2V-14B at 720p in int8",
    "Z-Image",
    "Qwen-Image",
)
# The code that a program of each kind is made of, beside the transformer's own module.
CODE = {
    "denoise": (
        "models/attention.py",
        "models/kernels/*.py",
        "models/layers.py",
        "models/mmdit.py",
        "models/packing.py",
        "models/rotary.py",
        "models/ulysses.py",
        "runtime/layerwise.py",
        "runtime/spreading.py",
        "sampling/euler.py",
        "sampling/guidance.py",
        "sampling/unipc.py",
    ),
    "encode": (
        "components/text_encoder.py",
        "models/attention.py",
        "models/layers.py",
        "models/rotary.py",
        "models/text/*.py",
        "runtime/layerwise.py",
    ),
    "decode": ("models/kernels/xla.py", "models/vae/*.py"),
}


@dataclass(frozen=True)
class Program:
    """One program.

    `kind` is a key of `CODE`. `what` is the latents' grid, or a text encoder's folder in the pipeline.
    `forwards` is the number of forwards that a guided step runs in a row. If `sharded`, each of several
    devices has a part of the weights.
    """

    kind: str
    what: str
    forwards: int = 1
    sharded: bool = False

    @property
    def name(self) -> str:
        ways = f", {self.forwards} forwards" if self.forwards > 1 else ""
        return f"{self.kind} {self.what}{ways}" + (", weights sharded" if self.sharded else "")


@dataclass(frozen=True)
class Published:
    """A model with its programs."""

    model: Model

    @cached_property
    def request(self) -> Request:
        return resolve(self.model.recipe(), SamplingParams(**self.model.request, **GROWN))

    @cached_property
    def family(self) -> BaseFamily:
        family = self.model.recipe()
        if self.model.transformer.get("guidance_embeds") and self.model.family == "flux2":
            # This is FLUX.2 [dev]. In a folder, the pipeline's class says that it is not [klein].
            family = replace(family, klein=False)
        return reading(family, self.request)

    @property
    def guided(self) -> bool:
        return self.family.guided(self.request.guidance_scale)

    @cached_property
    def grids(self) -> dict[str, tuple[int, int]]:
        """The latents' grids by name, coarsest first."""
        return {"×".join(map(str, g.latent)): g.latent for g in grids(self.family, self.request)}

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        ways = (1, 2) if self.guided else (1,)
        steps = tuple(Program("denoise", grid, forwards) for grid in self.grids for forwards in ways)
        encoding = (Program("encode", text.part) for text in self.family.texts)
        return (*encoding, *steps, Program("decode", [*self.grids][-1]))

    @property
    def own(self) -> tuple[Program, ...]:
        """The programs that this model shares with no other. A model in 8 bits has only its own steps."""
        return tuple(p for p in self.programs if p.kind == "denoise" or not self.model.quantize)

    def on(self, card: str) -> tuple[Program, ...]:
        """The programs that are compiled for a card or a mesh."""
        if card not in MESHES:
            return self.own
        if self.model.name not in SPREAD:
            return ()
        ways = (False, True) if self.model.name in LARGE else (False,)
        return tuple(Program("denoise", grid, sharded=way) for way in ways for grid in self.grids)

    @property
    def whole(self) -> str:
        """The name of the model in whole weights, whose other programs a model in 8 bits shares."""
        return self.model.name.removesuffix(f" in {self.model.quantize}")

    def digest(self, program: Program, target: str, mesh: bool = False) -> str:
        """A digest of all that determines the program: code, configuration, compilers and card."""
        family = self.family
        parts = [target, program.name, *map(repr, asdict(self.request).items()), *versions()]
        files = [path for pattern in CODE[program.kind] for path in sorted((ROOT / "jaxspd").glob(pattern))]
        if program.kind == "denoise":
            files.append(Path(inspect.getfile(family.transformer)))
            parts += map(inspect.getsource, (type(family).velocity, type(family).abstract_conditioning))
            parts.append(repr(family.config))
            if family.quantize:
                parts.append(family.quantize)
                files.append(ROOT / "jaxspd/models/quantized.py")
        elif program.kind == "encode":
            parts += [repr(text) for text in family.texts if text.part == program.what]
        else:
            parts += [repr(family.vae), repr(family.vae_dtype)]
        if mesh:
            files += [ROOT / "jaxspd" / name for name in ("devices.py", "target.py")]
        parts += map(meaning, files)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def versions() -> Iterator[str]:
    """Yields the compilers' names with their versions."""
    for package in ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"no {package}"


def meaning(path: Path) -> str:
    """The code of a file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[:1] = [ast.Pass()]
    return ast.dump(tree)
