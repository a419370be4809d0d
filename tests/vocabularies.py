"""Small parts of real vocabularies with their real ids. They hold the pieces of one prompt and the pieces
that lead to them.

In a list of merges, the number is the id of the merged piece. In T5's pieces, the score follows the id.
Letters have the ids in `LETTERS`, as in the real vocabularies.
"""

import json
from pathlib import Path

from tests.tiny import common

# The characters that stand for bytes. Printable bytes stand for themselves; the others are numbered from 256.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = [chr(byte) for byte in SEEN] + [chr(256 + n) for n in range(256 - len(SEEN))]

CLIP_MERGES = (
    "o u 520, o r 523, i n</w> 530, s h 552, ' s</w> 568, l a 572, n o 578, k e</w> 618, ou n 636, "
    "t a 648, or e</w> 1423, ta in</w> 1908, m oun 2023, no w 2040, la ke</w> 2553, m m</w> 2848, "
    "s now 3880, moun tain</w> 3965, Ã ©</w> 4166, sh ore</w> 5928, snow y</w> 14191"
)
QWEN_MERGES = (
    "i n 258, Ġ t 259, e r 261, o n 263, Ġ a 264, r e 265, a t 266, s t 267, o r 269, Ġt h 270, "
    "Ċ Ċ 271, Ġ c 272, Ġ s 274, i t 275, a n 276, a l 278, Ġth e 279, o u 283, in g 287, e s 288, "
    "i on 290, Ġ b 293, Ġ d 294, e t 295, Ġ m 296, Ġ o 297, a s 300, c t 302, n d 303, Ġ re 312, "
    "Ġo f 315, i m 318, i l 321, Ġa nd 323, Ġ l 326, e x 327, Ġ S 328, e m 336, o l 337, a g 351, "
    "u s 355, o w 363, at ion 367, p e 375, c k 377, i st 380, as s 395, n t 406, ag e 424, ex t 427, "
    "e ct 439, k e 440, q u 446, i z 449, o re 460, r i 461, a in 466, a ck 473, it y 487, an t 517, "
    "i al 530, iz e 551, u re 552, Ġb y 553, Ġs h 557, i p 573, r ou 581, j ect 583, ' s 594, "
    "y st 597, a il 604, yst em 612, ou nt 629, a ke 726, Ġ im 732, c ri 740, ol or 789, b ject 800, "
    "ation s 804, us er 872, Ġ qu 922, Ã © 963, Ġs p 978, rou nd 1049, Ġb ack 1182, Ġre l 1351, "
    "b e 1371, Ġs ize 1379, Ġt ext 1467, et ail 1628, Ġo bject 1633, Ġc olor 1894, g round 1951, "
    "a pe 2027, h ip 2151, Ġim age 2168, cri be 3114, n ow 3328, m m 3821, Ġ Ã© 3958, "
    "Ġback ground 4004, Ġrel ations 4300, D es 4896, Ġrelations hip 5025, ant ity 5759, Ġsh ape 6083, "
    "Ġobject s 6171, Ġm ount 6470, Ġd etail 7716, s ystem 8948, Ġtext ure 10434, ist ant 11202, "
    "Ġrelationship s 11871, Ġqu antity 12194, Ġmount ain 16301, ĠS now 18901, Ġl ake 21800, "
    "at ial 22433, Ġsp atial 27979, Ġsh ore 30184, Ġdetail ing 44193, Des cribe 74785, "
    "ass istant 77091"
)
T5_PIECES = (
    "▁ 3 -2.01  , 6 -3.65  s 7 -3.90  a 9 -4.10  e 15 -4.67  t 17 -5.06  i 23 -5.47  n 29 -5.74  "
    "' 31 -5.83  o 32 -5.93  l 40 -6.14  ▁la 50 -6.36  m 51 -6.38  r 52 -6.38  re 60 -6.62  "
    "y 63 -6.65  ▁A 71 -6.92  u 76 -6.93  in 77 -6.93  h 107 -7.25  or 127 -7.45  S 134 -7.50  "
    "é 154 -7.65  k 157 -7.66  ▁S 180 -7.78  A 188 -7.85  un 202 -7.93  w 210 -7.95  ▁3 220 -7.98  "
    "3 519 -8.87  la 521 -8.88  mm 635 -9.09  5 755 -9.26  ke 1050 -9.55  ou 1063 -9.56  "
    "ak 1639 -9.93  ▁mo 2288 -10.27  ow 2381 -10.30  35 2469 -10.33  ▁35 3097 -10.54  "
    "▁mountain 4180 -10.83  sho 5630 -11.11  ▁sh 6660 -11.28  ▁lake 6957 -11.32  now 7651 -11.42  "
    "▁Snow 9394 -11.63  ▁mount 9549 -11.64  ▁shore 10433 -11.74  mount 11231 -11.81  "
    "▁mou 13102 -11.99  shore 13303 -12.01  unta 14016 -12.07  lake 16948 -12.30  ▁Sno 25566 -12.95"
)

