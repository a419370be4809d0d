"""`/v1/videos`, in the form of OpenAI's API: clients ask for a video, check its state, and fetch it."""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxspd.server.bodies import read_body, video_ask
from jaxspd.server.engine import Job
from jaxspd.server.files import encoded
from jaxspd.server.gate import error_body
from jaxspd.server.images import about, described
from jaxspd.server.limits import Refused
from jaxspd.server.service import Service

# Largest number of videos in the list. If there are more, the oldest that have ended are forgotten.
MOST = 1000
# Number of looks at each video while it is made.
LOOKS = 24


@dataclass
class Video:
    """A requested video. It has a job until it is made, then the names of its file and poster."""

    id: str
    job: Job | None
    request: Any
    created: int = field(default_factory=lambda: int(time.time()))
    completed: int | None = None
    files: tuple[str, str] | None = None
    refused: Refused | None = None

    @property
    def status(self) -> str:
        if self.files:
            return "completed"
        if self.refused:
            return "failed"
        return "in_progress" if self.job and self.job.started else "queued"

    def described(self, model: str) -> dict[str, Any]:
        """The video in the form that OpenAI's clients read."""
        request, error = self.request, None
        if self.refused:
            body = error_body(self.refused)
            error = {"code": body["code"] or body["type"], "message": body["message"]}
        return {
            "id": self.id,
            "object": "video",
            "model": model,
            "status": self.status,
            "progress": 100 if self.files else int(100 * self.job.progress) if self.job else 0,
            "created_at": self.created,
            "completed_at": self.completed,
            "expires_at": None,
            "prompt": request.prompt,
            "seconds": f"{request.num_frames / request.fps:g}",
            "size": f"{request.width}x{request.height}",
            "error": error,
            "seed": request.seed,
            "num_frames": request.num_frames,
            "fps": request.fps,
        }


class Videos:
    """The videos of one service, oldest first."""

    def __init__(self, service: Service):
        self.service = service
        self.all: OrderedDict[str, Video] = OrderedDict()
        self._tasks: set[asyncio.Task] = set()

    def add(self, request) -> Video:
        """Puts a job for a new video into the queue and returns the video."""
        job, news = self.service.submit(request, LOOKS)
        video = Video(f"video_{self.service.store.name()}", job, request)
        self.all[video.id] = video
        ended = [one.id for one in self.all.values() if one.job is None]
        for name in ended[: max(0, len(self.all) - MOST)]:
            self.drop(name)
        task = asyncio.ensure_future(self._finish(video, job, news))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return video

    async def _finish(self, video: Video, job: Job, news: asyncio.Event) -> None:
        while not job.done:
            await news.wait()
            news.clear()
        self.service.note(job)
        if job.outputs and not job.refused:
            file, poster = await asyncio.to_thread(encoded, job.outputs[0])
            assert poster is not None, "every video has one"
            if video.id in self.all:
                video.files = self.service.store.put(file), self.service.store.put(poster)
                video.completed = int(time.time())
        video.refused, video.job = job.refused, None

    def get(self, name: str) -> Video:
        """The video `name`. Raises Refused if there is none or the store has dropped its file."""
        video = self.all.get(name)
        if video and video.files and not all(map(self.service.store.get, video.files)):
            self.drop(name)
            video = None
        if video is None:
            raise Refused(404, f"there is no video {name!r}, or no longer")
        return video

    def drop(self, name: str) -> None:
        """Forgets a video and cancels its job."""
        video = self.all.pop(name)
        for file in video.files or ():
            self.service.store.drop(file)
        if video.job:
            self.service.engine.cancel(video.job)

    def stop(self) -> None:
        """Cancels the unfinished videos: after the server has stopped, nobody can fetch them."""
        for video in self.all.values():
            if video.job:
                self.service.engine.cancel(video.job)


async def create(http: HttpRequest) -> Response:
    """`POST /v1/videos`: starts a video."""
    service, videos = _of(http)
    request = service.resolve(video_ask(await read_body(http)), picture=False)
    http.scope["about"] = about(request)
    return JSONResponse(videos.add(request).described(service.name))


async def listing(http: HttpRequest) -> Response:
    """`GET /v1/videos`: at most `limit` videos after the video `after`, newest first unless `order` is
    asc.
    """
    service, videos = _of(http)
    query = http.query_params
    names = [*videos.all]
    if query.get("order", "desc") != "asc":
        names.reverse()
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 100):
        raise Refused(400, f"limit must be a whole number from 1 to 100, not {limit!r}")
    if (after := query.get("after")) is not None:
        names = names[names.index(videos.get(after).id) + 1 :]
    page = [videos.all[name].described(service.name) for name in names[: int(limit)]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return JSONResponse({"object": "list", "data": page, "has_more": len(names) > len(page), **ends})


async def retrieve(http: HttpRequest) -> Response:
    """`GET /v1/videos/{id}`: the video's state, with the newest look while it is made."""
    service, videos = _of(http)
    video = videos.get(http.path_params["id"])
    values = video.described(service.name)
    if looks := [*video.job.looks] if video.job else []:
        values["look"] = described(looks[-1])
    return JSONResponse(values)


async def content(http: HttpRequest) -> Response:
    """`GET /v1/videos/{id}/content`: the video's file, or with `variant=thumbnail` its first frame."""
    service, videos = _of(http)
    video = videos.get(http.path_params["id"])
    variant = http.query_params.get("variant", "video")
    if variant not in ("video", "thumbnail"):
        raise Refused(400, f"variant must be video or thumbnail, not {variant!r}")
    if not video.files:
        raise Refused(409, f"the video is {video.status.replace('_', ' ')}", retry=2)
    file = service.store.get(video.files[variant == "thumbnail"])
    assert file is not None, "`get` has dropped videos without their files"
    return Response(file.content, media_type=file.media_type)


async def delete(http: HttpRequest) -> Response:
    """`DELETE /v1/videos/{id}`: forgets the video."""
    _, videos = _of(http)
    name = videos.get(http.path_params["id"]).id
    videos.drop(name)
    return JSONResponse({"id": name, "object": "video.deleted", "deleted": True})


def _of(http: HttpRequest) -> tuple[Service, Videos]:
    return http.app.state.service, http.app.state.videos
