"""Text encoders and VAEs: PyTorch modules of transformers and diffusers, held only while they work."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers

from jaxspd.errors import UsageError

log = logging.getLogger("jaxspd")

# Their progress bars and advice are about loading; ours are about the picture.
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what libraries raise for an unusable component folder into one line for the user."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing; the checkpoint folder is incomplete")
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each library, and each file format below it, raises its own
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{folder} cannot be loaded ({line}); download it again") from error


@contextmanager
def torch_module(module_class: type, folder: Path, dtype="auto") -> Iterator[torch.nn.Module]:
    """A pretrained module on the best device, released again at the end. Safetensors only."""
    with readable(folder):
        module, report = module_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:4])
            raise UsageError(f"{folder} lacks weights ({missing}); download it again")
    try:
        module = module.to(device())
    except torch.OutOfMemoryError:
        log.warning("%s does not fit into the GPU's memory beside the rest; it runs on the CPU", folder.name)
        module = module.to("cpu")
        torch.cuda.empty_cache()
    module.eval()
    try:
        with torch.inference_mode():
            yield module
    finally:
        module = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def open_tokenizer(folder: Path, tokenizer_class: type = transformers.AutoTokenizer):
    """The tokenizer of a component folder, of which no remote code is run."""
    with readable(folder):
        return tokenizer_class.from_pretrained(folder, local_files_only=True)


def tokenize(tokenizer_class: type, folder: Path, prompts: Sequence[str], length: int):
    """Token ids and attention mask `[B, length]` of `prompts`, padded or cut to `length`; a warning
    tells how much of a prompt is cut.
    """
    tokenizer = open_tokenizer(folder, tokenizer_class)
    for prompt in prompts:
        if (count := len(tokenizer(prompt).input_ids)) > length:
            log.warning("%s reads %d of the prompt's %d tokens", folder.name, length, count)
    return tokenizer(
        list(prompts),
        padding="max_length",
        padding_side="right",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
