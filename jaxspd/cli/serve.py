"""`jaxspd serve`."""

import argparse
import os

from jaxspd.cli.flags import add_model_flags, add_runtime_flags
from jaxspd.cli.generate import MODEL_KEYS
from jaxspd.errors import UsageError
from jaxspd.signals import terminable

LIMITS = {
    "max_pixels": "pixels of a picture, or of all frames of a video (default: four times the model's own)",
    "max_steps": "denoising steps (default: 200)",
    "max_outputs": "pictures of one request (default: 10)",
    "max_queue": "requests that wait (default: 64)",
    "max_seconds": "seconds from a request's coming to its end (default: 600)",
    "max_stored": "bytes of finished outputs kept in memory (default: 256 MiB)",
    "max_batch_size": "requests of equal shape made together where that is faster; 1: none (default: 4)",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("serve", help="serve a model over HTTP, with a page to try it on")
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=30000, help="port; 0 takes any (default: 30000)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("JAXSPD_API_KEY"),
        help="what clients must send as a bearer token (default: $JAXSPD_API_KEY, or none)",
    )
    for name, help in LIMITS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=f"most {help}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM. Outputs in progress are then finished, and waiting requests refused."""
    if not 0 <= args.port <= 65535:
        raise UsageError(f"port must be 0 to 65535, not {args.port}")
    for name in LIMITS:
        if (given := getattr(args, name)) is not None and given < 1:
            raise UsageError(f"{name} must be 1 or more, not {given}")
    if args.api_key is not None and not (args.api_key.isascii() and args.api_key.strip()):
        raise UsageError("api_key must be of ASCII characters, and not empty")
    try:
        from jaxspd.server.run import serve
    except ModuleNotFoundError as error:
        raise UsageError(f'serving needs {error.name}; pip install "jaxspd[serve]"') from None
    given = ((name, getattr(args, name, None)) for name in MODEL_KEYS)
    model = {name: value for name, value in given if value is not None}
    limits = {name.removeprefix("max_"): getattr(args, name) for name in LIMITS}
    with terminable():
        serve(model, args.host, args.port, args.api_key, limits)
    return 0
