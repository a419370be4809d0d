"""`jaxspd convert`."""

import argparse
from pathlib import Path

from jaxspd.cli.flags import add_model_flags
from jaxspd.files import user_path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command's flags."""
    parser = commands.add_parser("convert", help="keep a checkpoint's weights in Orbax's format")
    add_model_flags(parser, required=True)
    parser.add_argument("--output-path", required=True, type=Path, help="new pipeline folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from jaxspd.convert.orbax_store import check_new, convert_pipeline
    from jaxspd.hub import fetch
    from jaxspd.runtime.backend import start_backend

    output = user_path(args.output_path)
    check_new(output)
    start_backend()
    convert_pipeline(fetch(args.model_path, revision=args.revision), output)
    print(f"wrote {output}")
