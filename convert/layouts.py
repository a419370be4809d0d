"""The layouts of each family's transformer, diffusers' own included.

The tables follow the authors' code (black-forest-labs/flux and flux2: model.py; Wan-Video/Wan2.1:
wan/modules/model.py) and ComfyUI's files of Z-Image. Qwen-Image's authors publish diffusers' layout.
"""

from collections.abc import Iterator

from . import flux1, flux2, qwen_image, wan, z_image
from .layout import Layout, Line, norm, same, split, swap, unread, whole


def joint(stream: str, projections: tuple[str, str, str], norms: tuple[str, str], out: str) -> Iterator[Line]:
    """The attention of one stream of a double block, in Black Forest Labs' names."""
    source, target = f"double_blocks.{{}}.{stream}_attn", "transformer_blocks.{}.attn"
    yield split(f"{source}.qkv", *(f"{target}.{name}" for name in projections))
    yield from norm(f"{source}.norm.query_norm", f"{target}.{norms[0]}")
    yield from norm(f"{source}.norm.key_norm", f"{target}.{norms[1]}")
    yield whole(f"{source}.proj", f"{target}.{out}")


JOINT = (
    *joint("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"),
    *joint("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out"),
)
FLUX1 = (
    whole("img_in", "x_embedder"),
    whole("txt_in", "context_embedder"),
    whole("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    whole("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    whole("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    whole("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    whole("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    whole("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    *JOINT,
    whole("double_blocks.{}.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
    whole("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
    whole("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
    whole("double_blocks.{}.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
    whole("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
    whole("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
    whole("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
    split(
        "single_blocks.{}.linear1",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
        shares=(1, 1, 1, 4),
    ),
    *norm("single_blocks.{}.norm.query_norm", "single_transformer_blocks.{}.attn.norm_q"),
    *norm("single_blocks.{}.norm.key_norm", "single_transformer_blocks.{}.attn.norm_k"),
    whole("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
    swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    whole("final_layer.linear", "proj_out"),
)
FLUX2 = (
    whole("img_in", "x_embedder"),
    whole("txt_in", "context_embedder"),
    whole("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    whole("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    whole("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    whole("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    whole("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    whole("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    whole("single_stream_modulation.lin", "single_stream_modulation.linear"),
    *JOINT,
    whole("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.linear_in"),
    whole("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.linear_out"),
    whole("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.linear_in"),
    whole("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.linear_out"),
    whole("single_blocks.{}.linear1", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
    *norm("single_blocks.{}.norm.query_norm", "single_transformer_blocks.{}.attn.norm_q"),
    *norm("single_blocks.{}.norm.key_norm", "single_transformer_blocks.{}.attn.norm_k"),
    whole("single_blocks.{}.linear2", "single_transformer_blocks.{}.attn.to_out"),
    swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    whole("final_layer.linear", "proj_out"),
)
WAN = (
    same("patch_embedding"),
    whole("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    whole("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    whole("time_projection.1", "condition_embedder.time_proj"),
    whole("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    whole("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    whole("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    *(
        whole(f"blocks.{{}}.{theirs}.{name}", f"blocks.{{}}.{target}.{key}")
        for theirs, target in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, key in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
    # The norm before cross-attention, the only one with weights.
    whole("blocks.{}.norm3", "blocks.{}.norm2"),
    whole("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    whole("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    whole("head.modulation", "scale_shift_table"),
    whole("head.head", "proj_out"),
)


def z_image_block(stack: str) -> Iterator[Line]:
    """A block of one of Z-Image's stacks, in ComfyUI's names."""
    attention = f"{stack}.{{}}.attention"
    yield split(f"{attention}.qkv", f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")
    yield whole(f"{attention}.out", f"{attention}.to_out.0")
    yield whole(f"{attention}.q_norm", f"{attention}.norm_q")
    yield whole(f"{attention}.k_norm", f"{attention}.norm_k")
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield same(f"{stack}.{{}}.{name}")
    for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        yield same(f"{stack}.{{}}.{name}")
    if stack != "context_refiner":
        yield same(f"{stack}.{{}}.adaLN_modulation.0")


Z_IMAGE = (
    whole("x_embedder", "all_x_embedder.2-1"),
    same("x_pad_token"),
    same("cap_embedder.0"),
    same("cap_embedder.1"),
    same("cap_pad_token"),
    same("t_embedder.mlp.0"),
    same("t_embedder.mlp.2"),
    *z_image_block("noise_refiner"),
    *z_image_block("context_refiner"),
    *z_image_block("layers"),
    whole("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    whole("final_layer.linear", "all_final_layer.2-1.linear"),
    unread("norm_final"),  # left over from the model's predecessor
)


def as_published(rules) -> Layout:
    """Diffusers' own layout of the family with the conversion `rules`."""
    return Layout("diffusers", tuple(same(rule.official) for rule in rules))


# The families' names in messages.
TITLES = {
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen_image": "Qwen-Image",
    "wan": "Wan",
    "z_image": "Z-Image",
}
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "flux1": (as_published(flux1.RULES), Layout("bfl", FLUX1)),
    "flux2": (as_published(flux2.RULES), Layout("bfl", FLUX2)),
    "qwen_image": (as_published(qwen_image.RULES),),
    "wan": (as_published(wan.RULES), Layout("wan", WAN)),
    "z_image": (as_published(z_image.RULES), Layout("comfyui", Z_IMAGE)),
}


def find(family: str, name: str) -> Layout:
    """The layout `name` of the family `family`. Raises KeyError if there is none."""
    return {layout.name: layout for layout in LAYOUTS[family]}[name]
