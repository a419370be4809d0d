"""Compares the speed of jaxspd's attention, XLA's own and PyTorch's on this machine, in turns.

python bench/attention.py
"""

import jax
import numpy as np
import torch
from einops import rearrange
from machine import save
from timing import in_turns

from jaxspd.models.attention import attention

# Batch, tokens, heads and head size of the demo, of a mid-size model, and of 4 of FLUX.1's 24 heads at 1024².
SIZES = [(1, 288, 6, 32), (20, 288, 6, 32), (1, 1536, 8, 64), (1, 4608, 4, 128)]
RUNS = 9


def main() -> None:
    rows = []
    ours, xla = jax.jit(attention), jax.jit(jax.nn.dot_product_attention)
    for size in SIZES:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(size, np.float32) for _ in range(3)]
        placed = jax.device_put(arrays)
        heads_first = [torch.from_numpy(rearrange(a, "b n h d -> b h n d").copy()) for a in arrays]
        ways = {
            "jaxspd": lambda placed=placed: ours(*placed).block_until_ready(),
            "XLA": lambda placed=placed: xla(*placed).block_until_ready(),
            "PyTorch": lambda a=heads_first: torch.nn.functional.scaled_dot_product_attention(*a),
        }
        found = {way: round(1000 * seconds, 2) for way, seconds in in_turns(ways, RUNS).items()}
        rows.append({"batch, tokens, heads, head size": str(size), **found})
    save("attention", ("jax", "jaxlib", "torch"), {"milliseconds": rows})


if __name__ == "__main__":
    main()
