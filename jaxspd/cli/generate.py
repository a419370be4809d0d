"""`jaxspd generate`."""

import argparse
import json
import os
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from jaxspd import processes
from jaxspd.cli.flags import (
    add_model_flags,
    add_process_flags,
    add_runtime_flags,
    add_sampling_flags,
    boolean,
)
from jaxspd.errors import UsageError
from jaxspd.request import KIND_NAMES, SamplingParams, check_keys
from jaxspd.request_files import read_config_file, read_prompts
from jaxspd.shards import share
from jaxspd.signals import exit_code, terminable
from jaxspd.speed import SETS

# Keys of a configuration file that are not sampling parameters.
MODEL_KEYS = {
    "model_path": str,
    "revision": str,
    "transformer_weights_path": str,
    "dit_cpu_offload": bool,
    "text_encoder_cpu_offload": bool,
    "attention_backend": str,
    "quantize": str,
    "lora_path": list,
    "lora_scale": list,
    "lora_path_2": list,
    "lora_scale_2": list,
    "num_gpus": int,
    "ulysses_degree": int,
    "enable_cfg_parallel": bool,
    "fsdp": bool,
    "tp_size": int,
    "ring_degree": int,
    "compilation_cache": bool,
    "skip_existing": bool,
    "shard": str,
    "preview": str,
}
# The arguments of `processes.join`. They are no keys of a configuration file, which is the same for all
# processes.
PROCESSES = ("dist_init_addr", "nnodes", "node_rank", "dist_timeout")
LORAS = {"lora_path": "lora_scale", "lora_path_2": "lora_scale_2"}
# Flags that replace other keys of a configuration file, which say the same in another way.
REPLACES = {
    "progressive_levels": ["progressive_scales"],
    "progressive_scales": ["progressive_levels"],
    "progressive_delta": ["progressive_sigmas"],
    "spectrum": ["progressive_sigmas"],
    "progressive_sigmas": ["progressive_delta", "spectrum"],
    "speed": [*SETS, "forecast", "progressive_sigmas"],
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("generate", help="make pictures or videos from prompts")
    add_model_flags(parser)
    parser.add_argument("--prompt-path", type=Path, help="text file with one prompt a line")
    parser.add_argument(
        "--config",
        type=Path,
        help="YAML or JSON file with these flags as keys; or what jaxspd wrote, to repeat it",
    )
    add_runtime_flags(parser)
    add_process_flags(parser)
    parser.add_argument(
        "--skip-existing",
        type=boolean,
        metavar="true|false",
        help="leave out outputs that the same request has written before (default: false)",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="make the I-th of every N outputs only: one of N machines' share",
    )
    parser.add_argument(
        "--preview",
        metavar="strip|gif",
        help="also write how each output grew, beside it: a PNG with looks in a row, or an animation",
    )
    parser.add_argument("--json", action="store_true", help="print a report as JSON")
    add_sampling_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Makes the outputs, and prints each one's path when it is written, then a summary.

    With `--json` it prints only the report. If an interrupt or an error stops the run, the report names the
    outputs that were written. Returns the exit code.
    """
    join_others(args)
    model, values = processes.told(partial(read_request, args))
    skip, shard = model.pop("skip_existing", False), model.pop("shard", None)
    preview, outputs = model.pop("preview", None), None
    try:
        with terminable():
            from jaxspd.generator import DiffGenerator
            from jaxspd.media.growth import Growth
            from jaxspd.progress import say

            growth = Growth(preview) if preview is not None and processes.first() else None
            generator = DiffGenerator.from_pretrained(**model)
            outputs = generator.iterate(values, skip_existing=skip, shard=shard, watch=growth)
            if growth:
                growth.check(outputs.paths)
            for output in outputs:
                wrote = [output.path]
                if growth:
                    with processes.writing:
                        wrote.append(growth.write(output))
                if not args.json:
                    say("\n".join(f"wrote {path}" for path in wrote))
                del output  # otherwise it would stay in memory beside the next one
    except (KeyboardInterrupt, UsageError) as end:
        if outputs:
            outputs.close()  # the interrupt may have come between two outputs
        if args.json and outputs and outputs.result.paths:
            print(json.dumps(outputs.result.report()))
        if isinstance(end, UsageError):
            raise
        processes.give_way(refused=True)
        done = outputs.written() if outputs else "no output is written"
        print(f"jaxspd: interrupted; {done}", file=sys.stderr)
        return exit_code(end)
    print(json.dumps(outputs.result.report()) if args.json else summary(outputs.result))
    return 0


def join_others(args: argparse.Namespace) -> None:
    """Joins the other processes that make the same outputs, if there are any.

    A process that makes a `shard` of the outputs joins others only if a flag says so.
    """
    given = {name: value for name in PROCESSES if (value := getattr(args, name)) is not None}
    known = "JAX_COORDINATOR_ADDRESS" in os.environ and args.shard is None
    if args.nnodes != 1 and (known or given.keys() - {"dist_timeout"}):
        processes.join(**given, quiet=not args.traceback)


def read_request(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments for the model and its run, and the parameters of the outputs, from flags and files.

    Raises UsageError if they are no valid request.
    """
    values = read_config_file(args.config) if args.config else {}
    known = [item.name for item in fields(SamplingParams)]
    check_keys(values, [*known, *MODEL_KEYS])
    if args.model_path is not None:
        # These belong to the file's model, which --model-path replaces.
        for name in ("revision", "transformer_weights_path", *LORAS, *LORAS.values()):
            values.pop(name, None)
    for path, scale in LORAS.items():
        if getattr(args, path) is not None:
            values.pop(scale, None)  # the strengths of the file's LoRAs
    for name, kind in MODEL_KEYS.items():
        given = getattr(args, name)
        if given is not None:
            values[name] = given
        elif kind is not list and not isinstance(values.get(name, kind()), kind):
            raise UsageError(f"{name} must be {KIND_NAMES[kind]}")
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

    share(model.get("shard"))  # checked before anything heavy is imported
    return model, values


def summary(result) -> str:
    """The time and memory that the outputs took, and how many existed already, for people to read."""
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
