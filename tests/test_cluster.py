"""Two replicas behind Ray Serve: one is killed under load, and every request is answered."""

import base64
import io
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import jax
import numpy as np
import pytest
from PIL import Image

from jaxspd import DiffGenerator
from tests import tiny

ray = pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')

ASK = {"prompt": "a lake", "width": 96, "height": 64, "num_inference_steps": 20}


@pytest.fixture(scope="module")
def folder(flux1_folder, tmp_path_factory):
    folder = shutil.copytree(flux1_folder, tmp_path_factory.mktemp("ray") / "small")
    tiny.change_json(folder / "vae" / "config.json", sample_size=64)  # what each replica warms up at
    return folder


@pytest.fixture(scope="module")
def url(folder):
    from ray import serve

    from jaxspd.server.cluster import application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    options = {"include_dashboard": False, "log_to_driver": False, "runtime_env": {"env_vars": variables}}
    ray.init(num_cpus=3, _system_config={"worker_niceness": 0}, **options)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"devices": "2", "model_path": str(folder)}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_replica_dies_and_every_request_is_answered(url, folder):
    def ask(seed):
        return httpx.post(f"{url}/v1/images/generations", json={**ASK, "seed": seed}, timeout=120)

    wanted = DiffGenerator.from_pretrained(folder, compilation_cache=False)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, seed) for seed in range(24)]
        while not any(answer.done() for answer in answers):
            time.sleep(0.05)
        killed = [
            actor for actor in ray.util.list_named_actors(all_namespaces=True) if "model-1" in actor["name"]
        ]
        for actor in killed:
            ray.kill(ray.get_actor(**actor))
        assert killed
        assert not all(answer.done() for answer in answers)
        answers = [answer.result() for answer in answers]
    assert [answer.status_code for answer in answers] == [200] * 24
    for seed in (0, 23):
        (mine,) = wanted.generate({**ASK, "seed": seed}, save_output=False, show_progress=False).frames
        picture = Image.open(io.BytesIO(base64.b64decode(answers[seed].json()["data"][0]["b64_json"])))
        np.testing.assert_array_equal(np.asarray(picture), mine[0])
    # What one device keeps is found there.
    address = httpx.post(
        f"{url}/v1/images/generations", json={**ASK, "response_format": "url"}, timeout=120
    ).json()["data"][0]["url"]
    assert all(httpx.get(address).status_code == 200 for _ in range(4))
    assert httpx.get(f"{url}/v1/videos").json()["data"] == []
    with httpx.stream(
        "POST", f"{url}/v1/images/generations", json={**ASK, "stream": True, "partial_images": 3}, timeout=120
    ) as events:
        kinds = [line for line in events.iter_lines() if line.startswith("event: ")]
    assert kinds[0] == "event: image_generation.partial_image"
    assert kinds[-1] == "event: image_generation.completed"
