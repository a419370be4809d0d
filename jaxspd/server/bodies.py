"""Reads the body of an HTTP request: what is to be made, and how to answer. Does not import jax."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from starlette.requests import Request as HttpRequest

from jaxspd.errors import UsageError
from jaxspd.files import parse_json, unique
from jaxspd.request import PATHS, SamplingParams, check_keys
from jaxspd.server.limits import Refused

# Largest size of a body in bytes, and the seconds within which it must arrive.
MOST_BYTES, MOST_SECONDS = 2**20, 30
# OpenAI's parameters that have no effect here, and those of which only some values are accepted.
IGNORED = ("user", "safety_identifier")
FIXED = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
}
# Parameters of these endpoints besides `SamplingParams`' fields.
IMAGE_KEYS = ("model", "n", "size", "response_format", "stream", "partial_images", *IGNORED, *FIXED)
VIDEO_KEYS = ("model", "size", "seconds")
FIELDS = {item.name: item for item in fields(SamplingParams)}
PARAMETERS = [name for name in FIELDS if name not in ("output_path", "output_file_name")]


@dataclass(frozen=True)
class Ask:
    """What a body asks for. `params` maps names of `SamplingParams`' fields to values; the other fields say
    how to answer.
    """

    params: dict[str, Any]
    model: str | None = None
    url: bool = False
    stream: bool = False
    partial_images: int = 0
    seconds: float | None = None


async def read_body(http: HttpRequest) -> dict[str, Any]:
    """The keys and values of a body in JSON or of a form. A form's values are read like the command's flags.
    Raises Refused if the body is neither, is too long or arrives too slowly.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another origin may send plain text without this server's permission, but not JSON.
    if kind not in ("application/json", "multipart/form-data"):
        raise Refused(415, "the body must be JSON, with content-type application/json")
    try:
        async with asyncio.timeout(MOST_SECONDS):
            body = await _bytes(http)
            if kind == "multipart/form-data":
                return await _form(http, body)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {MOST_SECONDS} seconds") from None
    try:
        values = parse_json(body.decode("utf-8-sig"))
    except ValueError as error:
        raise Refused(400, f"the body is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise Refused(400, 'the body must be an object, such as {"prompt": "a lake"}')
    return _spelled(values.items())


async def _bytes(http: HttpRequest) -> bytes:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the body is longer than {MOST_BYTES} bytes")
    return bytes(body)


async def _form(http: HttpRequest, body: bytes) -> dict[str, Any]:
    http._body = body  # Starlette reads the form from here, since the stream is used up
    lists: dict[str, list[Any]] = {}
    async with http.form(max_files=0, max_part_size=MOST_BYTES) as form:
        for key, value in form.multi_items():
            lists.setdefault(key, []).append(value)
    values = {}
    for key, given in lists.items():
        many = key.endswith("[]")
        if len(given) > 1 and not many:
            raise Refused(400, f"the form gives {key!r} twice")
        values[key.removesuffix("[]")] = given if many else given[0]
    return {key: _typed(key, value) for key, value in _spelled(values.items()).items()}


def _spelled(pairs) -> dict[str, Any]:
    """`pairs` as a dictionary. Keys may be spelled like flags and become Python names."""
    try:
        return unique((key.replace("-", "_"), value) for key, value in pairs)
    except ValueError as error:
        raise Refused(400, f"cannot read the body ({error})") from None


def _typed(key: str, value: Any) -> Any:
    """A form's text converted to the type of parameter `key`. Text that cannot be converted stays text and is
    refused later.
    """
    kind = FIELDS[key].metadata["kind"] if key in FIELDS else str
    if isinstance(value, list):
        return [_typed(key, one) for one in value]
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return value if key in FIELDS and FIELDS[key].metadata["many"] else kind(value)
    except ValueError:
        return value


def image_ask(body: Mapping[str, Any]) -> Ask:
    """What a body for pictures asks for. Raises UsageError, worded as in the command line, if it is not
    valid.
    """
    params, options = _split(body, IMAGE_KEYS)
    form = options.get("response_format") or "b64_json"
    if form not in ("b64_json", "url"):
        raise UsageError(f"response_format must be b64_json or url, not {form!r}")
    stream = options.get("stream") or False
    if not isinstance(stream, bool):
        raise UsageError(f"stream must be true or false, not {stream!r}")
    partial = options.get("partial_images") or 0
    if not isinstance(partial, int) or isinstance(partial, bool) or not 0 <= partial <= 1000:
        raise UsageError(f"partial_images must be a whole number from 0 to 1000, not {partial!r}")
    for key, allowed in FIXED.items():
        if options.get(key) not in (None, *allowed):
            raise UsageError(f"{key} must be {' or '.join(allowed)} here, not {options[key]!r}")
    if (count := options.get("n")) is not None:
        if "num_outputs_per_prompt" in params:
            raise UsageError("give n or num_outputs_per_prompt, not both")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UsageError(f"n must be a whole number of 1 or more, not {count!r}")
        params["num_outputs_per_prompt"] = count
    return Ask(params, options.get("model"), form == "url", stream, partial)


def video_ask(body: Mapping[str, Any]) -> Ask:
    """What a body for one video asks for. Raises UsageError as `image_ask` does."""
    if "input_reference" in body:
        raise UsageError("this server makes videos from text alone; leave input_reference out")
    params, options = _split(body, VIDEO_KEYS)
    if params.get("num_outputs_per_prompt", 1) != 1:
        raise UsageError("a request makes one video; leave num_outputs_per_prompt out")
    seconds = options.get("seconds")
    if seconds is None:
        return Ask(params, options.get("model"))
    if "num_frames" in params:
        raise UsageError("give seconds or num_frames, not both")
    try:
        seconds = float(seconds) if isinstance(seconds, str | int | float) else -1
    except (ValueError, OverflowError):
        seconds = -1
    if isinstance(options["seconds"], bool) or not 0 < seconds < 1e6:
        raise UsageError(f"seconds must be a number above 0, not {options['seconds']!r}")
    return Ask(params, options.get("model"), seconds=seconds)


def _split(body: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `SamplingParams` fields in `body`, and its options among `keys`. Raises UsageError if it has
    others. OpenAI's null counts as not given.
    """
    for name in PATHS:
        if name == "spectrum" and isinstance(body.get(name), Mapping | None):
            continue
        if name in body:
            cure = "give its amplitude and exponent" if name == "spectrum" else f"leave {name} out"
            raise UsageError(f"the server reads and writes no files for a request; {cure}")
    check_keys(body, [*PARAMETERS, *keys])
    options = {key: body[key] for key in keys if key in body}
    params = {key: value for key, value in body.items() if key not in options}
    if not isinstance(options.get("model"), str | None):
        raise UsageError(f"model must be text, not {options['model']!r}")
    prompt = params.get("prompt")
    if not isinstance(prompt, str):
        raise UsageError("a prompt is needed; say what to show" if prompt is None else "prompt must be text")
    if params.get("output_format") == "frames":
        raise UsageError("output_format must be a single file here: png, mp4 or gif")
    size = options.get("size")
    if size not in (None, "auto"):
        if params.keys() & {"height", "width"}:
            raise UsageError("give size, or height and width, not both")
        match = re.fullmatch("([0-9]{1,6})x([0-9]{1,6})", size) if isinstance(size, str) else None
        if match is None:
            raise UsageError(f"size must be WIDTHxHEIGHT, such as 1024x1024, or auto, not {size!r}")
        params["width"], params["height"] = map(int, match.groups())
    return params, options
