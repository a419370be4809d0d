"""Measures what streaming a text encoder's layers costs and saves.

    python bench/text_encoders.py

A T5 encoder of T5-XXL's width with a few of its layers, random and in bfloat16 on disk, encodes prompts of
512 tokens. Each way runs in a process of its own. The process reports the seconds of the first prompt, the
median of the next ones, and its peak memory beyond an idle process's. The files are in the system's cache, as
for a second prompt.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

LAYERS, PROMPTS = 4, 4
CONFIG = {
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": LAYERS,
    "feed_forward_proj": "gated-gelu",
}


def write(folder: Path) -> None:
    """Writes the encoder in transformers' layout."""
    import ml_dtypes
    from flax import nnx
    from safetensors.numpy import save_file

    from jaxspd.convert.loader import flat_parameters
    from jaxspd.convert.table import official_keys
    from jaxspd.convert.text_t5 import RULES
    from jaxspd.models.text.t5 import T5Config, T5Encoder

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = flat_parameters(nnx.state(T5Encoder(T5Config.from_folder(folder), dtype=np.float32)))
    keys, row = official_keys(shapes, RULES), np.random.default_rng(0).standard_normal(2**20, np.float32)
    tensors = {
        keys[path]: np.resize(row / p.shape[-1] ** 0.5, p.shape).astype(ml_dtypes.bfloat16)
        for path, p in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")


def encode(folder: Path, offload: bool) -> dict[str, float]:
    """Encodes some prompts, and returns the seconds and the peak memory in GB."""
    from unittest.mock import patch

    import jax.numpy as jnp

    from jaxspd.components import text_encoder
    from jaxspd.runtime.backend import start_backend
    from jaxspd.runtime.residency import Residency

    start_backend()
    asked = text_encoder.TextPart("t5", CONFIG["d_model"], 512)
    # The folder has no tokenizer.
    with patch.multiple(text_encoder, open_tokenizer=lambda *_, **__: None, check_vocabulary=lambda *_: None):
        encoder = text_encoder.TextEncoder(folder, asked, jnp.float32, Residency(offload))
    ids, taken = np.arange(512)[None] % 30_000, []
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1 + PROMPTS):
        begin = time.perf_counter()
        encoder(ids)
        taken.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    return {
        "first prompt, s": round(taken[0], 2),
        "next prompts, s": round(median(taken[1:]), 2),
        "peak GB": round(peak * 1024 / 1e9, 2),
    }


def main() -> None:
    if len(sys.argv) > 1:
        way, folder = sys.argv[1], Path(sys.argv[2])
        print(json.dumps(write(folder) if way == "write" else encode(folder, way == "streamed")))
        return
    from machine import save

    with tempfile.TemporaryDirectory() as folder:
        part, measured = Path(folder) / "text_encoder", {}
        # This process must stay small, because its peak memory would count as that of the processes it
        # starts.
        for way, where in (("write", part), ("streamed", folder), ("resident", folder)):
            done = subprocess.run([sys.executable, __file__, way, where], check=True, stdout=subprocess.PIPE)
            measured[way] = json.loads(done.stdout)
        del measured["write"]
        size = (part / "model.safetensors").stat().st_size
    what = {"layers": LAYERS, "file GB": round(size / 1e9, 2), "computed in": "float32"}
    save("text-encoders", ("jax", "jaxlib"), what | measured)


if __name__ == "__main__":
    main()
