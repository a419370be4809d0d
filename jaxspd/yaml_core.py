"""YAML as people expect it: by the core schema of YAML 1.2.

PyYAML reads YAML 1.1, where `no` is false, `010` is eight, `1:30` is ninety and `1e-05` is text.
"""

import re
from typing import Any

import yaml

from jaxspd.files import unique

TAG = "tag:yaml.org,2002:"
# Tag, what a plain scalar of this kind looks like, and the characters that it can begin with. Longer
# hexadecimal and octal numbers are left as text: nothing here takes a number of that size.
SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]{1,21}|0x[0-9a-fA-F]{1,16}", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
# YAML 1.2 ends lines at \r and \n only, PyYAML at these too. While it works, code points that no text
# holds stand for them.
ENDS = str.maketrans("\x85\u2028\u2029", "\U0001fffe\U0001ffff\U0002fffe")
BACK = {stand_in: end for end, stand_in in ENDS.items()}


class Loader(yaml.SafeLoader):
    """Reads mappings, sequences and the scalars above, and nothing else that YAML can say."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012
    yaml_constructors: dict = {}  # noqa: RUF012

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            # A few lines of aliases make a document of gigabytes, or one without end.
            raise yaml.MarkedYAMLError(
                problem="aliases are not read, write out the value", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def text(self, node) -> str:
        # As in JSON, two escapes may make up one character.
        text = self.construct_scalar(node).translate(BACK)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def integer(self, node) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def mapping(self, node) -> dict:
        return unique(
            (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
            for key, value in node.value
        )


for name, pattern, starts in SCALARS:
    Loader.add_implicit_resolver(TAG + name, re.compile(f"(?:{pattern})\\Z"), starts)
for name, construct in {
    "null": Loader.construct_yaml_null,
    "bool": Loader.construct_yaml_bool,
    "int": Loader.integer,
    "float": Loader.construct_yaml_float,
    "str": Loader.text,
    "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "map": Loader.mapping,
}.items():
    Loader.add_constructor(TAG + name, construct)
Loader.add_constructor(None, Loader.construct_undefined)


def parse_yaml(text: str) -> Any:
    """What a YAML text says; ValueError, in one line, for what is none or more than is read here."""
    try:
        return yaml.load(text.translate(ENDS), Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{error.problem or error.context}, line {mark.line + 1}") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        # The last four are what PyYAML makes of a value that belies its tag.
        raise ValueError(str(error).partition("\n")[0]) from None
