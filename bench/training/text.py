"""Tiny, frozen text encoders and tokenizers in FLUX.1's layout for the demo checkpoint.

The encoders keep their random weights. A caption is one of a few thousand sentences over a small vocabulary,
so the transformer needs no more than a fixed random embedding of its words.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, __version__
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from training.landscapes import describe

CLIP_LENGTH = 77
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer(captions, vocab_size=1024) -> CLIPTokenizer:
    """A byte-pair tokenizer trained on ``captions``. It has a token for every single byte."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator((caption.lower() for caption in captions), trainer)
    merges = [tuple(pair) for pair in _merges(tokenizer)]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    # The end token comes last, because pooling finds it as the largest id, as in OpenAI's vocabulary.
    vocab = {token: index for index, token in enumerate([*tokens, _BOS, _EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def _merges(tokenizer):
    for pair in json.loads(tokenizer.to_str())["model"]["merges"]:
        yield pair.split(" ") if isinstance(pair, str) else pair


def t5_tokenizer(captions, text_length=32) -> T5TokenizerFast:
    """A Unigram tokenizer with one piece per word of ``captions`` and one per ASCII character."""
    words = sorted({word for caption in captions for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -2.0) for word in words]
    known = {piece for piece, _ in pieces}
    # Characters cost more than any word, so known words stay whole.
    letters = ["▁", *(string.ascii_letters + string.digits + string.punctuation)]
    pieces += [(letter, -10.0) for letter in letters if letter not in known]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=text_length)


def write_text_components(folder, captions, hidden=128, layers=2, text_length=32, seed=0) -> None:
    """Writes tokenizer(_2) and text_encoder(_2) below ``folder``, which FluxPipeline can load.

    ``hidden`` is the width of both encoders (a multiple of 4 heads). ``text_length`` is the number of T5
    tokens. Weights are random, fixed by ``seed``, and stored as float32.
    """
    folder, captions = Path(folder), list(captions)
    clip, t5 = clip_tokenizer(captions), t5_tokenizer(captions, text_length)
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=hidden,
        d_kv=hidden // 4,
        d_ff=2 * hidden,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_model, t5_model = CLIPTextModel(clip_config), T5EncoderModel(t5_config)
    clip.save_pretrained(folder / "tokenizer")
    # The slow form is written too, because it identifies the layout.
    clip.backend_tokenizer.model.save(str(folder / "tokenizer"))
    t5.save_pretrained(folder / "tokenizer_2")
    clip_model.save_pretrained(folder / "text_encoder")
    t5_model.save_pretrained(folder / "text_encoder_2")


def write_layout(folder) -> None:
    """Writes ``model_index.json`` and the scheduler's config (FLUX.1-dev's) below ``folder``."""
    folder = Path(folder)
    FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def encode_text(folder, captions, text_length=32, batch=256):
    """The features of texts as FluxPipeline computes them, with the components below ``folder``.

    Returns float32 T5 states [M, text_length, hidden] of all positions (padding is not masked) and CLIP's
    pooled states [M, hidden].
    """
    folder, captions = Path(folder), list(captions)
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    clip_model = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    t5_model = T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval()

    def ids(tokenizer, texts, length):
        return tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    states, pooled = [], []
    for start in range(0, len(captions), batch):
        texts = captions[start : start + batch]
        states.append(t5_model(ids(t5, texts, text_length))[0].float())
        pooled.append(clip_model(ids(clip, texts, CLIP_LENGTH)).pooler_output.float())
    return torch.cat(states).numpy(), torch.cat(pooled).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--captions", type=int, default=12000, help="captions to train on")
    args = parser.parse_args()
    write_text_components(args.out, [describe(seed)[1] for seed in range(args.captions)])
    write_layout(args.out)


if __name__ == "__main__":
    main()
