"""Reads YAML by the core schema of YAML 1.2, as people expect it.

PyYAML reads YAML 1.1, in which `no` is false, `010` is eight, `1:30` is ninety and `1e-05` is text.
"""

import re
from typing import Any

import yaml

from jaxspd.files import unique

TAG = "tag:yaml.org,2002:"
# The tag of each kind of plain scalar, its pattern, and the characters that it can begin with. Longer
# hexadecimal and octal numbers stay text, since nothing here takes a number of that size.
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
# YAML 1.2 ends lines at \r and \n only. PyYAML ends them at the characters below too, so code points that
# occur in no text replace them while it reads.
ENDS = str.maketrans("\x85\u2028\u2029", "\U0001fffe\U0001ffff\U0002fffe")
BACK = {stand_in: end for end, stand_in in ENDS.items()}


class Loader(yaml.SafeLoader):
    """Reads mappings, sequences and the scalars above, and nothing else of YAML."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012
    yaml_constructors: dict = {}  # noqa: RUF012

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            # A few lines of aliases can make a document of gigabytes, or an endless one.
            raise yaml.MarkedYAMLError(
                problem="aliases are not read, write out the value", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def text(self, node) -> str:
        # As in JSON, two escapes may form one character.
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
    """The value of a YAML text. Raises ValueError, in one line, for other text and for YAML not read here."""
    try:
        return yaml.load(text.translate(ENDS), Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{error.problem or error.context}, line {mark.line + 1}") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        # PyYAML raises the last four for a value that does not fit its tag.
        raise ValueError(str(error).partition("\n")[0]) from None
