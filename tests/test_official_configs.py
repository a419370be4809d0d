"""Real configuration files, of which the values that matter are kept here: each opens, and runs what its card
says.
"""

import json

import numpy as np
import pytest

from jaxspd import UsageError
from jaxspd.families import open_family
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve

FLUX1 = {
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
KLEIN = {
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-6,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
KLEIN_9B = KLEIN | {
    "joint_attention_dim": 12_288,
    "num_attention_heads": 32,
    "num_layers": 8,
    "num_single_layers": 24,
}
Z_IMAGE = {
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
QWEN_IMAGE = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
OFF = {
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
DYNAMIC = EULER | {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
QWEN_SCHEDULER = {**DYNAMIC, **OFF, "max_image_seq_len": 8192, "max_shift": 0.9, "shift": 1.0}
QWEN_SCHEDULER |= {"shift_terminal": 0.02, "time_shift_type": "exponential"}
KLEIN_SCHEDULER = {**DYNAMIC, **OFF, "shift_terminal": None, "time_shift_type": "exponential"}
WAN_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
BLOCKS = [128, 256, 512, 512]
VAE_FLUX1 = {"latent_channels": 16, "block_out_channels": BLOCKS, "sample_size": 1024}
VAE_FLUX2 = {"latent_channels": 32, "block_out_channels": BLOCKS, "sample_size": 1024, "patch_size": [2, 2]}
VAE_QWEN = {"z_dim": 16, "base_dim": 96, "temperal_downsample": [False, True, True]}
NEGATIVE_2512 = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
)
NEGATIVE_2512 += "构图混乱。文字模糊，扭曲。"
KLEIN_INDEX = {"_class_name": "Flux2KleinPipeline"}
DISTILLED = KLEIN_INDEX | {"is_distilled": True}
STATIC = EULER | {"use_dynamic_shifting": False}
SCHNELL = DYNAMIC | {"use_dynamic_shifting": False, "shift": 1.0}
FLUX1_INDEX, QWEN_INDEX = {"_class_name": "FluxPipeline"}, {"_class_name": "QwenImagePipeline"}
Z_INDEX, SQUARE = {"_class_name": "ZImagePipeline"}, (1024, 1024)
# model_index.json, and the configurations of transformer, scheduler and VAE.
FOLDERS = {
    "FLUX.1-dev": (FLUX1_INDEX, FLUX1 | {"guidance_embeds": True}, DYNAMIC, VAE_FLUX1),
    "FLUX.1-schnell": (FLUX1_INDEX, FLUX1 | {"guidance_embeds": False}, SCHNELL, VAE_FLUX1),
    "FLUX.2-klein-4B": (DISTILLED, KLEIN, KLEIN_SCHEDULER, VAE_FLUX2),
    "FLUX.2-klein-base-4B": (KLEIN_INDEX, KLEIN, KLEIN_SCHEDULER, VAE_FLUX2),
    "FLUX.2-klein-9B": (DISTILLED, KLEIN_9B, KLEIN_SCHEDULER, VAE_FLUX2),
    "FLUX.2-klein-base-9B": (KLEIN_INDEX, KLEIN_9B, KLEIN_SCHEDULER, VAE_FLUX2),
    "Qwen-Image-2512": (QWEN_INDEX, QWEN_IMAGE, QWEN_SCHEDULER, VAE_QWEN),
    "Z-Image": (Z_INDEX, Z_IMAGE | {"siglip_feat_dim": None}, STATIC | {"shift": 6.0}, VAE_FLUX1),
    "Z-Image-Turbo": (Z_INDEX, Z_IMAGE, STATIC | {"shift": 3.0}, VAE_FLUX1),
}
# Steps, guidance, (height, width), tokens of text, negative prompt.
RUNS = {
    "FLUX.1-dev": (50, 3.5, SQUARE, 512, None),
    "FLUX.1-schnell": (4, 0.0, SQUARE, 256, None),
    "FLUX.2-klein-4B": (4, 1.0, SQUARE, 512, None),
    "FLUX.2-klein-base-4B": (50, 4.0, SQUARE, 512, ""),
    "FLUX.2-klein-9B": (4, 1.0, SQUARE, 512, None),
    "FLUX.2-klein-base-9B": (50, 4.0, SQUARE, 512, ""),
    "Qwen-Image-2512": (50, 4.0, (928, 1664), 512, NEGATIVE_2512),
    "Z-Image": (50, 4.0, (1280, 720), 512, ""),
    "Z-Image-Turbo": (8, 0.0, SQUARE, 512, None),
}


def write_folder(folder, index, transformer, scheduler, vae):
    """A pipeline folder of configuration files alone."""
    files = {
        "model_index.json": index,
        "transformer/config.json": transformer,
        "scheduler/scheduler_config.json": scheduler,
        "vae/config.json": vae,
        "tokenizer/tokenizer_config.json": {"model_max_length": 131_072},
        "tokenizer_2/tokenizer_config.json": {"model_max_length": 512},
        "text_encoder/config.json": {},
        "text_encoder_2/config.json": {},
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_a_real_folder_opens_and_runs_what_its_card_says(tmp_path, name):
    index, transformer, scheduler, vae = FOLDERS[name]
    family = open_family(write_folder(tmp_path / name, index, transformer, scheduler, vae))
    config = vars(family.config)
    read = {key: tuple(v) if isinstance(v, list) else v for key, v in transformer.items() if key in config}
    assert read == {key: config[key] for key in read}
    assert len(read) >= 8
    params = resolve(family, SamplingParams(prompt="a"))
    runs = params.num_inference_steps, params.guidance_scale, (params.height, params.width)
    assert (*runs, family.text_tokens, params.negative_prompt) == RUNS[name]
    assert family.pixels_per_latent == (16 if index["_class_name"] == "Flux2KleinPipeline" else 8)
    assert params.scheduler == "euler"
    sigmas = family.sigmas(4, 4096)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (np.diff(sigmas) < 0).all()


# As their model_index.json says it.
@pytest.mark.parametrize(
    ("index", "transformer", "scheduler", "vae", "says"),
    [
        (
            {"_class_name": "WanPipeline", "boundary_ratio": 0.875},
            {},
            WAN_SCHEDULER,
            {},
            "lacks transformer_2",
        ),
        (
            {"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": True},
            {},
            WAN_SCHEDULER,
            {},
            "Wan 2.2's TI2V-5B",
        ),
        (
            {"_class_name": "WanImageToVideoPipeline"},
            {},
            WAN_SCHEDULER,
            {},
            "is a WanImageToVideoPipeline pipeline",
        ),
        ({"_class_name": "FluxKontextPipeline"}, FLUX1, DYNAMIC, VAE_FLUX1, "is a FluxKontextPipeline"),
        ({"_class_name": "QwenImageEditPlusPipeline"}, QWEN_IMAGE, QWEN_SCHEDULER, VAE_QWEN, "EditPlus"),
        (QWEN_INDEX, QWEN_IMAGE | {"zero_cond_t": True}, QWEN_SCHEDULER, VAE_QWEN, "zero_cond_t"),
    ],
)
def test_real_folders_of_other_models_are_refused(tmp_path, index, transformer, scheduler, vae, says):
    with pytest.raises(UsageError, match=says) as error:
        open_family(write_folder(tmp_path / "model", index, transformer, scheduler, vae))
    assert len(str(error.value).splitlines()) == 1
