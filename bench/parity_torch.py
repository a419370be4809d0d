"""The process of the parity suite that runs torch_ref and PyTorch's own attention.

python bench/parity_torch.py JOB.json ANSWER.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention
from torch_worker import CUDA, open_reference, texts
from worker import Inputs


def model_outputs(job: dict) -> dict[str, torch.Tensor]:
    """The same outputs as in parity_jax.py."""
    reference, inputs = open_reference(Path(job["checkpoint"]), job["dtype"]), Inputs(job["inputs"])
    text = [t for kind in ("positive", "negative") for t in texts(reference, inputs.text(kind))]
    options = job["torch_options"]
    scale = options["guidance_scale"]
    outputs = {
        f"velocity/{stage}": reference.velocity(
            torch.from_numpy(noise), job["sigma"], *text, guidance_scale=scale
        )
        for stage, noise in enumerate(inputs.noises())
    }
    outputs["loop"] = reference.denoise(inputs.noises(), *text, **options)
    return outputs


def attention_outputs(job: dict) -> dict[str, torch.Tensor]:
    """The same outputs as in parity_jax.py."""
    device, outputs = "cuda" if CUDA else "cpu", {}
    with np.load(job["inputs"]) as arrays:
        for kind in job["kinds"]:
            maps = [
                rearrange(torch.from_numpy(arrays[f"{kind}/{name}"]), "b n h d -> b h n d").to(
                    device, getattr(torch, job["dtype"])
                )
                for name in ("query", "key", "value")
            ]
            lengths, keys = arrays[f"{kind}/lengths"], maps[1].shape[2]
            seen = torch.from_numpy(np.arange(keys) < lengths[:, None]).to(device)[:, None, None]
            for name, mask in ((kind, None), (f"{kind}, padded", seen)):
                out = scaled_dot_product_attention(*maps, attn_mask=mask)
                outputs[name] = rearrange(out, "b h n d -> b n (h d)")
    return outputs


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    # TF32 is off; PyTorch's convolutions use it by default.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    outputs = model_outputs(job) if "checkpoint" in job else attention_outputs(job)
    np.savez(job["outputs"], **{name: output.float().cpu().numpy() for name, output in outputs.items()})
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    Path(answer_file).write_text(json.dumps({"device": device}))


if __name__ == "__main__":
    main(*sys.argv[1:])
