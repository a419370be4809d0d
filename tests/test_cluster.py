"""Two replicas behind Ray Serve: one is killed under load, and every request is answered."""

import base64
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import jax
import numpy as np
import pytest
from PIL import Image

ray = pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')

ASK = {"prompt": "a lake", "width": 96, "height": 64, "num_inference_steps": 200}


@pytest.fixture(scope="module")
def url(toy_folder):
    from ray import serve

    from jaxspd.server.cluster import application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    workers = {"env_vars": variables, "worker_process_setup_hook": "tests.toy.register"}
    options = {"include_dashboard": False, "log_to_driver": False, "runtime_env": workers}
    ray.init(num_cpus=3, _system_config={"worker_niceness": 0}, **options)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"devices": "2", "model_path": str(toy_folder)}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_replica_dies_and_every_request_is_answered(url, toy_generator):
    def ask(seed):
        return httpx.post(f"{url}/v1/images/generations", json={**ASK, "seed": seed}, timeout=120)

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
        (mine,) = toy_generator.generate({**ASK, "seed": seed}, save_output=False, show_progress=False).frames
        picture = Image.open(io.BytesIO(base64.b64decode(answers[seed].json()["data"][0]["b64_json"])))
        # Replicas may make several at once, where that is faster.
        assert np.abs(np.asarray(picture).astype(int) - mine[0]).max() <= 1
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
