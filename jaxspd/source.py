"""The model that an output comes from, as its file records it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxspd.errors import UsageError
from jaxspd.files import lasting_model_path, lasting_path
from jaxspd.loras import Loras
from jaxspd.request import SamplingParams

# A request as a user gives it.
Asked = SamplingParams | Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """The arguments of `DiffGenerator.from_pretrained` that change an opened model's outputs.

    Local paths are absolute, so that they name the same model from any folder.
    """

    model_path: str | None
    revision: str | None
    transformer_weights_path: str | None
    quantize: str | None
    loras: Sequence[Loras] = ()

    @property
    def report(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that open this model again."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "loras"}
        own |= dict.fromkeys(("lora_path", "lora_scale", "lora_path_2", "lora_scale_2"))
        for loras in self.loras:
            own |= loras.report
        return own

    def params(self, asked: Asked) -> SamplingParams:
        """The checked parameters of `asked`. Raises UsageError if `asked` names another model.

        A result or a file holds the names of its model; they are removed.
        """
        if isinstance(asked, Mapping):
            asked = dict(asked)
            own = self.report
            for name in own.keys() & asked.keys():
                given = asked.pop(name)
                if name == "model_path":
                    given = lasting_model_path(given)
                elif name == "transformer_weights_path":
                    given = lasting_path(given)
                elif name in ("lora_path", "lora_path_2"):
                    given = [*Loras.of(given).paths]
                if given is not None and given != own[name]:
                    alone = name in ("model_path", "transformer_weights_path")
                    which = given if alone else f"{name} {given}"
                    raise UsageError(f"this request is for {which}; open that, or leave {name} out")
        return SamplingParams.of(asked)
