"""`jaxspd calibrate`."""

import argparse
from pathlib import Path

from jaxspd.cli.flags import add_model_flags


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("calibrate", help="measure the power spectrum of a model's latents")
    add_model_flags(parser)
    parser.add_argument(
        "--images", required=True, type=Path, help="folder of pictures (of videos, for a model of videos)"
    )
    parser.add_argument(
        "--output-path",
        type=Path,
        default=Path("spectrum.json"),
        help="JSON file to write; a plot goes beside it (default: %(default)s)",
    )
    parser.add_argument("--height", type=int, help="height in pixels that files are brought to")
    parser.add_argument("--width", type=int, help="width in pixels that files are brought to")
    parser.add_argument(
        "--num-frames",
        type=int,
        help="first frames of a video to measure, 4k + 1 (default: 17); 1 measures pictures instead",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from jaxspd.calibrate import calibrate

    result = calibrate(
        args.model_path,
        images=args.images,
        output_path=args.output_path,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        revision=args.revision,
    )
    print(result.summary())
