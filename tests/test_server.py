"""The server, as OpenAI's own client and others call it."""

import base64
import http.client
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx2 as httpx
import jax
import numpy as np
import openai
import pytest
from PIL import Image

from jaxspd import DiffGenerator, SamplingParams, UsageError
from jaxspd.cli import main
from jaxspd.media.metadata import read_request
from jaxspd.server.files import public
from jaxspd.server.store import File, Store
from tests import tiny
from tests.serving import Held, serving

SMALL = {"num_inference_steps": 4, "seed": 5}
GROW = {"progressive_mode": "dct_rewind", "progressive_sigmas": [0.6]}
OPTIONS = {"save_output": False, "show_progress": False}


@pytest.fixture(scope="module")
def generator(flux1_folder):
    return DiffGenerator.from_pretrained(flux1_folder, compilation_cache=False)


@pytest.fixture(scope="module")
def server(generator):
    with serving(generator, pixels=64 * 128, steps=50, outputs=3) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def post(served, body, timeout=60, **headers):
    return httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=timeout, headers=headers)


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "jaxspd")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist; this server has 'tiny'"):
        client.models.retrieve("other/model")


def test_pictures_are_those_of_the_command(client, generator, tmp_path):
    request = {"prompt": "a lake", **SMALL, **GROW}
    answer = client.images.generate(prompt="a lake", n=2, size="96x64", extra_body={**SMALL, **GROW})
    mine = generator.generate({**request, "height": 64, "width": 96, "num_outputs_per_prompt": 2}, **OPTIONS)
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
        again = generator.generate(carried, **OPTIONS)
        np.testing.assert_array_equal(again.frames[0], frames)


def test_an_address_gives_the_same_picture(client, server):
    ask = {"prompt": "a lake", "size": "96x64", "extra_body": SMALL, "model": "tiny"}
    (here,) = client.images.generate(**ask).data
    (there,) = client.images.generate(**ask, response_format="url").data
    fetched = httpx.get(there.url)
    assert fetched.headers["content-type"] == "image/png"
    assert fetched.content == base64.b64decode(here.b64_json)
    assert httpx.get(f"{server.url}/images/nothing.png").status_code == 404


def test_looks_come_as_the_picture_grows(client):
    ask = {"prompt": "a lake", "size": "96x64", "extra_body": {**SMALL, **GROW, "num_inference_steps": 12}}
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


BAD = [
    ({}, "a prompt is needed; say what to show"),
    ({"prompt": " "}, "the prompt is empty; say what to show"),
    ({"prompt": ["a", "b"]}, "prompt must be text"),
    ({"prompt": 7}, "prompt must be text"),
    ({"n": 0}, "n must be a whole number of 1 or more, not 0"),
    ({"n": True}, "n must be a whole number of 1 or more, not True"),
    ({"n": 2, "num_outputs_per_prompt": 2}, "give n or num_outputs_per_prompt, not both"),
    ({"size": "64"}, "size must be WIDTHxHEIGHT, such as 1024x1024, or auto, not '64'"),
    ({"size": "64x6٤"}, "size must be WIDTHxHEIGHT"),
    ({"size": 64}, "size must be WIDTHxHEIGHT"),
    ({"size": "64x64", "width": 64}, "give size, or height and width, not both"),
    ({"response_format": "png"}, "response_format must be b64_json or url, not 'png'"),
    ({"stream": "yes"}, "stream must be true or false, not 'yes'"),
    ({"partial_images": -1}, "partial_images must be a whole number from 0 to 1000, not -1"),
    ({"quality": "hd"}, "quality must be auto or standard here, not 'hd'"),
    ({"model": 3}, "model must be text, not 3"),
    ({"progresive_delta": 0.1}, "unknown parameter 'progresive_delta'; did you mean 'progressive_delta'?"),
    ({"output_format": "frames"}, "output_format must be a single file here"),
    ({"output_format": "mp4"}, "a single frame is a picture; write png instead of mp4"),
    ({"num_frames": 5}, "FLUX.1 makes pictures; leave num_frames and fps out"),
    ({"height": 10, "width": 10}, "needs height and width in multiples of 16"),
    # Nothing of this machine is read or written.
    ({"output_path": "/tmp"}, "reads and writes no files for a request; leave output_path out"),
    ({"output-file-name": "a"}, "reads and writes no files for a request; leave output_file_name out"),
    ({"spectrum": "/etc/passwd"}, "reads and writes no files for a request; give its amplitude and exponent"),
    ({"model_path": "/etc"}, "unknown parameter 'model_path'"),
    ({"config": "/etc/passwd"}, "unknown parameter 'config'"),
    ({"prompt_path": "/etc/passwd"}, "unknown parameter 'prompt_path'"),
]


@pytest.mark.parametrize(("body", "says"), BAD)
def test_what_cannot_be_meant_is_refused(server, body, says):
    sized = {} if "width" in body else {"size": "64x64"}
    answer = post(server, {"prompt": "a lake", **sized, **body} if body else body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [{"seed": "5"}, {"seed": -1}, {"guidance_scale": "much"}, {"progressive_delta": True}]
)
def test_parameters_are_refused_in_the_commands_words(server, body):
    with pytest.raises(UsageError) as refused:
        SamplingParams.from_mapping({"prompt": "a lake", **body})
    assert post(server, {"prompt": "a lake", **body}).json()["error"]["message"] == str(refused.value)


