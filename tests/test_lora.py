"""LoRAs of every dialect, merged into the weights of small checkpoints as these are read."""

import json
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import flat_parameters
from jaxspd.convert.lora import Merged, changes, transformer
from jaxspd.convert.lora_file import LoraFile
from jaxspd.convert.orbax_store import load_transformer
from jaxspd.convert.table import official_keys
from jaxspd.families import open_family

RANK = 3


@dataclass
class Written:
    """A LoRA's file as it is made: its tensors and metadata, and what it must add to which tensor of
    diffusers', in float64.
    """

    shapes: dict[str, tuple[int, ...]]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    expected: dict[str, np.ndarray] = field(default_factory=dict)

    def drawn(self, key: str, *shape: int) -> np.ndarray:
        """A new tensor of the file, in float64."""
        self.tensors[key] = self.rng.standard_normal(shape).astype(np.float32)
        return self.tensors[key].astype(np.float64)

    def pair(self, down: str, up: str, rows: int, columns: int, rank: int = RANK) -> np.ndarray:
        return self.drawn(up, rows, rank) @ self.drawn(down, rank, columns)

    def alpha(self, key: str, value: float) -> float:
        self.tensors[key] = np.float32(value)
        return value

    def adds(self, key: str, delta: np.ndarray) -> None:
        self.expected[key] = self.expected.get(key, 0) + delta.reshape(self.shapes[key])

    def size(self, *layers: str) -> tuple[int, int]:
        """Rows and columns of the weights of `layers`, one below the other."""
        shapes = [self.shapes[f"{layer}.weight"] for layer in layers]
        return sum(shape[0] for shape in shapes), int(np.prod(shapes[0][1:]))

    def layer(self, name: str, *layers: str, style="kohya", alpha=None) -> None:
        """What changes `layers`, one below the other, under the name that they have in the file."""
        down, up = STYLES[style]
        delta = self.pair(f"{name}{down}", f"{name}{up}", *self.size(*layers))
        if alpha is not None:
            delta *= self.alpha(f"{name}.alpha", alpha) / RANK
        start = 0
        for layer in layers:
            rows = self.size(layer)[0]
            self.adds(f"{layer}.weight", delta[start : start + rows])
            start += rows


STYLES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "adapter": (".lora_A.default.weight", ".lora_B.default.weight"),
    "old": (".lora.down.weight", ".lora.up.weight"),
    "oldest": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "attention": ("_lora.down.weight", "_lora.up.weight"),
    "xlabs": (".down.weight", ".up.weight"),
}
QKV, TEXT_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def flux1_kohya(file):
    block, single = "transformer_blocks.1", "single_transformer_blocks.0"
    name = "lora_unet_double_blocks_1_img_attn"
    file.layer(f"{name}_qkv", *(f"{block}.attn.{part}" for part in QKV), alpha=2.0)
    file.layer(f"{name}_proj", f"{block}.attn.to_out.0", alpha=1.5)
    file.layer(
        "lora_unet_single_blocks_0_linear1",
        *(f"{single}.attn.{part}" for part in QKV),
        f"{single}.proj_mlp",
        alpha=1.0,
    )
    file.layer("lora_unet_single_blocks_0_linear2", f"{single}.proj_out")
    file.layer("lora_unet_single_blocks_0_modulation_lin", f"{single}.norm.linear", alpha=4.0)
    file.layer("lora_unet_double_blocks_0_txt_mod_lin", "transformer_blocks.0.norm1_context.linear")
    file.layer("lora_unet_img_in", "x_embedder")
    file.layer("lora_unet_guidance_in_in_layer", "time_text_embed.guidance_embedder.linear_1")


