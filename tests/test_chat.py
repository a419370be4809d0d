"""Chat templates: written as transformers writes them, by code that is not trusted."""

import json
import re
from datetime import datetime

import pytest
from transformers import Qwen2Tokenizer

from jaxspd.components.tokenizer import open_tokenizer
from jaxspd.errors import UsageError
from tests.tiny.common import MISTRAL_CHAT, QWEN_CHAT, change_json
from tests.vocabularies import TINY

MESSAGES = [
    {"role": "system", "content": "Describe <it> & 'more'."},
    {"role": "user", "content": "  a lake \n<|im_end|> “über” {{ 7 }} 湖 "},
]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
OPTIONS = {"add_generation_prompt": True, "enable_thinking": False}

TEMPLATES = {
    "qwen": (QWEN_CHAT, MESSAGES, OPTIONS),
    "qwen thinks": (QWEN_CHAT, MESSAGES, {"add_generation_prompt": True, "enable_thinking": True}),
    "qwen waits": (QWEN_CHAT, MESSAGES, {}),
    "mistral": (MISTRAL_CHAT, PARTS, {"add_generation_prompt": False}),
    "blocks on lines": (
        "{% for m in messages %}\n    {% if loop.first %}\nfirst\n    {% endif %}\n  - {{ m.role }}\n"
        "{% endfor %}\n\n",
        MESSAGES,
        {},
    ),
    "trimmed": ("{%- for m in messages -%}  {{- m['content'] | trim -}}  {%- endfor -%}", MESSAGES, {}),
    "json": (
        "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}"
        "{{ messages[0] | tojson(ensure_ascii=true) }}"
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
        PARTS,
        {},
    ),
    "names": ("{{ eos_token }}{{ pad_token }}{{ bos_token }}{{ image_token }}{{ unk_token }}", MESSAGES, {}),
    "given names": ("{{ eos_token }}{{ word }}", MESSAGES, {"eos_token": "<mine>", "word": "w"}),
    "what is not given": (
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
        MESSAGES,
        {},
    ),
    "generation": (
        "{% set x = 1 %}{% for m in messages %}{% generation %}\n{% set x = 2 %}{{ m.role }}{{ x }}\n"
        "{% endgeneration %}{{ x }}{% endfor %}",
        MESSAGES,
        {},
    ),
    "loops": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% break %}"
        "{% endfor %}",
        MESSAGES,
        {},
    ),
    "namespace": (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}{{ dict(a=1, **{'b': 2}) }}",
        MESSAGES,
        {},
    ),
    "macro": ("{% macro show(m) %}[{{ m.role }}]{% endmacro %}{{ show(messages[0]) }}", MESSAGES, {}),
    "methods": (
        "{{ messages[0].content.split('<')[0].upper() }}{{ messages[::-1][0]['role'] }}",
        MESSAGES,
        {},
    ),
    "html": ("{{ messages[0].content }}<&>", MESSAGES, {}),
}


@pytest.fixture
def folder(tmp_path):
    TINY["qwen"](tmp_path)
    names = {"image_token": "<image>", "eos_token": "<|im_end|>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", **names})
    )
    return tmp_path


def written(folder, template: str, messages=MESSAGES, **options) -> str:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return open_tokenizer(folder, chat=True).chat(messages, **options)


@pytest.mark.parametrize(("template", "messages", "options"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_writes_what_transformers_writes(folder, template, messages, options):
    text = written(folder, template, messages, **options)
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
    assert text


def test_the_date(folder):
    assert written(folder, "{{ strftime_now('%Y-%m') }}") == datetime.now().strftime("%Y-%m")


@pytest.mark.parametrize(
    "given",
    [
        "<{{ messages[1].role }}>",
        [{"name": "other", "template": "no"}, {"name": "default", "template": "<user>"}],
    ],
)
def test_a_template_in_the_configuration(folder, given):
    change_json(folder / "tokenizer_config.json", chat_template=given)
    assert open_tokenizer(folder, chat=True).chat(MESSAGES) == "<user>"
    # A file of its own comes first.
    assert written(folder, "mine") == "mine"


@pytest.mark.parametrize("given", [None, [], [{"name": "other", "template": "no"}]])
def test_no_template(folder, given):
    change_json(folder / "tokenizer_config.json", chat_template=given)
    with pytest.raises(UsageError, match=r"lacks a chat template \(chat_template.jinja\); download it again"):
        open_tokenizer(folder, chat=True)
    assert open_tokenizer(folder)


def refusal(folder, template: str) -> str:
    with pytest.raises(UsageError) as error:
        written(folder, template)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}", "{{ messages", "{% generation %}", "{% nothing %}"]
)
def test_a_template_that_is_no_template(folder, template):
    line = refusal(folder, template)
    assert re.search(r"has a chat template that cannot be used \(.+\); download it again", line)


def test_a_template_that_is_no_text(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(UsageError, match=r"chat_template.jinja is damaged; download it again"):
        open_tokenizer(folder, chat=True)
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", chat_template=7)
    with pytest.raises(UsageError, match=r"tokenizer_config.json holds a chat template that is not text"):
        open_tokenizer(folder, chat=True)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('users and assistants\ntake turns') }}", "users and assistants"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ nowhere.to.be.found }}", "'nowhere' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails(folder, template, why):
    assert f"cannot be used ({why}" in refusal(folder, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.sys }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% include 'chat_template.jinja' %}",
        "{{ range(10 ** 9) | length }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
    ],
)
def test_a_template_stays_in_its_box(folder, template):
    messages = json.loads(json.dumps(MESSAGES))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match="has a chat template that cannot be used"):
        open_tokenizer(folder, chat=True).chat(messages)
    assert messages == MESSAGES