@pytest.mark.parametrize(
    ("content", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "the body is not JSON"),
        (b"[1]", "application/json", 400, "the body must be an object"),
        (b"\xff\xfe", "application/json", 400, "the body is not JSON"),
        (b'{"seed": NaN}', "application/json", 400, "NaN is no number in JSON"),
        (b'{"seed": 1, "seed": 2}', "application/json", 400, "gives 'seed' twice"),
        (b'{"output-format": "png", "output_format": "png"}', "application/json", 400, "twice"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b" " * (2**20 + 1), "application/json", 413, "longer than 1048576 bytes"),
        (b'{"prompt": "a"}', "text/plain", 415, "the body must be JSON"),
        (b"prompt", "multipart/form-data", 400, ""),
        (b"prompt", "multipart/form-data; boundary=b", 400, "Invalid multipart data"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 400, "a prompt is needed"),
    ],
)
def test_bodies_that_are_none(server, content, kind, status, says):
    answer = httpx.post(
        f"{server.url}/v1/images/generations", content=content, headers={"content-type": kind}
    )
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"size": "128x128"}, 413, "128×128 pixels are more than this server makes, 8192 in all"),
        ({"num_inference_steps": 51}, 422, "num_inference_steps must be 50 or less on this server, not 51"),
        ({"n": 4}, 422, "n must be 3 or less on this server, not 4"),
        ({"model": "other"}, 404, "the model 'other' does not exist"),
    ],
)
def test_more_than_the_server_gives_is_refused(server, body, status, says):
    answer = post(server, {"prompt": "a lake", "size": "64x64", **body})
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True)


def test_other_addresses_and_methods(server):
    assert httpx.get(f"{server.url}/v1/nothing").status_code == 404
    assert httpx.get(f"{server.url}/v1/images/generations").status_code == 405
    assert httpx.get(f"{server.url}/page/index.html").status_code == 200
    assert httpx.get(f"{server.url}/page/%2e%2e/app.py").status_code == 404
    error = httpx.post(f"{server.url}/v1/videos", json={"prompt": "a"}).json()["error"]
    assert "FLUX.1 makes pictures" in error["message"]


def test_a_queue_has_an_end_and_who_goes_away_is_not_waited_for(generator):
    held, body = Held(generator), {"prompt": "a lake", "size": "96x64", **SMALL}

    def asks(stream=False):
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
        text = json.dumps({**body, "stream": stream, "partial_images": 4})
        connection.request("POST", "/v1/images/generations", text, {"content-type": "application/json"})
        return connection

    with serving(held, queue=2) as served:
        first = asks(stream=True)
        assert held.reached.wait(60)
        second, third = asks(), asks()
        wait_until(lambda: served.engine.waiting == 2)
        full = post(served, body)
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")
        assert full.json()["error"]["message"].startswith("2 requests are waiting already")
        second.close()
        wait_until(lambda: served.engine.waiting == 1)
        first.close()
        held.go.set()
        with closing(third):
            assert third.getresponse().status == 200
        wait_until(lambda: 'jobs_total{end="cancelled"} 2.0' in httpx.get(f"{served.url}/metrics").text)
        text = httpx.get(f"{served.url}/metrics").text
        assert 'jobs_total{end="made"} 1.0' in text
        assert 'jaxspd_requests_total{endpoint="generations",status="429"} 1.0' in text


def test_what_takes_too_long_is_given_up(generator):
    held, body = Held(generator), {"prompt": "a lake", "size": "96x64", **SMALL}
    with serving(held, seconds=0.3) as served, ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, served, body)
        assert held.reached.wait(60)
        time.sleep(0.3)
        held.go.set()
        late = running.result()
        assert (late.status_code, late.json()["error"]["type"]) == (504, "server_error")
        assert "took longer than 0.3 seconds" in late.json()["error"]["message"]
        # One that has begun to answer says it in the end, once.
        held.reached.clear(), held.go.clear()
        running = pool.submit(post, served, {**body, "stream": True})
        assert held.reached.wait(60)
        time.sleep(0.3)
        held.go.set()
        assert running.result().text.count("event: error") == 1


def test_a_stop_finishes_what_is_begun_and_hands_back_the_rest(generator):
    held, body = Held(generator), {"prompt": "a lake", "size": "96x64", **SMALL}
    with serving(held) as served, ThreadPoolExecutor(3) as pool:
        begun = pool.submit(post, served, body)
        assert held.reached.wait(60)
        waiting = pool.submit(post, served, body)
        wait_until(lambda: served.engine.waiting == 1)
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "waiting": 1}
        served.engine.stop()
        back = waiting.result()
        assert (back.status_code, back.headers["retry-after"]) == (503, "5")
        assert post(served, body).status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 503
        held.go.set()
        assert begun.result().status_code == 200


