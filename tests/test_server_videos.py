"""Videos, as OpenAI's own client asks for them."""

import numpy as np
import openai
import pytest

from jaxspd import DiffGenerator
from jaxspd.media.metadata import read_request
from tests.film import write_film
from tests.serving import pixels, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = write_film(tmp_path_factory.mktemp("film"), patch.setitem)
        generator = DiffGenerator.from_pretrained(folder, compilation_cache=False)
        with serving(generator, name="film") as served, served.openai() as client:
            yield generator, client.videos


VIDEO = {"num_inference_steps": 2, "num_frames": 5, "seed": 3}


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
    np.testing.assert_array_equal(pixels(poster), pixels((tmp_path / "b.poster.png").read_bytes()))
    assert [one.id for one in client.list()] == [video.id]
    assert client.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.retrieve(video.id)
    assert list(client.list()) == []


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


def test_a_video_that_is_deleted_is_made_no_further(videos):
    _, client = videos
    long = client.create(prompt="a boat", size="64x64", extra_body={**VIDEO, "num_inference_steps": 200})
    short = client.create(prompt="a boat", size="64x64", seconds="0.5", extra_body={"num_inference_steps": 2})
    assert (long.status in ("queued", "in_progress"), short.seconds) == (True, "0.625")
    with pytest.raises(openai.ConflictError, match="the video is"):
        client.download_content(long.id)
    assert client.delete(long.id).deleted
    assert client.poll(short.id, poll_interval_ms=50).status == "completed"
