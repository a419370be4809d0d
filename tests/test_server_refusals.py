"""What the server refuses, with which status, and in which words."""

import httpx2 as httpx
import openai
import pytest

from jaxspd import SamplingParams, UsageError
from jaxspd.cli import main
from tests.serving import GENERATIONS, serving


@pytest.fixture(scope="module")
def server(toy_generator):
    with serving(toy_generator, pixels=64 * 128, steps=50, outputs=3) as served:
        yield served


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
    ({"num_frames": 5}, "Toy makes pictures; leave num_frames and fps out"),
    ({"height": 9, "width": 9}, "needs height and width in multiples of 2"),
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
    answer = server.post({"prompt": "a lake", **sized, **body} if body else body)
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
    assert server.post({"prompt": "a lake", **body}).json()["error"]["message"] == str(refused.value)


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
    answer = httpx.post(server.url + GENERATIONS, content=content, headers={"content-type": kind})
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
    answer = server.post({"prompt": "a lake", "size": "64x64", **body})
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True)


def test_other_addresses_and_methods(server):
    assert server.get("/v1/nothing").status_code == 404
    wrong = server.get("/v1/images/generations")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert server.get("/page/index.html").status_code == 200
    assert server.get("/page/%2e%2e/app.py").status_code == 404
    error = server.post({"prompt": "a"}, path="/v1/videos").json()["error"]
    assert "Toy makes pictures" in error["message"]


def test_a_key_is_wanted_where_there_is_one(toy_generator):
    with serving(toy_generator, api_key="secret") as served:
        assert served.get("/health").status_code == 200
        assert served.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/v1/videos"):
            assert served.get(path).status_code == 401
        with served.openai(api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="--api-key"):
                client.models.list()
            assert client.with_options(api_key="secret").models.list().data[0].id == "tiny"


@pytest.fixture(scope="module")
def own(toy_generator):
    """A server that is told its name, as one is that only its machine reaches."""
    with serving(toy_generator, hosts={"drawing.local"}) as served:
        yield served


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8080", 200),
        ("[::1]:30000", 200),
        ("Drawing.local:1", 200),
        ("page.example", 421),
        ("127.0.0.1.page.example:30000", 421),
        ("192.168.0.7", 421),
        ("[", 421),
    ],
)
def test_a_strange_name_for_this_machine_is_refused(own, server, host, status):
    answer = httpx.get(f"{own.url}/v1/models", headers={"host": host})
    assert answer.status_code == status
    if status == 421:
        assert "this server is drawing.local, localhost, not" in answer.json()["error"]["message"]
    # One that others reach is not told all its names.
    assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),
        ({"origin": "SELF"}, 400),
        ({"origin": "https://page.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"sec-fetch-site": "same-origin"}, 400),
        ({"sec-fetch-site": "none"}, 400),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "SELF"}, 403),
    ],
)
def test_pages_of_other_origins_ask_for_nothing(server, headers, status):
    headers = {name: server.url if value == "SELF" else value for name, value in headers.items()}
    assert server.post({}, **headers).status_code == status
    # Browsers send a form to any origin.
    form = httpx.post(f"{server.url}/v1/videos", files={"prompt": (None, "a")}, headers=headers)
    assert form.status_code == status
    assert httpx.get(server.url, headers=headers).status_code == 200


def test_addresses_that_cannot_be_had(server, capsys):
    port = server.url.rpartition(":")[2]
    assert main(["serve", "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1, port {port} (Address already in use)" in capsys.readouterr().err
    assert main(["serve", "--port", "70000"]) == 2
    assert main(["serve", "--max-queue", "0"]) == 2
    assert "--max-queue must be 1 or more, not 0" in capsys.readouterr().err
