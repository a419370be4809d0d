"""Measures the server with the demo: throughput, latency, overhead, and a thousand requests of all kinds.

    python bench/serve.py
    python bench/serve.py --requests 200

First the command and then 1, 4 and 16 clients of a server make the same pictures. They do so in several
rounds, since other work on the machine changes from one minute to the next. `overhead` is what the server
adds to a request that runs alone: the client's time less the time in which the server makes the picture, as
a share of the denoising. `speed` is the pictures per second divided by those of the command in the same
round. `together` puts a server that makes requests of equal shape together beside one that does not.

Then 16 clients send small requests at once. Some are good, and their pictures are compared with pictures
made alone; those made together may differ from these by one grey level. Others have a client that goes away,
a wrong body, or a slow reader. Nothing may be stuck, wrong or left over, and the server's memory must not
grow. Otherwise the exit code is 1.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import httpx2 as httpx
import numpy as np
import psutil
from machine import environment, save
from PIL import Image

from jaxspd import DiffGenerator

LARGE = {"progressive_mode": "dct_rewind", "progressive_delta": 0.05}
SMALL = {"num_inference_steps": 2, "height": 64, "width": 64}
PROMPTS = [
    f"a serene mountain {place} at {time}" for place in ("lake", "meadow") for time in ("noon", "night")
]
MANY = {"num_inference_steps": 20, "height": 64, "width": 64}
CLIENTS, ROUNDS, SEEDS = (1, 4, 16), 3, 5
# Pictures that the command or a server makes in a round: of 256×256 pixels, and of 64×64.
PICTURES, SMALL_PICTURES = 8, 32
# The seconds after which a request counts as stuck.
PATIENCE = 120
# All requests share one client, because making a client reads certificates, which takes tens of milliseconds.
HTTP = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_connections=100))
# Wrong bodies, and the status that each must get.
WRONG = [
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe\x00", 400),
    (b'{"prompt": ""}', 400),
    (b'{"prompt": "a", "size": "1x1"}', 400),
    (b'{"prompt": "a", "seed": -1}', 400),
    (b'{"prompt": "a", "output_path": "/tmp"}', 400),
    (b'{"prompt": "a", "size": "4096x4096"}', 413),
    (b'{"prompt": "a", "num_inference_steps": 9999}', 422),
    (b'{"prompt": "a", "model": "none"}', 404),
    (b'{"prompt": "' + b"a" * 2**20 + b'"}', 413),
]


@contextmanager
def serving(*flags: str):
    """A context with the process of a server and its address."""
    with tempfile.NamedTemporaryFile("w+") as log:
        command = [sys.executable, "-m", "jaxspd", "serve", "--port", "0", *flags]
        process = subprocess.Popen(command, stderr=log, env=environment())
        try:
            while not (found := re.search("ready: .* at (.*)", Path(log.name).read_text())):
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.2)
            yield psutil.Process(process.pid), found[1]
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
        assert "Traceback" not in Path(log.name).read_text(), Path(log.name).read_text()


def ask(url: str, body: dict) -> tuple[float, dict]:
    """Sends `body`, and returns the client's seconds and the answer."""
    begin = time.perf_counter()
    answer = HTTP.post(f"{url}/v1/images/generations", json=body).raise_for_status()
    return time.perf_counter() - begin, answer.json()


