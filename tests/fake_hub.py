"""A hub on 127.0.0.1 that answers huggingface_hub's requests and records them."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Commit:
    """The files of a repository at one time."""

    files: dict[str, bytes]

    @cached_property
    def sha(self) -> str:
        digest = hashlib.sha1()
        for name in sorted(self.files):
            digest.update(name.encode() + b"\0" + self.files[name])
        return digest.hexdigest()


@dataclass
class Hub:
    """Repositories by id, each with its branches.

    `refusals` are answers with a status, an error code and a message: by id for all requests, or by id with
    "/resolve" appended for requests of files.
    """

    repositories: dict[str, dict[str, Commit]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)  # "revision/path" of each file that was sent

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """Closes the server, as if the network broke."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, model: str, source: Path | dict[str, bytes], branch: str = "main", **more: bytes) -> Commit:
        """Commits a folder or files, and further files by path, to `branch` of the repository `model`."""
        if isinstance(source, Path):
            paths = [path for path in source.rglob("*") if path.is_file()]
            source = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
        commit = Commit({**source, **more})
        self.repositories.setdefault(model, {})[branch] = commit
        return commit

    def names(self) -> set[str]:
        """The files that were sent, without their revisions."""
        return {name.partition("/")[2] for name in self.fetched}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not match and not file:
            return refuse(request, 404, "", "Not found")
        model = (match or file)[1]
        revision = (match[3] if match else file[2]) or "main"
        if refusal := self.refusals.get(model if match else f"{model}/resolve") or self.refusals.get(model):
            return refuse(request, *refusal)
        if model not in self.repositories:
            return refuse(request, 401, "RepoNotFound", "Repository not found")
        branches = self.repositories[model]
        commits = branches | {commit.sha: commit for commit in branches.values()}
        if revision not in commits:
            return refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit = commits[revision]
        if match:
            body = listing(commit) if match[2] == "tree" else information(model, commit)
            return send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        name = file[3]
        headers = {"X-Repo-Commit": commit.sha}
        if name not in commit.files:
            return refuse(request, 404, "EntryNotFound", "Entry not found", headers)
        content = commit.files[name]
        if request.command == "GET":
            self.fetched.append(f"{revision}/{name}")
        return send(request, 200, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})


def information(model: str, commit: Commit) -> dict:
    siblings = [{"rfilename": name} for name in commit.files]
    return {"id": model, "modelId": model, "sha": commit.sha, "private": False, "siblings": siblings}


def listing(commit: Commit) -> list[dict]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in commit.files.items()
    ]


def refuse(request, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
    about = {"X-Error-Code": code, "X-Error-Message": message, "X-Request-Id": "Root=1-65"}
    send(request, status, b"", (headers or {}) | about)


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)
