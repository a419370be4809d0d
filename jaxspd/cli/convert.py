"""`jaxspd convert`."""

import argparse
from pathlib import Path

from jaxspd.cli.flags import add_model_flags, add_weights_flag
from jaxspd.files import user_path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "convert",
        help="write a pipeline anew, its transformer's weights in Orbax's format or in diffusers' layout",
    )
    add_model_flags(parser, required=True)
    add_weights_flag(parser)
    parser.add_argument(
        "--format",
        choices=("orbax", "safetensors"),
        default="orbax",
        help="what the transformer's weights are kept in (default: orbax)",
    )
    parser.add_argument("--output-path", required=True, type=Path, help="new pipeline folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from jaxspd.convert.pipeline_folder import check_new, convert_pipeline
    from jaxspd.hub import fetch
    from jaxspd.runtime.backend import start_backend

    output = user_path(args.output_path)
    check_new(output)
    start_backend()
    family = fetch(
        args.model_path, revision=args.revision, transformer_weights_path=args.transformer_weights_path
    )
    convert_pipeline(family, output, args.format)
    print(f"wrote {output}")
