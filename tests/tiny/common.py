"""Parts of the tiny checkpoints: random parameters, and tokenizers of single characters."""

from __future__ import annotations

import json
import string
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5TokenizerFast

CLIP_LENGTH = 77
# Tests read the command's output, which must not contain libraries' progress bars.
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew: matrices scaled by fan-in, norm weights around 1, biases around 0.

    With biases of zero or norm weights of one, a converter that drops them would pass. Two of Wan's
    parameters have several axes but are not matrices. These are the VAE's norm weights ``gamma`` ``[D, 1, 1(,
    1)]``, and ``scale_shift_table`` ``[1, n, D]``, whose offsets are added to scale, shift and gate.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        leaf = name.rpartition(".")[2]
        if leaf == "scale_shift_table":
            values *= 0.3
        elif leaf == "gamma" or parameter.ndim == 1:
            values = 0.3 * values + (0.0 if leaf.endswith("bias") else 1.0)
        else:
            values /= parameter[0].numel() ** 0.5
        parameter.copy_(values)


def assert_randomised(pipeline) -> None:
    """Asserts that no parameter of ``pipeline`` has its initial value."""
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for name, parameter in module.named_parameters():
            assert not (parameter == 0).any(), name
            assert not (parameter == 1).any(), name
            assert parameter.numel() == 1 or parameter.std() > 0.01, name


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level tokenizer with one token per byte, written to ``folder`` as vocabulary files."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    # There is one merge, so that merging is tested. The end token has the largest id, as in the official
    # files.
    tokens += ["th", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)


def t5_tokenizer(folder: Path, text_length: int) -> T5TokenizerFast:
    """A Unigram tokenizer with one token per ASCII character, written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -3.0) for c in string.ascii_letters + string.digits + string.punctuation]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=text_length)


# The words before a prompt in Qwen-Image's template. Officially they are 34 tokens; here each word is one
# token.
QWEN_WORDS = (
    "system Describe user assistant Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity Ġtext "
    "Ġspatial Ġrelationships Ġof Ġobjects Ġand Ġbackground"
)


# Qwen's chat template without tools. `enable_thinking` only adds or leaves out an empty thought.
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one token per byte, padded on the left as Mistral's is."""
    special = ["<unk>", "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"]
    special += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As in Mistral's, a second begin token is added after that of the chat template.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=MISTRAL_CHAT,
    )


def qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """A byte-level tokenizer, written to ``folder``, with one token per byte and one per word of the official
    template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in QWEN_WORDS.split():
        for end in range(1, len(word)):
            merges.append(f"{word[:end]} {word[end]}")
            tokens.append(word[: end + 1])
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *dict.fromkeys(merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer.from_pretrained(folder, additional_special_tokens=special, chat_template=QWEN_CHAT)


def change_json(path: Path, **values) -> None:
    """Sets ``values`` in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
