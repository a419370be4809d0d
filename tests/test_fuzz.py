"""Damaged and contrived files: whatever their headers say, one line of our own, and no other error."""

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from jaxspd.convert.single_file import open_transformer
from jaxspd.errors import UsageError
from jaxspd.inspection import inspect, table

# Of each of four kinds.
TRIES = 500
FP8 = ml_dtypes.float8_e4m3fn


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def quantisation(form: str) -> np.ndarray:
    return np.frombuffer(json.dumps({"format": form}).encode(), np.uint8)


# Small enough that a try takes a millisecond.
SEEDS = {
    "transformer": {
        "patch_embedding.weight": ones(8, 4, 1, 2, 2),
        "head.modulation": ones(1, 2, 8),
        "text_embedding.0.weight": ones(8, 6, dtype=np.float16),
        "blocks.0.self_attn.q.weight": ones(8, 8, dtype=FP8),
        "blocks.0.self_attn.q.scale_weight": ones(8, 1),
        "blocks.0.self_attn.k.weight": ones(8, 8, dtype=FP8),
        "blocks.0.self_attn.k.weight_scale": ones(),
        "blocks.0.self_attn.k.comfy_quant": quantisation("float8_e4m3fn"),
        "blocks.0.modulation": ones(1, 6, 8),
        "scaled_fp8": ones(2, dtype=FP8),
    },
    "fused": {
        "img_in.weight": ones(4, 4),
        "txt_in.weight": ones(4, 4),
        "vector_in.in_layer.weight": ones(4, 4),
        "double_blocks.0.img_attn.qkv.weight": ones(12, 4),
        "double_blocks.0.img_attn.norm.key_norm.scale": ones(4),
        "single_blocks.0.linear1.weight": ones(28, 4),
        "final_layer.adaLN_modulation.1.weight": ones(8, 4),
    },
    "kohya": {
        f"lora_unet_{layer}{end}": array
        for layer in ("double_blocks_0_img_attn_qkv", "single_blocks_3_linear1")
        for end, array in (
            (".lora_down.weight", ones(2, 4)),
            (".lora_up.weight", ones(12, 2)),
            (".alpha", ones()),
        )
    },
    "lokr": {
        "diffusion_model.blocks.0.ffn.0.lokr_w1": ones(2, 2),
        "diffusion_model.blocks.0.ffn.0.lokr_w2_a": ones(2, 2),
        "diffusion_model.blocks.0.diff_m": ones(1, 6, 8),
        "transformer.blocks.0.attn1.to_q.lora_A.default.weight": ones(2, 2),
        "double_blocks.0.processor.qkv_lora1.up.weight": ones(2, 2),
    },
    "vae": {
        "encoder.conv_in.weight": ones(2, 3, 3, 3),
        "encoder.down_blocks.0.resnets.0.norm1.weight": ones(2),
        "decoder.up_blocks.0.resnets.0.conv1.gamma": ones(2),
        "decoder.middle.0.residual.0.gamma": ones(2),
    },
    "text_encoder": {
        "model.embed_tokens.weight": ones(4, 2),
        "model.layers.0.self_attn.q_proj.weight": ones(2, 2),
        "model.layers.0.self_attn.q_norm.weight": ones(2),
    },
}
# What a header may hold that it should not.
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    1e300,
    "",
    "F8_E4M3",
    "F4",
    "BOOL",
    "C64",
    "x" * 5000,
    "\ud800",
    [],
    [[]],
    [2**40, 2**40],
    [-1, 4],
    [0],
    [4, 0],
    [1.5],
    ["4"],
    {},
    {"format": "pt"},
]
NAMES = [
    "",
    ".",
    "..",
    ".weight",
    "blocks.0.",
    "blocks.99999999999999999999.modulation",
    "blocks.\u0663.modulation",
    "blocks.0.self_attn.q.weight.absmax",
    "blocks.0.self_attn.q.weight_scale",
    "a\nb",
    "model.diffusion_model.patch_embedding.weight",
    "transformer.patch_embedding.weight",
    "vae.decoder.conv_in.weight",
    "lora_unet_.lora_up.weight",
    ".lora_A.weight",
    "lora_te_x.alpha",
    "double_blocks.1.img_attn.qkv.weight",
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "token_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    "embeddings.token_embedding.weight",
    "bn.running_mean",
    "encoder.mid.block_1.norm1.weight",
]


