"""Flags that several commands have, and how messages spell options."""

import argparse
import re
from dataclasses import fields

from jaxspd.errors import UsageError
from jaxspd.request import SamplingParams

MODEL_HELP = "folder of a pipeline in diffusers' layout, or a hub id; default: the demo"
REVISION_HELP = "branch, tag or commit of a hub id (default: main)"


class Parser(argparse.ArgumentParser):
    """Raises UsageError, in one line, for a wrong flag."""

    def error(self, message: str):
        raise UsageError(message)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"say true or false, not {text!r}")
    return text.lower() == "true"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_model_flags(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds the flags that name the model."""
    help = MODEL_HELP.split(";")[0] if required else MODEL_HELP
    parser.add_argument("--model-path", required=required, help=help)
    parser.add_argument("--revision", help=REVISION_HELP)


def add_weights_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for weights in place of the model's own."""
    parser.add_argument(
        "--transformer-weights-path",
        metavar="FILE",
        help="safetensors or GGUF file with a transformer that takes the place of the pipeline's own",
    )


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for how the transformer's weights are kept."""
    parser.add_argument(
        "--dit-cpu-offload",
        type=boolean,
        metavar="true|false",
        help="keep the transformer's layers in host memory and stream them to the device (default: false)",
    )
    parser.add_argument(
        "--quantize",
        metavar="int8|fp8",
        help="round the weights of the transformer's blocks to 8 bits as they are read, and multiply them so",
    )


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the other arguments of `DiffGenerator.from_pretrained`."""
    add_weights_flag(parser)
    add_memory_flags(parser)
    parser.add_argument(
        "--text-encoder-cpu-offload",
        type=boolean,
        metavar="true|false",
        help="read text encoders layer by layer for each batch of prompts, or keep them on the device "
        "(default: kept from the second batch on, where memory allows)",
    )
    parser.add_argument(
        "--attention-backend",
        metavar="NAME",
        help="force the attention kernel: cudnn, splash (TPUs) or xla (default: the best that serves)",
    )
    for which, of in (("", ""), ("-2", " of Wan 2.2's second transformer")):
        parser.add_argument(
            f"--lora-path{which}",
            nargs="+",
            metavar="FILE",
            help=f"LoRAs to merge into the weights{of}, files or hub ids",
        )
        parser.add_argument(
            f"--lora-scale{which}",
            nargs="+",
            type=float,
            metavar="NUMBER",
            help=f"strength of each LoRA{of} (default: 1)",
        )
    devices = parser.add_argument_group("several devices (docs/many-devices.md)")
    devices.add_argument(
        "--num-gpus", type=int, metavar="N", help="devices that share the transformer's work (default: 1)"
    )
    devices.add_argument(
        "--ulysses-degree", type=int, metavar="N", help="devices that share one prediction's tokens"
    )
    devices.add_argument(
        "--enable-cfg-parallel",
        type=boolean,
        metavar="true|false",
        help="guidance's two predictions on half of the devices each (default: where their number is even)",
    )
    devices.add_argument(
        "--fsdp",
        type=boolean,
        metavar="true|false",
        help="each device keeps a part of the weights (default: where one cannot hold them)",
    )
    for name in ("tp-size", "ring-degree"):
        devices.add_argument(f"--{name}", type=int, metavar="N", help="1: what is spread is tokens")
    parser.add_argument(
        "--compilation-cache",
        type=boolean,
        metavar="true|false",
        help="keep compiled programs in the user's cache folder (default: true)",
    )


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for processes that make the same outputs together."""
    several = parser.add_argument_group("several processes (docs/many-devices.md)")
    several.add_argument(
        "--dist-init-addr",
        metavar="HOST:PORT",
        help="where the first process is reached (default: from the "
        "environment: JAX_COORDINATOR_ADDRESS, or as Slurm and others set it)",
    )
    several.add_argument("--nnodes", type=int, metavar="N", help="processes that share the work (default: 1)")
    several.add_argument("--node-rank", type=int, metavar="I", help="which of them this is, from 0")
    several.add_argument(
        "--dist-timeout", type=float, metavar="SECONDS", help="time in which all must have come (default: 60)"
    )


def add_sampling_flags(parser: Parser, only: tuple[str, ...] | None = None) -> None:
    """Adds a flag for each field of SamplingParams. A flag that is not given stays out of the namespace."""
    for item in fields(SamplingParams):
        if only is None or item.name in only:
            kind, default = item.metadata["kind"], item.default
            parser.add_argument(
                flag(item.name),
                type=boolean if kind is bool else kind,
                nargs="+" if item.metadata["many"] else None,
                metavar="true|false" if kind is bool else None,
                default=argparse.SUPPRESS,
                help=item.metadata["help"] + ("" if default is None else f" (default: {default})".lower()),
            )


def as_flags(message: str, names: set[str]) -> str:
    """`message` with the options in `names`, which it spells as in Python, spelled as flags."""
    # Any other word without "_" may be an English word.
    words = r"(?<![\w.\-/'])(?:\w+_\w+|nnodes)(?![\w/])"
    return re.sub(words, lambda m: flag(m[0]) if m[0] in names else m[0], message)
