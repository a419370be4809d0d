"""The `jaxspd` command. Nothing heavy is imported before a command needs it."""

import argparse
import atexit
import gc
import json
import logging
import sys
import traceback
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxspd import __version__
from jaxspd.errors import UsageError
from jaxspd.files import user_path
from jaxspd.params import SamplingParams, check_keys, read_config_file, read_prompts
from jaxspd.signals import exit_code, terminable
from jaxspd.streams import flush_stdout, harden_streams

MODEL_HELP = "folder of a pipeline in diffusers' layout, or a hub id; default: the demo"
REVISION_HELP = "branch, tag or commit of a hub id (default: main)"
TRACEBACK_HELP = "when something fails, show where in the code as well"
# Keys of a configuration file that are not sampling parameters.
MODEL_KEYS = {
    "model_path": str,
    "revision": str,
    "dit_cpu_offload": bool,
    "text_encoder_cpu_offload": bool,
    "compilation_cache": bool,
    "skip_existing": bool,
}
# Flags that take the place of what a configuration file says in other words.
REPLACES = {
    "progressive_levels": ["progressive_scales"],
    "progressive_scales": ["progressive_levels"],
    "progressive_delta": ["progressive_sigmas"],
    "spectrum": ["progressive_sigmas"],
    "progressive_sigmas": ["progressive_delta", "spectrum"],
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line."""

    def error(self, message: str):
        raise UsageError(message)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"say true or false, not {text!r}")
    return text.lower() == "true"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> Parser:
    parser = Parser(
        prog="jaxspd",
        description="Text to pictures and videos in JAX, coarse to fine (spectral progressive diffusion).",
    )
    parser.add_argument("--version", action="version", version=f"jaxspd {__version__}")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK_HELP)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make pictures or videos from prompts")
    generate.add_argument("--model-path", help=MODEL_HELP)
    generate.add_argument("--revision", help=REVISION_HELP)
    generate.add_argument("--prompt-path", type=Path, help="text file with one prompt a line")
    generate.add_argument(
        "--config",
        type=Path,
        help="YAML or JSON file with these flags as keys; or what jaxspd wrote, to repeat it",
    )
    generate.add_argument(
        "--dit-cpu-offload",
        type=boolean,
        metavar="true|false",
        help="keep the transformer's layers in host memory and stream them to the device (default: false)",
    )
    generate.add_argument(
        "--text-encoder-cpu-offload",
        type=boolean,
        metavar="true|false",
        help="read text encoders layer by layer for each batch of prompts, or keep them on the device "
        "(default: kept from the second batch on, where memory allows)",
    )
    generate.add_argument(
        "--compilation-cache",
        type=boolean,
        metavar="true|false",
        help="keep compiled programs in the user's cache folder (default: true)",
    )
    generate.add_argument(
        "--skip-existing",
        type=boolean,
        metavar="true|false",
        help="leave out outputs that the same request has written before (default: false)",
    )
    generate.add_argument("--json", action="store_true", help="print a report as JSON")
    add_sampling_flags(generate)
    generate.set_defaults(run=run_generate)

    plan = commands.add_parser("plan", help="print the stages a request would run")
    plan.add_argument("--model-path", help=MODEL_HELP)
    plan.add_argument("--revision", help=REVISION_HELP)
    plan.add_argument("--family", help="plan for a family as published, such as flux1 or wan")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_sampling_flags(
        plan,
        only=(
            "num_inference_steps",
            "height",
            "width",
            "num_frames",
            "max_sequence_length",
            "flow_shift",
            "noise_levels",
            "spectrum",
            *tuple(f.name for f in fields(SamplingParams) if f.name.startswith("progressive")),
        ),
    )
    plan.set_defaults(run=run_plan)

    convert = commands.add_parser("convert", help="keep a checkpoint's weights in Orbax's format")
    convert.add_argument("--model-path", required=True, help=MODEL_HELP.split(";")[0])
    convert.add_argument("--revision", help=REVISION_HELP)
    convert.add_argument("--output-path", required=True, type=Path, help="new pipeline folder")
    convert.set_defaults(run=run_convert)

    calibrate = commands.add_parser("calibrate", help="measure the power spectrum of a model's latents")
    calibrate.add_argument("--model-path", help=MODEL_HELP)
    calibrate.add_argument("--revision", help=REVISION_HELP)
    calibrate.add_argument(
        "--images", required=True, type=Path, help="folder of pictures (of videos, for a model of videos)"
    )
    calibrate.add_argument(
        "--output-path",
        type=Path,
        default=Path("spectrum.json"),
        help="JSON file to write; a plot goes beside it (default: %(default)s)",
    )
    calibrate.add_argument("--height", type=int, help="height in pixels that files are brought to")
    calibrate.add_argument("--width", type=int, help="width in pixels that files are brought to")
    calibrate.add_argument(
        "--num-frames",
        type=int,
        help="first frames of a video to measure, 4k + 1 (default: 17); 1 measures pictures instead",
    )
    calibrate.set_defaults(run=run_calibrate)
    for command in commands.choices.values():
        command.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=TRACEBACK_HELP
        )
    return parser


def add_sampling_flags(parser: Parser, only: tuple[str, ...] | None = None) -> None:
    """A flag for each field of SamplingParams; those not given stay out of the namespace."""
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


def run_generate(args: argparse.Namespace) -> int:
    """Prints each output's path when it is written, then what all of them took; with `--json` only the
    report, which tells of the outputs written even where an interrupt or an error stops the rest.
    """
    values = read_config_file(args.config) if args.config else {}
    known = [item.name for item in fields(SamplingParams)]
    check_keys(values, [*known, *MODEL_KEYS])
    if args.model_path is not None:
        values.pop("revision", None)  # the other model's
    for name, kind in MODEL_KEYS.items():
        given = getattr(args, name)
        if given is not None:
            values[name] = given
        elif not isinstance(values.get(name, kind()), kind):
            raise UsageError(f"{name} must be {'true or false' if kind is bool else 'text'}")
    for name in REPLACES.keys() & vars(args).keys():
        for replaced in REPLACES[name]:
            values.pop(replaced, None)
    values |= {name: getattr(args, name) for name in known if name in args}
    if args.prompt_path:
        if "prompt" in args:
            raise UsageError("give either --prompt or --prompt-path, not both")
        values["prompt"] = read_prompts(args.prompt_path)
    model = {name: values.pop(name) for name in MODEL_KEYS if name in values}
    params = SamplingParams.from_mapping(values)
    if not params.prompts:
        raise UsageError("a prompt is needed: give --prompt or --prompt-path")

    skip, outputs = model.pop("skip_existing", False), None
    try:
        with terminable():
            from jaxspd.generator import DiffGenerator
            from jaxspd.progress import say

            outputs = DiffGenerator.from_pretrained(**model).iterate(values, skip_existing=skip)
            for output in outputs:
                if not args.json:
                    say(f"wrote {output.path}")
                del output  # else it would lie in memory beside the next
    except (KeyboardInterrupt, UsageError) as end:
        if outputs:
            outputs.close()  # the interrupt may have come between two outputs
        if args.json and outputs and outputs.result.paths:
            print(json.dumps(outputs.result.report()))
        if isinstance(end, UsageError):
            raise
        done = outputs.written() if outputs else "no output is written"
        print(f"jaxspd: interrupted; {done}", file=sys.stderr)
        return exit_code(end)
    print(json.dumps(outputs.result.report()) if args.json else summary(outputs.result))
    return 0


def summary(result) -> str:
    """What making the outputs took, for people, and how many there were already."""
    existed = f"outputs that existed already: {len(result.skipped)}"
    if not result.requests:
        return existed
    seconds = result.seconds
    stages = [
        f"  stage {i} ({h}×{w})  {taken:7.2f} s"
        for i, ((h, w), taken) in enumerate(
            zip((s["latent"] for s in result.plan["stages"]), seconds["denoise"], strict=True), 1
        )
    ]
    rows = [f"{name:<9}{seconds[name]:7.2f} s" for name in ("load", "encode", "compile")]
    rows.append(f"{'denoise':<9}{sum(seconds['denoise']):7.2f} s")
    rows += stages
    rows.append(f"{'decode':<9}{seconds['decode']:7.2f} s")
    memory = ", ".join(f"{size / 2**30:.2f} GiB {where}" for where, size in result.peak_memory.items())
    rows.append(f"peak memory: {memory}; programs compiled: {result.programs}")
    places = ", ".join(f"{name} ({place})" for name, place in result.resident.items())
    rows.append(f"stayed in memory: {places}")
    rows += [existed] * bool(result.skipped)
    return "\n".join(rows)


def run_plan(args: argparse.Namespace) -> None:
    from jaxspd.families import family_class
    from jaxspd.hub import fetch
    from jaxspd.planning import plan_report, plan_request, plan_table, reading

    if args.family and args.model_path:
        raise UsageError("give either --family or --model-path, not both")
    if args.family and args.revision:
        raise UsageError("a --family as published has no revisions; leave --revision out")
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(SamplingParams) if f.name in args}
    params = SamplingParams.from_mapping(values)
    family = family_class(args.family)() if args.family else fetch(args.model_path, (), args.revision)
    plan, family = plan_request(family, params), reading(family, params)
    if args.json:
        print(json.dumps(plan_report(family, plan)))
    else:
        print(plan_table(family, plan))


def run_convert(args: argparse.Namespace) -> None:
    from jaxspd.convert.orbax_store import check_new, convert_pipeline
    from jaxspd.hub import fetch
    from jaxspd.runtime.backend import start_backend

    output = user_path(args.output_path)
    check_new(output)
    start_backend()
    convert_pipeline(fetch(args.model_path, revision=args.revision), output)
    print(f"wrote {output}")


def run_calibrate(args: argparse.Namespace) -> None:
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


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0, 2 for what the user can mend and 1 for any other failure (one line on
    stderr each), 130 if interrupted, 143 if terminated.
    """
    harden_streams()
    # Notices as they are: libraries set up logging of their own, which would dress them up.
    log = logging.getLogger("jaxspd")
    log.handlers, log.propagate = [logging.lastResort], False
    # Libraries make millions of objects that stay to the end: looking through them again and again, and once
    # more at exit, takes seconds.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    args = argparse.Namespace(traceback=False)
    try:
        args = build_parser().parse_args(argv)
        code = args.run(args) or 0
        flush_stdout()
    except KeyboardInterrupt:
        print("jaxspd: interrupted; no partial file was left", file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback:
            traceback.print_exception(error)
        with suppress(OSError):
            flush_stdout()
        code, line = explained(error)
        print(f"jaxspd: {' '.join(line.split())}", file=sys.stderr)
    return code


def explained(error: Exception) -> tuple[int, str]:
    """The exit code and the line for an error that ended a command."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, MemoryError):
        return 2, "this takes more memory than there is; ask for less, in size or in number"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a name too long, no permission
        named = f"{error.filename}: " if error.filename else ""
        return 2, f"{named}{error.strerror}"
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return 1, f"{said[:300]} (a fault of jaxspd; --traceback shows where)"


if __name__ == "__main__":
    sys.exit(main())