def test_a_key_is_wanted_where_there_is_one(generator):
    with serving(generator, api_key="secret") as served:
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert httpx.get(f"{served.url}/").status_code == 200
        for path in ("/v1/models", "/metrics", "/v1/videos"):
            assert httpx.get(served.url + path).status_code == 401
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="--api-key"):
                client.models.list()
            assert client.with_options(api_key="secret").models.list().data[0].id == "tiny"


def test_each_request_is_a_line_of_log(server, caplog):
    with caplog.at_level(logging.INFO, "jaxspd.server"):
        logging.getLogger("jaxspd.server").propagate = logging.getLogger("jaxspd").propagate = True
        post(server, {"prompt": "a secret lake", "size": "96x64", **SMALL})
        post(server, {"prompt": "a\nlake", "seed": -1})
        httpx.get(f"{server.url}/no%0Athing")
    # More than one logger may hand a line on, and an earlier test's request may just have ended.
    lines = {record.getMessage() for record in caplog.records}
    [made] = (line for line in lines if line.endswith("1 of 96×64 steps 4 fullres seed 5"))
    assert "POST /v1/images/generations 200" in made
    assert sum(line.endswith("· seed must be 0 or more, not -1") for line in lines) == 1
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


@pytest.fixture(scope="module")
def videos(wan_folder):
    generator = DiffGenerator.from_pretrained(wan_folder, compilation_cache=False)
    with (
        serving(generator, name="wan") as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield generator, client.videos


VIDEO = {"num_inference_steps": 2, "num_frames": 5, "seed": 3}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_video_is_asked_for_looked_after_and_fetched(videos, tmp_path):
    generator, client = videos
    video = client.create_and_poll(prompt="a boat", size="64x64", extra_body=VIDEO, poll_interval_ms=50)
    assert (video.status, video.progress, video.size) == ("completed", 100, "64x64")
    path = tmp_path / "a.mp4"
    path.write_bytes(client.download_content(video.id).read())
    request = {"prompt": "a boat", **VIDEO, "height": 64, "width": 64, "output_path": tmp_path}
    (mine,) = generator.generate({**request, "output_file_name": "b.mp4"}, show_progress=False).paths
    ours = read_request(mine)
    del ours["model_path"]
    assert read_request(path) == ours
    poster = client.download_content(video.id, variant="thumbnail").read()
    np.testing.assert_array_equal(pixels(poster), np.asarray(Image.open(tmp_path / "b.poster.png")))
    assert [one.id for one in client.list()] == [video.id]
    assert client.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.retrieve(video.id)
    assert list(client.list()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_video(videos):
    _, client = videos
    for body, says in (
        ({"seed": "many"}, "seed must be a whole number, not 'many'"),
        ({"num_frames": 1}, "ask for more frames, or for a picture"),
        ({"num_frames": 6}, "4k . 1 frames"),
        ({"seconds": "-1"}, "seconds must be a number above 0"),
        ({"input_reference": "x"}, "from text alone"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.create(prompt="a boat", extra_body=body)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_video_that_is_deleted_is_made_no_further(videos):
    _, client = videos
    long = client.create(prompt="a boat", size="64x64", extra_body={**VIDEO, "num_inference_steps": 200})
    short = client.create(
        prompt="a boat", size="64x64", seconds="0.25", extra_body={"num_inference_steps": 2}
    )
    assert (long.status in ("queued", "in_progress"), short.seconds) == (True, "0.3125")
    with pytest.raises(openai.ConflictError, match="the video is"):
        client.download_content(long.id)
    assert client.delete(long.id).deleted
    assert client.poll(short.id, poll_interval_ms=50).status == "completed"


def test_addresses_that_cannot_be_had(server, capsys):
    port = server.url.rpartition(":")[2]
    assert main(["serve", "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1, port {port} (Address already in use)" in capsys.readouterr().err
    assert main(["serve", "--port", "70000"]) == 2
    assert main(["serve", "--max-queue", "0"]) == 2
    assert "--max-queue must be 1 or more, not 0" in capsys.readouterr().err


def test_sigterm_lets_the_running_request_finish(flux1_folder, tmp_path):
    folder = shutil.copytree(flux1_folder, tmp_path / "small")
    tiny.change_json(folder / "vae" / "config.json", sample_size=64)  # what the server warms up at
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxspd", "serve", "--model-path", str(folder), "--port=0"],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        },
    )
    try:
        lines = iter(process.stderr.readline, "")
        ready = next(line for line in lines if line.startswith("ready: "))
        body = {"prompt": "a lake", "size": "64x64", "num_inference_steps": 200, "stream": True}
        with httpx.stream(
            "POST",
            ready.split()[-1] + "/v1/images/generations",
            json={**body, "partial_images": 100},
            timeout=60,
        ) as answer:
            events = (line for line in answer.iter_lines() if line.startswith("event: "))
            assert next(events) == "event: image_generation.partial_image"
            process.send_signal(signal.SIGTERM)
            assert [*events][-1] == "event: image_generation.completed"
        assert process.wait(60) == 0
        rest = process.stderr.read()
        assert "POST /v1/images/generations 200" in rest
        assert "Traceback" not in rest
    finally:
        process.kill()
