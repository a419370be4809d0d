"""The `jaxspd` command. Nothing heavy is imported before a command needs it."""

import argparse
import atexit
import gc
import logging
import sys
import traceback
from contextlib import suppress
from dataclasses import fields

from jaxspd import __version__, processes
from jaxspd.cli import calibrate, convert, generate, inspect, plan, serve
from jaxspd.cli.flags import Parser, as_flags
from jaxspd.errors import UsageError
from jaxspd.request import SamplingParams
from jaxspd.streams import flush_stdout, harden_streams

# The names of options. Messages spell them as in Python, and the command turns them into flags.
OPTIONS = {item.name for item in fields(SamplingParams)} | {*generate.MODEL_KEYS, *generate.PROCESSES}
OPTIONS |= {*serve.LIMITS, "api_key"}
TRACEBACK_HELP = "when something fails, show where in the code as well"


def build_parser() -> Parser:
    parser = Parser(
        prog="jaxspd",
        description="Text to pictures and videos in JAX, coarse to fine (spectral progressive diffusion).",
    )
    parser.add_argument("--version", action="version", version=f"jaxspd {__version__}")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK_HELP)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, serve, plan, inspect, convert, calibrate):
        command.add_parser(commands)
    for parsed in commands.choices.values():
        parsed.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=TRACEBACK_HELP
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    The code is 0 on success, 2 for an error that the user can mend, 1 for any other failure, 130 if
    interrupted and 143 if terminated. An error is one line on stderr.
    """
    harden_streams()
    # Notices are printed as they are. Libraries set up logging of their own, which would decorate them.
    log = logging.getLogger("jaxspd")
    log.handlers, log.propagate = [notices()], False
    # Libraries make millions of objects that stay to the end. Searching them for garbage again and again, and
    # once more at exit, takes seconds.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    args = argparse.Namespace(traceback=False)
    try:
        args = build_parser().parse_args(argv)
        code = args.run(args) or 0
        flush_stdout()
    except KeyboardInterrupt:
        print("jaxspd: interrupted; no partial file was left", file=sys.stderr)
        code = 130
    except Exception as error:
        processes.give_way(isinstance(error, UsageError))
        if args.traceback:
            traceback.print_exception(error)
        with suppress(OSError):
            flush_stdout()
        code, line = explained(error)
        print(f"jaxspd: {' '.join(line.split())}", file=sys.stderr)
    return processes.leave(code)


class Notice(logging.Formatter):
    """Formats a log record as its message alone, with options spelled as flags."""

    def format(self, record: logging.LogRecord) -> str:
        return as_flags(record.getMessage(), OPTIONS)


def notices() -> logging.Handler:
    """The log handler that writes notices to stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(Notice())
    return handler


def explained(error: Exception) -> tuple[int, str]:
    """The exit code and the message line for an error that ended a command."""
    if isinstance(error, UsageError):
        return 2, as_flags(str(error), OPTIONS)
    if isinstance(error, MemoryError):
        return 2, "this takes more memory than there is; ask for less, in size or in number"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a name too long, no permission
        named = f"{error.filename}: " if error.filename else ""
        return 2, f"{named}{error.strerror}"
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return 1, f"{said[:300]} (a fault of jaxspd; --traceback shows where)"
