"""What the compilers of cards say of every published model: memory, fused kernels, FLOPs. No card is needed.

    pip install "jax[cuda12]" libtpu    # NVIDIA's libraries are 5 GB
    python bench/devices.py             # all of it: an hour or two. What is known is not compiled again
    python bench/devices.py --card a6000 --model FLUX.1-dev
    python bench/devices.py --card h100-8    # eight H100s that share the work of a step
    python bench/devices.py --report    # the table, from the answers that are there

XLA compiles for CUDA on any x86 machine that has the libraries, from a description of the card in `targets/`.
It compiles for TPUs with libtpu, one process at a time. Each program is compiled as jaxspd compiles it: with
abstract weights in bfloat16, the denoiser and the text encoders layer by layer, and the autoencoder whole.
Answers are kept under `results/devices/`, each until the code of its program changes. Kernels are not tuned,
since that takes a card. So memory is measured, and time is not.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from device_models import MESHES, MODELS, Published
from device_report import markdown
from machine import RESULTS, environment

CARDS = ("a6000", "h100", "v6e", "v5e", *MESHES)
WORKER, TARGETS = Path(__file__).with_name("device_worker.py"), Path(__file__).parent / "targets"
FOLDER = RESULTS / "devices"
# The environment of the compiling processes. They run nothing, and must not ask the network which TPU this
# is.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def read(file: Path) -> dict:
    """The kept answers: card -> model -> program -> answer, which holds the program's digest."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(folder: Path, answers: dict) -> None:
    """Writes the answers and their tables, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("devices.json", json.dumps(answers, indent=1, ensure_ascii=False, sort_keys=True) + "\n"),
        ("devices.md", markdown(answers)),
    ):
        partly = folder / f"{name}.partly"
        partly.write_text(text)
        partly.replace(folder / name)


def described(card: str) -> str:
    """The description of a card or a mesh, on which its programs depend."""
    kind, _, count = card.partition("-")
    file = TARGETS / f"{kind}.txtpb"
    return file.read_text() + count if file.exists() else card


def missing(known: dict, card: str, published: Published) -> dict[str, str]:
    """The digests of the programs that must be compiled, by name."""
    mesh = card in MESHES
    digests = {p.name: published.digest(p, described(card), mesh) for p in published.on(card)}
    return {name: digest for name, digest in digests.items() if known.get(name, {}).get("digest") != digest}


def ask(card: str, model: str, wanted: dict[str, str]):
    """Yields (program, answer) for each `wanted` program, as the worker finds them."""
    command = [sys.executable, str(WORKER), card, model, *wanted]
    own = environment() | ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own) as worker:
        for line in worker.stdout:
            found = json.loads(line)
            program = found.pop("program")
            yield program, {"digest": wanted[program], **found}
    if worker.returncode:
        print(f"the worker for {model} on {card} ended with {worker.returncode}", file=sys.stderr)


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", action="append", choices=CARDS, help="only this one")
    parser.add_argument("--model", action="append", choices=[m.name for m in MODELS], help="only this one")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    args = parser.parse_args(arguments)
    file, failed = folder / "devices.json", 0
    if not args.report:
        for card in args.card or CARDS:
            for model in MODELS:
                if args.model and model.name not in args.model:
                    continue
                known = read(file).get(card, {}).get(model.name, {})
                wanted = missing(known, card, Published(model))
                told = 0
                for program, found in ask(card, model.name, wanted) if wanted else ():
                    answers = read(file)  # another process may work on another card
                    answers.setdefault(card, {}).setdefault(model.name, {})[program] = found
                    write(folder, answers)
                    told += 1
                    print(card, model.name, program, found.get("error") or found["bytes"], flush=True)
                failed += told < len(wanted)
    write(folder, read(file))
    print(f"{folder / 'devices.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
