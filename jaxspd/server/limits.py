"""The limits of a request, and the exception for refusals. Does not import jax."""

from dataclasses import dataclass

from jaxspd.request import Request


class Refused(Exception):
    """A refusal with an HTTP `status` and a reason. `retry` is the number of seconds after which asking again
    may help, else None. `code` is OpenAI's name for the error, if it has one.
    """

    def __init__(self, status: int, reason: str, *, retry: int | None = None, code: str | None = None):
        super().__init__(reason)
        self.status, self.retry, self.code = status, retry, code


@dataclass(frozen=True)
class Limits:
    """The limits of requests.

    `pixels` of one output, over all its frames; denoising `steps`; `outputs` of one request; requests that
    wait in the `queue`; `seconds` from a request's arrival to its end; bytes of `stored` outputs; requests in
    one batch, `batch_size`.
    """

    pixels: int
    steps: int = 200
    outputs: int = 10
    queue: int = 64
    seconds: float = 600
    stored: int = 256 * 2**20
    batch_size: int = 4

    @classmethod
    def of(cls, family, **given: float | None) -> "Limits":
        """The limits `given`, and defaults for the others. The default of `pixels` is four times the size
        that `family` makes by default.
        """
        height, width = family.default_size
        default = {"pixels": 4 * height * width * family.default_frames}
        return cls(**default | {name: value for name, value in given.items() if value is not None})

    def check(self, request: Request) -> None:
        """Raises Refused, with status 413 or 422, if a request exceeds a limit."""
        pixels = request.height * request.width * request.num_frames
        if pixels > self.pixels:
            frames = f" in {request.num_frames} frames" if request.num_frames > 1 else ""
            raise Refused(
                413,
                f"{request.width}×{request.height} pixels{frames} are more than this server makes, "
                f"{self.pixels} in all; use a smaller size{' or fewer frames' if frames else ''}",
            )
        for what, asked, most in (
            ("num_inference_steps", request.num_inference_steps, self.steps),
            ("n", request.num_outputs_per_prompt, self.outputs),
        ):
            if asked > most:
                raise Refused(422, f"{what} must be {most} or less on this server, not {asked}")