def taken_apart(content: bytes) -> tuple[dict, bytes]:
    """The header of a sound file, and what follows it."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(header, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file cut, or with some of its bytes changed."""
    kind = rng.randrange(4)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:  # the length of the header, or a count of GGUF's
        place = rng.choice((0, 8, 16))
        size = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1, rng.randrange(len(content))))
        return content[:place] + size.to_bytes(8, "little") + content[place + 8 :]
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(min(len(changed), 600) if kind == 2 else len(changed))
        changed[place] = rng.randrange(256)
    return bytes(changed)


def contrived(content: bytes, rng: random.Random) -> bytes:
    """A file whose header is JSON, and says something else than before."""
    header, data = taken_apart(content)
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(sorted(header))
        entry = header[key]
        kind = rng.randrange(8)
        if kind == 0:
            del header[key]
        elif kind == 1:
            header[rng.choice(NAMES)] = header.pop(key)
        elif kind == 2:
            header[key] = rng.choice(ODD)
        elif kind == 3 and isinstance(entry, dict) and entry:
            entry[rng.choice(sorted(entry))] = rng.choice(ODD)
        elif kind == 4 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            # Another rank or order, of the same number of values.
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]])
        elif kind == 5 and isinstance(entry, dict):
            entry["dtype"] = rng.choice(
                ("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I8", "U8", "I64", "BOOL")
            )
        elif kind == 6 and isinstance(entry, dict):
            entry["data_offsets"] = sorted(rng.choices(range(len(data) + 9), k=2))
        else:
            said = json.dumps({"layers": rng.choice([*ODD, {"a": {"format": "x" * 99}}])})
            header["__metadata__"] = rng.choice([{"_quantization_metadata": said}, {"a": 1}, said])
        if not header:
            break
    if rng.randrange(20) == 0:
        return put_together(rng.choice([[], 1, "x", None, [header]]), data)
    return put_together(header, data)


def shuffled(tensors: dict, rng: random.Random) -> bytes:
    """A sound file of some tensors of all kinds, by names of others."""
    every = [item for seed in SEEDS.values() for item in seed.items()]
    mixed = dict(tensors) if rng.randrange(2) else {}
    for key, array in rng.sample(every, rng.randrange(1, 8)):
        mixed[rng.choice([key, rng.choice(NAMES)])] = array
    for key in rng.sample(sorted(mixed), rng.randrange(len(mixed))):
        del mixed[key]
    return save(mixed)


def said(path: Path) -> bool:
    """Whether `inspect` refuses a file, after every way to read it."""
    lines = {}
    for family in (None, "wan", "flux1"):
        try:
            if family is None:
                table(inspect(str(path)))
                continue
            opened = open_transformer(path, family)
            for key, shape in opened.shapes().items():
                assert opened.read(key).shape == shape
        except UsageError as error:
            lines[family] = str(error)
    assert all(line.isprintable() for line in lines.values())
    return None in lines


def fuzzed(path: Path, make, seeds: list, rng: random.Random, tries: int) -> int:
    """How many of `tries` `inspect` refuses; none may end otherwise than with the project's own error."""
    refused = 0
    for number in range(tries):
        content = make(rng.choice(seeds), rng)
        path.write_bytes(content)
        try:
            refused += said(path)
        except Exception as error:
            pytest.fail(f"try {number}: {type(error).__name__}: {error} for {content[:2000]!r}")
    return refused


@pytest.mark.parametrize("make", [damaged, contrived])
def test_safetensors(tmp_path, make):
    seeds = [save(tensors) for tensors in SEEDS.values()]
    refused = fuzzed(tmp_path / "a.safetensors", make, seeds, random.Random(make.__name__), TRIES)
    assert TRIES / 4 < refused < TRIES


def test_tensors_by_the_names_of_others(tmp_path):
    path = tmp_path / "a.safetensors"
    assert 0 < fuzzed(path, shuffled, [*SEEDS.values()], random.Random(3), TRIES) < TRIES


@pytest.fixture(scope="module")
def gguf_seed(tmp_path_factory):
    """A small GGUF file with a field of every kind."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [8, 4, 1, 2, 2])
    writer.add_array("names", ["a", "b"])
    writer.add_float32("number", 1.0)
    writer.add_tensor("patch_embedding.weight", ones(8, 16))
    writer.add_tensor("head.modulation", ones(1, 2, 8))
    writer.add_tensor("text_embedding.0.weight", ones(8, 6, dtype=np.float16))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blocks.0.ffn.0.weight", gguf.quantize(ones(4, 32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_gguf(tmp_path, gguf_seed):
    def make(content, rng):
        return gguf_seed[:4] + damaged(gguf_seed, rng)[4:]

    refused = fuzzed(tmp_path / "a.gguf", make, [gguf_seed], random.Random(4), TRIES)
    assert TRIES / 4 < refused < TRIES
