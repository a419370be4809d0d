"""Official weights into our parameters: exact, complete, and refused where they do not fit."""

import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from flax import nnx
from safetensors.torch import load_file, save_file

from jaxspd.convert.checkpoint import Checkpoint, read_config, write_component
from jaxspd.convert.flux1 import RULES
from jaxspd.convert.loader import flat_parameters, load_parameters
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.models.flux1 import Flux1Config, Flux1Transformer
from tests import tiny

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
TORCH = {np.dtype("float32"): torch.float32, np.dtype(jnp.bfloat16): torch.bfloat16}


def parameters_of(config, dtype=jnp.float32):
    """Shapes and dtypes of the transformer's parameters, nothing allocated."""
    model = Flux1Transformer(config, dtype=dtype)
    return nnx.state(model)


def as_torch(array):
    """A copy in PyTorch, bit for bit; bfloat16 by way of float32, which holds it exactly."""
    array = np.asarray(array)
    return torch.from_numpy(array.astype(np.float32)).to(TORCH[array.dtype])


def bits(tensor):
    """The stored bits, so that equality is not at the mercy of zeros' signs."""
    return tensor.contiguous().view(torch.uint8)


def official(folder):
    """Every official tensor, as the safetensors library reads them."""
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Writes the transformer alone in any dtype and number of shards, each once."""
    made = {}

    def write(dtype=torch.float32, shard_size=None):
        if (dtype, shard_size) not in made:
            folder = tmp_path_factory.mktemp("component") / "transformer"
            tiny.flux1_transformer().to(dtype).save_pretrained(folder, max_shard_size=shard_size or "1GB")
            made[dtype, shard_size] = folder
        return made[dtype, shard_size]

    return write


@pytest.fixture(scope="module")
def config(flux1_folder):
    return open_family(flux1_folder).config


@pytest.fixture(scope="module")
def parameters(config):
    return {dtype: parameters_of(config, dtype) for dtype in (jnp.float32, jnp.bfloat16)}


# Values


@pytest.mark.parametrize("shard_size", [None, "300KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [jnp.float32, jnp.bfloat16])
def test_loading_gives_the_official_values(stored, parameters, dtype, shard_size, target):
    folder = stored(dtype, shard_size)
    assert (folder / INDEX).exists() == bool(shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(shard_size)
    # Biases are in float32 whatever the rest is in.
    theirs = {
        key: t.float() if key.endswith("bias") else t.to(TORCH[np.dtype(target)])
        for key, t in official(folder).items()
    }
    loaded = flat_parameters(load_parameters(Checkpoint(folder), parameters[target], RULES))
    assert set(loaded) == set(flat_parameters(parameters[target]))
    for path, p in loaded.items():
        assert p.dtype == (jnp.float32 if path.endswith("bias") else target), path
    ours = jax.tree.map(as_torch, loaded)

    # By hand, one of each kind: alone, of layers, and of the last layer.
    for path, key in (
        ("image_in.bias", "x_embedder.bias"),
        ("guidance_in.linear_2.bias", "time_text_embed.guidance_embedder.linear_2.bias"),
        ("image_in.weight", "x_embedder.weight"),
        ("pooled_in.linear_1.weight", "time_text_embed.text_embedder.linear_1.weight"),
        ("out.weight", "proj_out.weight"),
    ):
        assert torch.equal(ours[path], theirs[key])
    for layer in range(2):
        block = f"transformer_blocks.{layer}"
        assert torch.equal(
            ours[f"double_blocks.{layer}.text.qkv.norm_k.scale"], theirs[f"{block}.attn.norm_added_k.weight"]
        )
        assert torch.equal(
            ours[f"double_blocks.{layer}.image.mlp.linear_1.weight"], theirs[f"{block}.ff.net.0.proj.weight"]
        )
    last = "single_transformer_blocks.2"
    assert torch.equal(ours["single_blocks.2.modulation.linear.bias"], theirs[f"{last}.norm.linear.bias"])
    assert torch.equal(ours["single_blocks.2.out.weight"], theirs[f"{last}.proj_out.weight"])

    # As a whole: the parameters hold as many values as the checkpoint, and the same ones.
    all_ours = torch.cat([p.flatten().float() for p in jax.tree.leaves(ours)]).sort().values
    all_theirs = torch.cat([t.flatten().float() for t in theirs.values()]).sort().values
    assert torch.equal(all_ours, all_theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_writing_gives_back_every_official_tensor_bit_for_bit(stored, parameters, dtype, tmp_path):
    folder = stored(dtype)
    # Float32 holds both half-precision formats exactly.
    state = load_parameters(Checkpoint(folder), parameters[jnp.float32], RULES)
    values = flat_parameters(state)
    official_config = read_config(folder)
    kept = {key: value for key, value in official_config.items() if not key.startswith("_")}
    numpy_dtype = {torch.float32: np.float32, torch.float16: np.float16}.get(dtype, jnp.bfloat16)
    write_component(tmp_path / "new", "FluxTransformer2DModel", kept, RULES, values, numpy_dtype)

    ours, theirs = official(tmp_path / "new"), official(folder)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        assert torch.equal(bits(ours[key]), bits(tensor)), key
    # And diffusers opens it.
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "new", torch_dtype=dtype)
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == kept


def test_put_receives_every_parameter_once_in_the_target_dtype(stored, parameters):
    seen = []

    def put(array, sharding):
        assert sharding is None
        seen.append((array.shape, array.dtype))
        return array

    load_parameters(Checkpoint(stored(torch.float32)), parameters[jnp.bfloat16], RULES, put)
    wanted = [(p.shape, p.dtype) for p in jax.tree.leaves(parameters[jnp.bfloat16])]
    assert Counter(seen) == Counter(wanted)


# Strictness

MISSING = "transformer_blocks.1.attn.add_q_proj.weight"
LEFT_OVER = "transformer_blocks.2.attn.to_q.weight"  # a third layer, where the config has two
MISSHAPEN = "context_embedder.weight"


def lose(tensors):
    del tensors[MISSING]


def leave_over(tensors):
    tensors[LEFT_OVER] = torch.zeros(48, 48)


def misshape(tensors):
    tensors[MISSHAPEN] = tensors[MISSHAPEN].T.contiguous()


FAULTS = {
    lose: f"1 missing: {MISSING}",
    leave_over: f"1 left over: {LEFT_OVER}",
    misshape: f"1 misshapen: {MISSHAPEN} [32, 48] instead of [48, 32]",
}


@pytest.fixture
def edited(stored, tmp_path):
    """The transformer's folder after some changes to its tensors."""

    def edit(*changes):
        folder = tmp_path / "transformer"
        shutil.copytree(stored(), folder)
        tensors = load_file(folder / SINGLE)
        for change in changes:
            change(tensors)
        save_file(tensors, folder / SINGLE)
        return folder

    return edit


