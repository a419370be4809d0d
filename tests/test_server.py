"""The server's pictures, as OpenAI's own client and others ask for them."""

import base64
import logging

import httpx2 as httpx
import numpy as np
import openai
import pytest

from jaxspd.media.metadata import read_request
from jaxspd.server.files import public
from jaxspd.server.store import File, Store
from tests.serving import SMALL, pixels, serving, wait_until

GROW = {"progressive_mode": "dct_rewind", "progressive_sigmas": [0.6]}
OPTIONS = {"save_output": False, "show_progress": False}


@pytest.fixture(scope="module")
def server(toy_generator):
    with serving(toy_generator, pixels=64 * 128, steps=50, outputs=3) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def test_the_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "jaxspd")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist; this server has 'tiny'"):
        client.models.retrieve("other/model")


def test_pictures_are_those_of_the_command(client, toy_generator, tmp_path):
    request = {"prompt": "a lake", **SMALL, **GROW}
    answer = client.images.generate(prompt="a lake", n=2, size="96x64", extra_body={**SMALL, **GROW})
    asked = {**request, "height": 64, "width": 96, "num_outputs_per_prompt": 2}
    mine = toy_generator.generate(asked, **OPTIONS)
    assert answer.size == "96x64"
    for item, frames, number in zip(answer.data, mine.frames, range(2), strict=True):
        content = base64.b64decode(item.b64_json)
        np.testing.assert_array_equal(pixels(content), frames[0])
        assert item.seed == 5 + number
        # What the file carries repeats it, and tells nothing of where the model lies.
        (tmp_path / "a.png").write_bytes(content)
        carried = read_request(tmp_path / "a.png")
        assert carried == item.request
        assert "model_path" not in carried
        again = toy_generator.generate(carried, **OPTIONS)
        np.testing.assert_array_equal(again.frames[0], frames)


def test_an_address_gives_the_same_picture(client, server):
    ask = {"prompt": "a lake", "size": "96x64", "extra_body": SMALL, "model": "tiny"}
    (here,) = client.images.generate(**ask).data
    (there,) = client.images.generate(**ask, response_format="url").data
    fetched = httpx.get(there.url)
    assert fetched.headers["content-type"] == "image/png"
    assert fetched.content == base64.b64decode(here.b64_json)
    assert server.get("/images/nothing.png").status_code == 404


def test_looks_come_as_the_picture_grows(client):
    ask = {"prompt": "a lake", "size": "24x16", "extra_body": {**SMALL, **GROW, "num_inference_steps": 12}}
    (plain,) = client.images.generate(**ask).data
    *looks, last = client.images.generate(**ask, stream=True, partial_images=6)
    assert {look.type for look in looks} == {"image_generation.partial_image"}
    seen = [(*look.grid, *pixels(base64.b64decode(look.b64_json)).shape) for look in looks]
    assert {*seen} <= {(4, 6, 4, 6, 3), (8, 12, 8, 12, 3)}
    # A reader that keeps up sees them all; one that does not, the newest.
    order = [(look.partial_image_index, look.step) for look in looks]
    assert order == sorted(order)
    assert len(looks) >= 2
    assert looks[-1].sigma < looks[0].sigma < 1
    assert (last.type, last.b64_json) == ("image_generation.completed", plain.b64_json)
    assert last.request == plain.request


def test_each_request_is_a_line_of_log(server, caplog):
    with caplog.at_level(logging.INFO, "jaxspd.server"):
        logging.getLogger("jaxspd.server").propagate = logging.getLogger("jaxspd").propagate = True
        server.post({"prompt": "a secret lake", "size": "96x64", **SMALL})
        server.post({"prompt": "a\nlake", "seed": -1})
        server.get("/no%0Athing")
        # A line may come after the answer, as may that of an earlier test's.
        ends = ("1 of 96×64 steps 4 fullres seed 5", "· seed must be 0 or more, not -1", "Not Found")
        wait_until(lambda: all(any(line.endswith(end) for line in caplog.messages) for end in ends))
    lines = {*caplog.messages}  # more than one logger may hand a line on
    [made] = (line for line in lines if line.endswith(ends[0]))
    assert "POST /v1/images/generations 200" in made
    assert sum(line.endswith(ends[1]) for line in lines) == 1
    [missing] = (line for line in lines if "thing" in line)
    assert "\n" not in missing
    assert not any("secret" in line for line in lines)


def test_where_weights_lie_is_not_told():
    hub = {"model_path": "owner/model", "lora_path": ["owner/lora", "owner/other"], "seed": 1}
    assert public(hub) == hub
    here = {
        "model_path": "/m",
        "transformer_weights_path": "/t",
        "lora_path": ["owner/lora", "/l"],
        "lora_path_2": ["/l"],
    }
    assert public({**here, "seed": 1}) == {"seed": 1}


def test_the_store_forgets_the_oldest():
    store = Store(10)
    names = [store.put(File(bytes([number]) * 4, "image/png")) for number in range(3)]
    assert [store.get(name) is not None for name in names] == [False, True, True]
    assert store.size == 8
    large = store.put(File(b"x" * 99, "image/png"))
    assert store.get(large)
    assert store.size == 99
