"""`jaxspd inspect`."""

import argparse
import json


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("inspect", help="say what a file or folder of weights is")
    parser.add_argument("path", metavar="PATH", help="file in safetensors or GGUF, or a folder")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from jaxspd.inspection import inspect, table

    report = inspect(args.path)
    print(json.dumps(report) if args.json else table(report))
