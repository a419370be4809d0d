"""What becomes of requests that wait, take long, are given up, or are under way when the server stops."""

import http.client
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx2 as httpx

from tests.serving import GENERATIONS, SMALL, Held, serving, serving_process, wait_until


def test_a_queue_has_an_end_and_who_goes_away_is_not_waited_for(toy_generator):
    held, body = Held(toy_generator), {"prompt": "a lake", "size": "96x64", **SMALL}

    def asks(stream=False):
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
        text = json.dumps({**body, "stream": stream, "partial_images": 4})
        connection.request("POST", GENERATIONS, text, {"content-type": "application/json"})
        return connection

    with serving(held, queue=2) as served:
        first = asks(stream=True)
        assert held.reached.wait(60)
        second, third = asks(), asks()
        wait_until(lambda: served.engine.waiting == 2)
        full = served.post(body)
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")
        assert full.json()["error"]["message"].startswith("2 requests are waiting already")
        second.close()
        wait_until(lambda: served.engine.waiting == 1)
        first.close()
        wait_until(lambda: served.engine.current[0].cancelled)
        held.go.set()
        with closing(third):
            assert third.getresponse().status == 200
        wait_until(lambda: 'jobs_total{end="cancelled"} 2.0' in served.get("/metrics").text)
        text = served.get("/metrics").text
        assert 'jobs_total{end="made"} 1.0' in text
        assert 'jaxspd_requests_total{endpoint="generations",status="429"} 1.0' in text


def test_what_takes_too_long_is_given_up(toy_generator):
    held, body = Held(toy_generator), {"prompt": "a lake", "size": "96x64", **SMALL}
    with serving(held, seconds=0.3) as served, ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.post, body)
        assert held.reached.wait(60)
        time.sleep(0.3)
        held.go.set()
        late = running.result()
        assert (late.status_code, late.json()["error"]["type"]) == (504, "server_error")
        assert "took longer than 0.3 seconds" in late.json()["error"]["message"]
        # One that has begun to answer says it in the end, once.
        held.reached.clear(), held.go.clear()
        running = pool.submit(served.post, {**body, "stream": True})
        assert held.reached.wait(60)
        time.sleep(0.3)
        held.go.set()
        assert running.result().text.count("event: error") == 1


def test_a_stop_finishes_what_is_begun_and_hands_back_the_rest(toy_generator):
    held, body = Held(toy_generator), {"prompt": "a lake", "size": "96x64", **SMALL}
    with serving(held) as served, ThreadPoolExecutor(3) as pool:
        begun = pool.submit(served.post, body)
        assert held.reached.wait(60)
        waiting = pool.submit(served.post, body)
        wait_until(lambda: served.engine.waiting == 1)
        assert served.get("/health").json() == {"status": "ok", "waiting": 1}
        served.engine.stop()
        back = waiting.result()
        assert (back.status_code, back.headers["retry-after"]) == (503, "5")
        assert served.post(body).status_code == 503
        assert served.get("/health").status_code == 503
        held.go.set()
        assert begun.result().status_code == 200


def test_sigterm_lets_the_running_request_finish(toy_folder):
    with serving_process(toy_folder, "--max-steps=5000") as (process, url, _):
        # It listens to this machine's own names.
        assert httpx.get(f"{url}/health", headers={"host": "page.example"}).status_code == 421
        body = {"prompt": "a lake", "num_inference_steps": 5000, "stream": True, "partial_images": 100}
        with httpx.stream("POST", url + GENERATIONS, json=body, timeout=60) as answer:
            events = (line for line in answer.iter_lines() if line.startswith("event: "))
            assert next(events) == "event: image_generation.partial_image"
            process.send_signal(signal.SIGTERM)
            assert [*events][-1] == "event: image_generation.completed"
        assert process.wait(60) == 0
        rest = process.stderr.read()
        assert "POST /v1/images/generations 200" in rest
        assert "Traceback" not in rest