def refusal(folder, parameters) -> str:
    """The one line with which loading ends."""
    with pytest.raises(UsageError) as error:
        load_parameters(Checkpoint(folder), parameters[jnp.float32], RULES)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    return message


@pytest.mark.parametrize(
    "faults", [[lose], [leave_over], [misshape], [lose, leave_over, misshape]], ids=lambda f: len(f)
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_key(edited, parameters, faults):
    message = refusal(edited(*faults), parameters)
    for fault, line in FAULTS.items():
        assert (line in message) == (fault in faults)


def test_a_long_list_of_faults_is_cut_short_but_counted(edited, parameters):
    extra = [f"extra.{n}" for n in range(10)]
    folder = edited(lambda tensors: tensors.update({key: torch.zeros(1) for key in extra}))
    message = refusal(folder, parameters)
    assert f"10 left over: {', '.join(extra[:8])}, …" in message
    assert extra[8] not in message


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"guidance_embeds": False}, "4 left over: time_text_embed.guidance_embedder.linear_1.bias"),
        ({"num_layers": 3}, "32 missing: transformer_blocks.2."),
        ({"num_single_layers": 2}, "14 left over: single_transformer_blocks.2."),
        ({"num_attention_heads": 2}, "misshapen: context_embedder.bias [48] instead of [32]"),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(stored, config, other, says):
    given = {**vars(config), **other}
    assert says in refusal(stored(), {jnp.float32: parameters_of(Flux1Config(**given))})


def test_a_stored_dtype_that_is_no_float_is_refused(edited, parameters):
    def recast(tensors):
        tensors["x_embedder.bias"] = tensors["x_embedder.bias"].to(torch.int64)

    assert "I64" in refusal(edited(recast), parameters)


@pytest.mark.parametrize("kept", [0, 5, 200, -1], ids=["empty", "no header", "header cut", "last byte"])
def test_a_truncated_file_is_refused(edited, parameters, kept):
    folder = edited()
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:kept])
    message = refusal(folder, parameters)
    assert SINGLE in message
    assert "truncated" in message


def test_a_file_of_another_format_is_refused(edited, parameters):
    folder = edited()
    torch.save({"weight": torch.zeros(3)}, folder / SINGLE)
    assert "no safetensors file" in refusal(folder, parameters)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_never_loaded(edited, parameters, suffix):
    folder = edited()
    # Opening it would write the file; the message must be all that happens.
    trap = folder / "opened"
    (folder / SINGLE).unlink()
    torch.save(Trap(trap), folder / f"diffusion_pytorch_model.{suffix}")
    message = refusal(folder, parameters)
    assert "pickles" in message
    assert "never loaded" in message
    assert not trap.exists()


class Trap:
    """Unpickles into an empty file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_trap_works(tmp_path):
    torch.save(Trap(tmp_path / "opened"), tmp_path / "pickle.bin")
    torch.load(tmp_path / "pickle.bin", weights_only=False).close()
    assert (tmp_path / "opened").exists()


def test_missing_weights_are_refused(edited, parameters, tmp_path):
    folder = edited()
    (folder / SINGLE).unlink()
    assert "needs safetensors weights" in refusal(folder, parameters)
    assert "is missing" in refusal(tmp_path / "elsewhere", parameters)


# Shards


@pytest.fixture
def sharded(stored, tmp_path):
    return shutil.copytree(stored(shard_size="300KB"), tmp_path / "transformer")


def test_a_missing_shard_is_refused_by_name(sharded, parameters):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"lacks {lost.name}" in refusal(sharded, parameters)


def test_a_key_in_two_shards_is_refused(sharded, parameters):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: tensor}, second)
    message = refusal(sharded, parameters)
    assert key in message
    assert "two shards" in message


def test_a_shard_that_the_index_does_not_name_is_not_read(sharded, parameters):
    (sharded / "diffusion_pytorch_model-00009-of-00009.safetensors").write_bytes(b"not a shard")
    load_parameters(Checkpoint(sharded), parameters[jnp.float32], RULES)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"weight_map": {"a": ',
        b"\xff\xfe",
        b"{}",
        b"[]",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"x_embedder.bias": "../outside.safetensors"}}',
        b'{"weight_map": {"x_embedder.bias": 3}}',
        b'{"weight_map": {"x_embedder.bias": ["a.safetensors"]}}',
    ],
)
def test_a_damaged_index_is_refused(sharded, parameters, content):
    (sharded / INDEX).write_bytes(content)
    message = refusal(sharded, parameters)
    assert INDEX in message
    assert "damaged" in message
