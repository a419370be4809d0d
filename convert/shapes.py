"""Infers a transformer's configuration from the shapes of its tensors, which have diffusers' names."""

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]
# FLUX.2's models, by the width of the text that they read, and Wan's, by the number of blocks.
FLUX2 = {7680: "FLUX.2 [klein] 4B", 12288: "FLUX.2 [klein] 9B", 15360: "FLUX.2 [dev]"}
WAN = {30: "Wan 2.1 T2V 1.3B", 40: "Wan T2V 14B"}


def config_of(family: str, shapes: Shapes) -> dict | None:
    """The fields of `config.json` that the shapes determine. None if a tensor that they need is missing or
    has the wrong number of axes.

    Other fields, such as those of rotary positions, are as in the official file.
    """
    try:
        return CONFIGS[family](shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return None


def variant_of(family: str, shapes: Shapes) -> str | None:
    """The published model whose tensors have such shapes, None if there is none. Shapes do not tell all
    models apart.
    """
    config = config_of(family, shapes)
    if config is None:
        return None
    if family == "flux1":
        if (config["num_layers"], config["num_single_layers"]) != (19, 38):
            return None
        return "FLUX.1 [dev]" if config["guidance_embeds"] else "FLUX.1 [schnell]"
    if family == "flux2":
        return FLUX2.get(config["joint_attention_dim"])
    if family == "wan":
        return WAN.get(config["num_layers"])
    if family == "z_image":
        return "Z-Image" if config["n_layers"] == 30 else None
    return "Qwen-Image" if config["num_layers"] == 60 else None


def blocks(shapes: Shapes, stack: str) -> int:
    """The number of blocks in a stack."""
    numbers = {key.split(".")[1] for key in shapes if key.startswith(f"{stack}.")}
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def heads(shapes: Shapes, norm: str, width: int) -> dict:
    """The size and the number of heads. The size is that of the norm over a head's channels."""
    (size,) = shapes[norm]
    if width % size:
        raise KeyError(norm)
    return {"attention_head_dim": size, "num_attention_heads": width // size}


def flux(shapes: Shapes) -> dict:
    """The fields that FLUX.1 and FLUX.2 have in common."""
    width, channels = shapes["x_embedder.weight"]
    return {
        "in_channels": channels,
        "num_layers": blocks(shapes, "transformer_blocks"),
        "num_single_layers": blocks(shapes, "single_transformer_blocks"),
        **heads(shapes, "transformer_blocks.0.attn.norm_q.weight", width),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "guidance_embeds": any("guidance_embedder" in key for key in shapes),
    }


def flux1(shapes: Shapes) -> dict:
    pooled = shapes["time_text_embed.text_embedder.linear_1.weight"][1]
    return flux(shapes) | {"pooled_projection_dim": pooled}


def flux2(shapes: Shapes) -> dict:
    width, inner = shapes["transformer_blocks.0.ff.linear_out.weight"]
    return flux(shapes) | {
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": inner / width,
    }


def qwen_image(shapes: Shapes) -> dict:
    width, channels = shapes["img_in.weight"]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": blocks(shapes, "transformer_blocks"),
        **heads(shapes, "transformer_blocks.0.attn.norm_q.weight", width),
        "joint_attention_dim": shapes["txt_in.weight"][1],
    }


def wan(shapes: Shapes) -> dict:
    """Wan's fields. Its norms span all heads, so they do not tell the size of a head; if the width allows, it
    is the official 128.
    """
    width, channels, *patch = shapes["patch_embedding.weight"]
    head = {"attention_head_dim": 128, "num_attention_heads": width // 128} if width % 128 == 0 else {}
    return {
        "patch_size": list(patch),
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2]),
        "num_layers": blocks(shapes, "blocks"),
        **head,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
    }


def z_image(shapes: Shapes) -> dict:
    width, inputs = shapes["all_x_embedder.2-1.weight"]
    (size,) = shapes["layers.0.attention.norm_q.weight"]
    return {
        "in_channels": inputs // 4,
        "dim": width,
        "n_layers": blocks(shapes, "layers"),
        "n_refiner_layers": blocks(shapes, "noise_refiner"),
        "n_heads": width // size,
        "n_kv_heads": width // size,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
    }


CONFIGS = {"flux1": flux1, "flux2": flux2, "qwen_image": qwen_image, "wan": wan, "z_image": z_image}