def by_command() -> dict[str, float]:
    """The command's seconds per picture, once all is loaded and compiled, and those of the denoising."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("\n".join(PROMPTS * (PICTURES // len(PROMPTS))))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in LARGE.items()]
        command = [sys.executable, "-m", "jaxspd", "generate", "--prompt-path", str(prompts), *flags]
        process = subprocess.Popen(
            [*command, "--output-path", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        came, denoise = [], 0.0
        for line in process.stdout:
            if line.startswith("wrote "):
                came.append(time.perf_counter())
            elif line.startswith("denoise"):
                denoise = float(line.split()[1]) / PICTURES
        assert process.wait() == 0
    return {"picture": (came[-1] - came[0]) / (len(came) - 1), "denoise": denoise}


def by_clients(url: str, clients: int, count: int, how: dict) -> dict[str, float]:
    """The pictures per second and the latencies in seconds of `clients` clients that ask without a pause for
    `count` pictures.
    """
    bodies = [
        {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, **how}
        for number in range(max(count, 2 * clients))
    ]
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(lambda body: ask(url, body), bodies))
    wall, times = time.perf_counter() - begin, [seconds for seconds, _ in results]
    denoise = [sum(answer["data"][0]["seconds"]["denoise"]) for _, answer in results]
    told = {
        "pictures_per_second": len(bodies) / wall,
        "median": median(times),
        "p95": quantiles(times, n=20)[-1],
    }
    if clients == 1:
        own = [seconds - answer["seconds"]["made"] for seconds, answer in results]
        told |= {"denoise": median(denoise), "overhead": median(own) / median(denoise)}
    return told


def beside_the_command(url: str) -> tuple[dict, dict]:
    """What the command and so many clients of a server measure: medians of all rounds."""
    command, clients = [], {count: [] for count in CLIENTS}
    for _ in range(ROUNDS):
        command.append(by_command())
        for count, rounds in clients.items():
            one = by_clients(url, count, PICTURES, LARGE)
            rounds.append(one | {"speed": one["pictures_per_second"] * command[-1]["picture"]})
    return _medians(command), {str(count): _medians(rounds) for count, rounds in clients.items()}


def together(url: str, url_alone: str) -> dict:
    """How much faster 4 and 16 clients get small pictures of a server that makes them together than of one
    that does not, in each round.
    """
    for one in (url, url_alone):
        by_clients(one, 16, 2 * SMALL_PICTURES, MANY)  # compiles, and finds out what is faster
    found = {}
    for clients in CLIENTS[1:]:
        rates = []
        for turn in range(2 * ROUNDS):
            pair = {one: 0.0 for one in ((url, url_alone), (url_alone, url))[turn % 2]}
            for one in pair:
                pair[one] = by_clients(one, clients, SMALL_PICTURES, MANY)["pictures_per_second"]
            rates.append([pair[url], pair[url_alone]])
        gains = [quick / slow for quick, slow in rates]
        found[str(clients)] = {"pictures_per_second": rates, "gains": gains, "gain": median(gains)}
    return found


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


class Load:
    """Sends a request of a random kind with each call. `counts` says how many ended in which way."""

    def __init__(self, url: str, wanted: dict):
        self.url, self.wanted, self.counts = f"{url}/v1/images/generations", wanted, Counter()

    def __call__(self, number: int) -> None:
        draw = random.Random(number)
        kind = draw.choices(["good", "cancelled", "wrong", "slow"], [60, 15, 15, 10])[0]
        try:
            getattr(self, kind)(draw)
            self.counts[kind] += 1
        except Exception as error:
            self.counts[f"{kind} failed: {error!r}"[:200]] += 1

    def body(self, draw: random.Random) -> dict:
        return {"prompt": draw.choice(PROMPTS), "seed": draw.randrange(SEEDS), **SMALL}

    def check(self, body: dict, text: str) -> None:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        difference = np.abs(pixels.astype(int) - self.wanted[body["prompt"], body["seed"]]).max()
        assert difference <= 1, f"a picture is wrong by {difference}"

    def good(self, draw: random.Random) -> None:
        body = self.body(draw)
        answer = HTTP.post(self.url, json=body).raise_for_status()
        self.check(body, answer.json()["data"][0]["b64_json"])

    def wrong(self, draw: random.Random) -> None:
        body, status = draw.choice(WRONG)
        headers = {"content-type": "application/json"}
        answer = HTTP.post(self.url, content=body, headers=headers)
        assert answer.status_code == status, answer.text

    def cancelled(self, draw: random.Random) -> None:
        body = {
            **self.body(draw),
            "stream": draw.random() < 0.5,
            "partial_images": 2,
            "num_inference_steps": 50,
        }
        try:
            HTTP.post(self.url, json=body, timeout=httpx.Timeout(PATIENCE, read=draw.uniform(0.01, 0.5)))
        except httpx.ReadTimeout:
            return

    def slow(self, draw: random.Random) -> None:
        body, text = self.body(draw), ""
        asked = {**body, "stream": True, "partial_images": 2}
        with HTTP.stream("POST", self.url, json=asked) as answer:
            for piece in answer.iter_bytes(2048):
                text += piece.decode()
                time.sleep(draw.uniform(0, 0.2))
        *_, last = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        self.check(body, json.loads(last)["b64_json"])


def under_load(process: psutil.Process, url: str, requests: int) -> dict:
    """How `requests` requests ended, and the server's memory in MB after each tenth of them."""
    generator = DiffGenerator.from_pretrained()
    wanted = {
        (prompt, seed): generator.generate(
            {"prompt": prompt, "seed": seed, **SMALL}, save_output=False, show_progress=False
        )
        .frames[0][0]
        .astype(int)
        for prompt in PROMPTS
        for seed in range(SEEDS)
    }
    load, memory, begin = Load(url, wanted), [], time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        for tenth in range(10):
            list(pool.map(load, range(tenth * requests // 10, (tenth + 1) * requests // 10)))
            memory.append(round(process.memory_info().rss / 1e6, 1))
    wall = time.perf_counter() - begin
    assert HTTP.get(f"{url}/health").json() == {"status": "ok", "waiting": 0}
    # Growth counts from the second figure, since the first tenth of the requests fills caches.
    return {
        "seconds": wall,
        "counts": dict(load.counts),
        "memory_mb": memory,
        "growth": memory[-1] / memory[1] - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    requests = parser.parse_args().requests
    before = os.getloadavg()[0]
    with serving() as (process, url), serving("--max-batch-size=1") as (_, url_alone):
        for body in ({**LARGE}, {**SMALL}):
            ask(url, {"prompt": "a lake", **body})  # compiles what the measurements run
        command, clients = beside_the_command(url)
        gain = together(url, url_alone)
        load = under_load(process, url, requests)
    failed = [end for end in load["counts"] if "failed" in end]
    fine = not failed and clients["1"]["overhead"] <= 0.03 and load["growth"] <= 0.05
    measured = {"command": command, "clients": clients, "together": gain, "requests": requests, "load": load}
    measured |= {"load_average": [before, os.getloadavg()[0]], "passed": fine}
    save("serve", ("jax", "starlette", "uvicorn"), json.loads(json.dumps(measured), parse_float=_rounded))
    return not fine


def _rounded(text: str) -> float:
    return float(f"{float(text):.4g}")


if __name__ == "__main__":
    sys.exit(main())
