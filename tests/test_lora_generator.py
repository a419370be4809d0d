"""LoRAs of a whole pipeline: in pictures, in text encoders, set anew, from the hub, and before rounding."""

import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxspd import DiffGenerator
from jaxspd.components.pipeline import Components
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.lora import Merged, changes, transformer
from jaxspd.convert.lora_file import LoraFile
from jaxspd.convert.orbax_store import stored_transformer
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.convert.rounding import round_rows
from jaxspd.convert.table import official_keys
from jaxspd.errors import UsageError
from jaxspd.families import family_class, open_family
from jaxspd.hub import fetch_file
from jaxspd.media.metadata import read_request
from jaxspd.runtime.residency import Residency
from jaxspd.sampling.schedule import flow_match_sigmas
from tests.test_hub import hub  # noqa: F401
from tests.test_lora import flux1_kohya, flux1_loha, merged, parameters, write

REQUEST = {"prompt": "a lake", "height": 64, "width": 64, "num_inference_steps": 2}
TEXT_LAYER = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def lora(flux1_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    return path, write(open_family(flux1_folder), flux1_kohya, path)


def stored_layer(folder):
    """What the file calls `TEXT_LAYER`'s weight, which differs among releases."""
    keys = Checkpoint(folder / "text_encoder", "model").keys()
    return next(key for key in keys if f"text_model.{key}".endswith(f"{TEXT_LAYER}.weight"))


@pytest.fixture(scope="module")
def text_lora(flux1_folder, tmp_path_factory):
    """A LoRA of CLIP alone, and what it adds."""
    path = tmp_path_factory.mktemp("lora") / "text.safetensors"
    rows, columns = Checkpoint(flux1_folder / "text_encoder", "model").shape(stored_layer(flux1_folder))
    rng = np.random.default_rng(2)
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, 2), (2, columns)))
    name = "lora_te1_" + TEXT_LAYER.replace(".", "_")
    save_file(
        {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": np.asarray(np.float32(1)),
        },
        path,
    )
    return path, up @ down / 2


def weights_of(generator, family):
    """The transformer's weights that a generator works with, by diffusers' names."""
    loaded, _ = generator._denoiser.load().result()
    arrays = {".".join(map(str, path)): array for path, array in flatten_dict(loaded).items()}
    return {key: np.asarray(arrays[path]) for path, key in official_keys(arrays, family.rules).items()}


def test_loras_show_in_outputs_which_name_them_and_can_be_set_anew(flux1_folder, lora, tmp_path, monkeypatch):
    (path, file), family = lora, open_family(flux1_folder)
    plain = parameters(family)

    def expected(key):
        return plain[key] + 0.7 * file.expected.get(key, 0)

    def check(weights):
        for key, weight in weights.items():
            np.testing.assert_allclose(weight, expected(key), atol=1e-5)

    monkeypatch.setattr(Residency, "has_host_room", lambda self, size: True)
    generator = DiffGenerator.from_pretrained(
        flux1_folder, lora_path=path, lora_scale=0.7, compilation_cache=False
    )
    asked = {**REQUEST, "output_path": str(tmp_path)}
    result = generator.generate(asked, show_progress=False)
    check(weights_of(generator, family))
    request = read_request(result.paths[0])
    assert (request["lora_path"], request["lora_scale"]) == ([str(path)], [0.7])
    repeated = generator.iterate({**request, "output_path": str(tmp_path)}, skip_existing=True)
    assert repeated.result.skipped == result.paths
    with pytest.raises(UsageError, match="this request is for lora_scale"):
        generator.iterate({**request, "lora_scale": [0.5]})

    read, own = [], Checkpoint.read

    def reading(self, key, rows=None):
        if self.folder == flux1_folder / "transformer":
            read.append(key)
        return own(self, key, rows)

    monkeypatch.setattr(Checkpoint, "read", reading)
    generator.set_loras()
    for key, weight in weights_of(generator, family).items():
        np.testing.assert_array_equal(weight, plain[key])
    generator.set_loras([path, path], [0.3, 0.4])
    check(weights_of(generator, family))
    # Of what was kept.
    assert read == []
    monkeypatch.setattr(Residency, "has_host_room", lambda self, size: False)
    generator.set_loras(path, 0.7)
    check(weights_of(generator, family))
    with pytest.raises(UsageError, match="does not exist"):
        generator.set_loras(tmp_path / "none.safetensors")
    assert generator.source.loras[0].scales == (0.7,)
    generator.set_loras()
    unchanged = generator.generate(REQUEST, save_output=False, show_progress=False)
    assert np.abs(unchanged.frames[0].astype(int) - result.frames[0]).max() > 2