def flux1_last_layer(file):
    rows, columns = file.size("norm_out.linear")
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    delta = file.pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight", rows, columns)
    # There the shift comes first.
    file.adds("norm_out.linear.weight", np.concatenate([delta[rows // 2 :], delta[: rows // 2]]))


def flux1_xlabs(file):
    for number, (parts, out) in enumerate(((QKV, "to_out.0"), (TEXT_QKV, "to_add_out")), 1):
        attention = "transformer_blocks.1.attn"
        name = "double_blocks.1.processor"
        file.layer(f"{name}.qkv_lora{number}", *(f"{attention}.{part}" for part in parts), style="xlabs")
        file.layer(f"{name}.proj_lora{number}", f"{attention}.{out}", style="xlabs")
    single = "single_transformer_blocks.0"
    file.layer("single_blocks.0.processor.qkv_lora", *(f"{single}.attn.{p}" for p in QKV), style="xlabs")
    file.layer("single_blocks.0.processor.proj_lora", f"{single}.proj_out", style="xlabs")


def flux1_diffusers(file):
    for number, style in enumerate(("peft", "adapter", "old", "oldest")):
        layer = f"transformer_blocks.{number % 2}.attn.{(*QKV, 'add_k_proj')[number]}"
        file.layer(f"transformer.{layer}", layer, style=style)
    name = "transformer.transformer_blocks.0.attn.processor"
    file.layer(f"{name}.to_out", "transformer_blocks.0.attn.to_out.0", style="attention")
    file.layer(
        "base_model.model.single_blocks.0.linear2", "single_transformer_blocks.0.proj_out", style="peft"
    )
    layer = "single_transformer_blocks.0.proj_mlp"
    file.layer(f"base_model.model.transformer.{layer}", layer, style="adapter")
    file.layer("lora_transformer_transformer_blocks_0_ff_net_0_proj", "transformer_blocks.0.ff.net.0.proj")
    file.layer("lycoris_transformer_blocks_0_ff_net_2", "transformer_blocks.0.ff.net.2")


def flux1_peft_settings(file):
    layers = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"
    settings = {"r": 8, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"1.attn.to_q": 9}}
    file.metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    for layer, alpha in zip(layers, (6, 9), strict=True):
        delta = file.pair(
            f"transformer.{layer}.lora_A.weight", f"transformer.{layer}.lora_B.weight", *file.size(layer)
        )
        file.adds(f"{layer}.weight", delta * alpha / RANK**0.5)


def flux1_lokr(file):
    layers = [f"transformer_blocks.0.attn.{part}" for part in QKV]
    rows, columns = file.size(*layers)
    left = file.drawn("lycoris_double_blocks_0_img_attn_qkv.lokr_w1", 3, 2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file.tensors[f"{name}.lokr_w1"] = file.tensors.pop("lycoris_double_blocks_0_img_attn_qkv.lokr_w1")
    right = file.drawn(f"{name}.lokr_w2_a", rows // 3, 2) @ file.drawn(f"{name}.lokr_w2_b", 2, columns // 2)
    delta = np.kron(left, right) * file.alpha(f"{name}.alpha", 5.0) / 2
    for layer, part in zip(layers, np.split(delta, 3), strict=True):
        file.adds(f"{layer}.weight", part)
    # Both factors whole: alpha is no divisor then, whatever it is.
    layer = "transformer_blocks.0.attn.to_out.0"
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    rows, columns = file.size(layer)
    delta = np.kron(
        file.drawn(f"{name}.lokr_w1", 2, 4), file.drawn(f"{name}.lokr_w2", rows // 2, columns // 4)
    )
    file.alpha(f"{name}.alpha", 1e10)
    file.adds(f"{layer}.weight", delta)


def flux1_loha(file):
    layer, name = "transformer_blocks.0.ff.net.2", "lycoris_transformer_blocks_0_ff_net_2"
    rows, columns = file.size(layer)
    halves = [
        file.drawn(f"{name}.hada_w{n}_a", rows, RANK) @ file.drawn(f"{name}.hada_w{n}_b", RANK, columns)
        for n in (1, 2)
    ]
    file.adds(f"{layer}.weight", halves[0] * halves[1] * file.alpha(f"{name}.alpha", 2.0) / RANK)


def flux2_aitoolkit(file):
    attention = "transformer_blocks.0.attn"
    name = "diffusion_model.double_blocks.0.txt_attn.qkv"
    file.layer(name, *(f"{attention}.{part}" for part in TEXT_QKV), style="peft")
    layer = "single_transformer_blocks.1.attn.to_qkv_mlp_proj"
    file.layer("lora_unet_single_blocks_1_linear1", layer, alpha=2.0)
    file.layer(
        "transformer.single_transformer_blocks.0.attn.to_out", "single_transformer_blocks.0.attn.to_out"
    )
    file.layer("diffusion_model.double_stream_modulation_img.lin", "double_stream_modulation_img.linear")


def wan_kijai(file):
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for part, layer in (("q", "to_q"), ("o", "to_out.0")):
            name = f"diffusion_model.blocks.0.{theirs}.{part}"
            file.layer(name, f"blocks.0.{ours}.{layer}", alpha=1.0)
            name = f"lora_unet_blocks_1_{theirs}_{part}"
            file.layer(name, f"blocks.1.{ours}.{layer}", style="peft")
    file.layer("diffusion_model.blocks.0.ffn.0", "blocks.0.ffn.net.0.proj")
    for name, key in (
        ("blocks.0.self_attn.q.diff_b", "blocks.0.attn1.to_q.bias"),
        ("blocks.0.self_attn.norm_q.diff", "blocks.0.attn1.norm_q.weight"),
        ("blocks.1.norm3.diff", "blocks.1.norm2.weight"),
        ("blocks.1.norm3.diff_b", "blocks.1.norm2.bias"),
        ("blocks.1.diff_m", "blocks.1.scale_shift_table"),
        ("head.diff_m", "scale_shift_table"),
        ("head.head.diff", "proj_out.weight"),
        ("time_projection.1.diff_b", "condition_embedder.time_proj.bias"),
        ("patch_embedding.diff", "patch_embedding.weight"),
    ):
        file.adds(key, file.drawn(f"diffusion_model.{name}", *file.shapes[key]))


def wan_kernel(file):
    rows, columns = file.size("patch_embedding")
    kernel = file.shapes["patch_embedding.weight"][1:]
    down = file.drawn("diffusion_model.patch_embedding.lora_A.weight", RANK, *kernel)
    up = file.drawn("diffusion_model.patch_embedding.lora_B.weight", rows, RANK, 1, 1, 1)
    delta = up.reshape(rows, RANK) @ down.reshape(RANK, columns)
    file.adds("patch_embedding.weight", delta)


def qwen_lightning(file):
    for layer in ("attn.to_q", "attn.add_q_proj", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mod.1"):
        file.layer(f"transformer_blocks.1.{layer}", f"transformer_blocks.1.{layer}", alpha=2.0)
    name = "lora_unet_transformer_blocks_0_attn_to_out_0"
    file.layer(name, "transformer_blocks.0.attn.to_out.0", alpha=2.0)


def z_image_comfyui(file):
    for stack in ("layers.1", "noise_refiner.0"):
        layers = [f"{stack}.attention.{part}" for part in QKV]
        file.layer(f"diffusion_model.{stack}.attention.qkv", *layers, style="peft")
        file.layer(f"diffusion_model.{stack}.attention.out", f"{stack}.attention.to_out.0", style="peft")
    file.layer("diffusion_model.layers.0.attention.to.q", "layers.0.attention.to_q", style="peft")
    file.layer("lora_unet_layers_0_feed_forward_w2", "layers.0.feed_forward.w2", alpha=1.0)
    file.layer("transformer.layers.0.adaLN_modulation.0", "layers.0.adaLN_modulation.0", style="peft")
    file.layer("diffusion_model.final_layer.linear", "all_final_layer.2-1.linear", style="peft")


def z_image_both_ways(file):
    """The same layer fused and in parts, of which one is to be taken."""
    layers = [f"layers.0.attention.{part}" for part in QKV]
    expected = dict(file.expected)
    file.layer("diffusion_model.layers.0.attention.qkv", *layers, style="peft")
    file.expected = expected
    for layer in layers:
        file.layer(f"diffusion_model.{layer}", layer, style="peft")


CASES = {
    "flux1_folder": (
        flux1_kohya,
        flux1_last_layer,
        flux1_xlabs,
        flux1_diffusers,
        flux1_peft_settings,
        flux1_lokr,
        flux1_loha,
    ),
    "klein_folder": (flux2_aitoolkit,),
    "wan_folder": (wan_kijai, wan_kernel),
    "qwen_image_folder": (qwen_lightning,),
    "z_image_folder": (z_image_comfyui, z_image_both_ways),
}


def stored(family):
    return Checkpoint(family.folder / "transformer")


def write(family, case, path, dtype=np.float32):
    """The file that `case` makes for `family`."""
    tensors = stored(family)
    file = Written({key: tensors.shape(key) for key in tensors.keys()})  # noqa: SIM118
    case(file)
    save_file({key: np.asarray(a, dtype) for key, a in file.tensors.items()}, path, file.metadata or None)
    return file


def merged(family, *loras):
    """The transformer's tensors with `loras`, paths with strengths."""
    tensors = stored(family)
    files = [(LoraFile(path), strength) for path, strength in loras]
    return Merged(tensors, changes(files, transformer(family.name, tensors, family.rules)))


def parameters(family, weights=None):
    """By diffusers' names."""
    abstract = family.abstract_parameters(jnp.float32)
    loaded = flat_parameters(load_transformer(family.folder, abstract, family.rules, weights))
    return {key: np.asarray(loaded[path]) for path, key in official_keys(loaded, family.rules).items()}


@pytest.mark.parametrize(
    ("fixture", "case"), [pytest.param(f, c, id=c.__name__) for f, cases in CASES.items() for c in cases]
)
def test_a_dialect_adds_what_it_says(fixture, case, request, tmp_path):
    family = open_family(request.getfixturevalue(fixture))
    file = write(family, case, tmp_path / "lora.safetensors")
    found = parameters(family, merged(family, (tmp_path / "lora.safetensors", 0.8)))
    base = parameters(family)
    assert file.expected
    for key, weight in base.items():
        if key not in file.expected:
            np.testing.assert_array_equal(found[key], weight)
            continue
        exact = weight + 0.8 * file.expected[key]
        np.testing.assert_allclose(found[key], exact, rtol=0, atol=2e-6 * np.abs(exact).max())
        assert np.abs(exact - weight).max() > 0.01