# Tokens of Qwen2.5 and Qwen3, which differ only from 151657 on.
QWEN_ADDED = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
QWEN_THINK = {"<think>": 151667, "</think>": 151668}


def merged(merges: str) -> tuple[dict[str, int], list[str]]:
    """Pieces with their ids, and the lines of merges."""
    parts = [part.split(" ") for part in merges.split(", ")]
    return {a + b: int(number) for a, b, number in parts}, [f"{a} {b}" for a, b, _ in parts]


def write_bpe(folder: Path, pieces: dict[str, int], merges: list[str], **config) -> Path:
    """Writes `vocab.json`, `merges.txt` and `tokenizer_config.json` to a folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(pieces), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def added(tokens: dict[str, int]) -> dict[str, dict]:
    """The `added_tokens_decoder` of special tokens."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(number): {"content": text, **flags, "special": True} for text, number in tokens.items()}


def write_clip(folder: Path) -> Path:
    """Writes the tokenizer of CLIP, as FLUX.1 has it."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    pieces, merges = merged(CLIP_MERGES)
    letters = LETTERS + [letter + "</w>" for letter in LETTERS]
    pieces |= {letter: n for n, letter in enumerate(letters)} | {start: 49406, end: 49407}
    names = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    return write_bpe(folder, pieces, merges, tokenizer_class="CLIPTokenizer", **names)


def write_qwen(folder: Path, chat: str | None = None, think: bool = False) -> Path:
    """Writes the tokenizer of Qwen2.5, or that of Qwen3 with its tokens around thoughts, and the template
    `chat`.

    All added tokens are in the vocabulary, so that it need not hold the tokens before them.
    """
    pieces, merges = merged(QWEN_MERGES)
    tokens = QWEN_ADDED | (QWEN_THINK if think else {})
    pieces |= {letter: n for n, letter in enumerate(LETTERS)} | tokens
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added(tokens),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    return write_bpe(folder, pieces, merges, **config, **({"chat_template": chat} if chat else {}))


def write_t5(folder: Path) -> Path:
    """Writes the tokenizer of T5 v1.1, as FLUX.1 has it, with stand-ins for the other pieces."""
    rows = [[f"<{n}>", -100.0] for n in range(32100)]
    rows[:3] = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]
    parts = iter(T5_PIECES.split())
    for piece, number, score in zip(parts, parts, parts, strict=True):
        rows[int(number)] = [piece, float(score)]
    gaps = {f"<extra_id_{n}>": 32099 - n for n in range(100)}
    for gap, number in gaps.items():
        rows[number] = [gap, 0.0]
    tokens = [
        {"id": number, **token, "content": text}
        for text, number in ({"<pad>": 0, "</s>": 1, "<unk>": 2} | gaps).items()
        for token in added({text: number}).values()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "version": "1.0",
        "added_tokens": tokens,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": rows},
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    return folder


# Whole tokenizers of single characters, as tiny checkpoints have them.
TINY = {
    "clip": common.clip_tokenizer,
    "t5": lambda folder: common.t5_tokenizer(folder, 32),
    "qwen": common.qwen_tokenizer,
    "mistral": lambda folder: common.mistral_tokenizer(),
}


def write_tiny(folder: Path, name: str) -> Path:
    """Writes one of `TINY` into a folder with its name, as pipelines do; returns the folder."""
    TINY[name](folder / "files").save_pretrained(folder / name)
    return folder / name
