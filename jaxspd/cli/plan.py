"""`jaxspd plan`."""

import argparse
import json
import logging
from dataclasses import asdict, fields, replace
from typing import Any

from jaxspd.cli.flags import add_memory_flags, add_model_flags, add_sampling_flags
from jaxspd.errors import UsageError
from jaxspd.request import SamplingParams

log = logging.getLogger("jaxspd")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("plan", help="print the stages a request would run")
    add_model_flags(parser)
    parser.add_argument("--family", help="plan for a family as published, such as flux1 or wan")
    add_memory_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_sampling_flags(
        parser,
        only=(
            "speed",
            "scheduler",
            "num_inference_steps",
            "height",
            "width",
            "num_frames",
            "guidance_scale",
            "forecast",
            "max_sequence_length",
            "flow_shift",
            "noise_levels",
            "spectrum",
            *tuple(f.name for f in fields(SamplingParams) if f.name.startswith("progressive")),
        ),
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from jaxspd.borrowed import borrowed_spectrum
    from jaxspd.families import family_class
    from jaxspd.hub import fetch
    from jaxspd.plan_memory import memory_line, plan_memory
    from jaxspd.plan_report import plan_report, plan_table
    from jaxspd.planning import plan_request, reading
    from jaxspd.resolving import resolve
    from jaxspd.speed import speed_lines, speed_report

    if args.family and args.model_path:
        raise UsageError("give either --family or --model-path, not both")
    if args.family and args.revision:
        raise UsageError("a --family as published has no revisions; leave --revision out")
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(SamplingParams) if f.name in args}
    params = SamplingParams.from_mapping(values)
    family = family_class(args.family)() if args.family else fetch(args.model_path, (), args.revision)
    family = replace(family, streamed=bool(args.dit_cpu_offload), quantize=args.quantize)
    request = resolve(family, params)
    plan, family = plan_request(family, request), reading(family, request)
    memory = plan_memory(family, request, plan)
    if notice := borrowed_spectrum(family, request, plan):
        log.warning(notice)
    if args.json:
        asked = {"speed": speed_report(family, params.speed, plan)} if params.speed else {}
        print(json.dumps(plan_report(family, plan) | {"memory": asdict(memory)} | asked))
        return
    print(plan_table(family, plan), memory_line(memory), sep="\n")
    if params.speed:
        print(speed_lines(family, params.speed, plan))