def test_text_encoders_are_changed_too(flux1_folder, text_lora, tmp_path):
    path, delta = text_lora
    folder = shutil.copytree(flux1_folder, tmp_path / "merged")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors, key = load_file(weights), stored_layer(folder)
    save_file(tensors | {key: (tensors[key] + 0.5 * delta).astype(np.float32)}, weights)

    def read(components):
        return components.encode_text(["a lake"])["pooled"]

    expected = read(Components(open_family(folder), jnp.float32))
    plain = Components(open_family(flux1_folder), jnp.float32)
    before = read(plain)
    assert np.abs(before - expected).max() > 1e-3
    plain.set_loras([(LoraFile(path), 0.5)])
    np.testing.assert_allclose(read(plain), expected, atol=1e-6)
    plain.set_loras([])
    np.testing.assert_array_equal(read(plain), before)


def test_layers_that_a_text_encoder_has_not_are_named(flux1_folder, tmp_path):
    name = "text_encoder.text_model.encoder.layers.90.mlp.fc1"
    tensors = {f"{name}.lora_A.weight": np.zeros((1, 4), np.float32)}
    save_file(tensors | {f"{name}.lora_B.weight": np.zeros((4, 1), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"text encoder 1 does not have: text_encoder\.text_model"):
        DiffGenerator.from_pretrained(flux1_folder, lora_path=tmp_path / "a.safetensors")


def test_weights_are_merged_before_they_are_rounded(flux1_folder, lora, tmp_path):
    family = replace(open_family(flux1_folder), quantize="int8")
    exact = parameters(open_family(flux1_folder), merged(family, (lora[0], 1.0)))
    found = parameters(family, merged(family, (lora[0], 1.0)))
    key = "transformer_blocks.1.attn.to_q.weight"
    values, units = round_rows(exact[key], np.int8)
    np.testing.assert_array_equal(found[key], values)
    np.testing.assert_array_equal(found[f"{key}_scale"], units)


def test_converted_weights_take_loras_as_well(flux1_folder, lora, tmp_path):
    convert_pipeline(open_family(flux1_folder), tmp_path / "orbax")
    family = open_family(tmp_path / "orbax")
    tensors = stored_transformer(family.folder, family.rules)
    found = changes([(LoraFile(lora[0]), 1.0)], transformer(family.name, tensors, family.rules))
    expected = parameters(open_family(flux1_folder), merged(open_family(flux1_folder), (lora[0], 1.0)))
    for key, weight in parameters(family, Merged(tensors, found)).items():
        np.testing.assert_array_equal(weight, expected[key])


def test_loras_come_from_the_hub(hub, flux1_folder, lora, tmp_path):  # noqa: F811
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(lora[0], repository / "one.safetensors")
    hub.add("maker/lora", repository)
    assert fetch_file("maker/lora").read_bytes() == lora[0].read_bytes()
    write(open_family(flux1_folder), flux1_loha, repository / "two.safetensors")
    hub.add("maker/both", repository)
    with pytest.raises(UsageError, match=r"2 files of weights.*one\.safetensors, two\.safetensors"):
        fetch_file("maker/both")
    found = fetch_file("maker/both/two.safetensors")
    assert found.read_bytes() == (repository / "two.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"has no such file.*one\.safetensors"):
        fetch_file("maker/both/three.safetensors")
    with pytest.raises(UsageError, match="no such repository"):
        fetch_file("maker/none")


def test_few_steps_have_the_levels_that_their_loras_are_made_for():
    qwen, wan = family_class("qwen_image")(), family_class("wan")()
    # Qwen-Image-Lightning's scheduler: the same shift of 3 at every size, and no terminal.
    lightning = {**qwen.scheduler, "base_shift": np.log(3), "max_shift": np.log(3), "shift_terminal": None}
    for tokens in (256, 4096):
        expected = flow_match_sigmas(lightning, 4, tokens)
        np.testing.assert_allclose(qwen.sigmas(4, tokens, flow_shift=3.0), expected, atol=1e-6)
    # Those of Wan's step-distilled LoRAs, by their authors.
    times = 1000 * wan.sigmas(4, 0, flow_shift=5.0)
    np.testing.assert_allclose(times, [999, 937, 833, 625, 0], atol=1)
