"""Which model an output comes from, as its file tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxspd.errors import UsageError
from jaxspd.files import lasting_model_path, lasting_path
from jaxspd.loras import Loras
from jaxspd.request import SamplingParams

# What a user asks for.
Asked = SamplingParams | Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """What of an opened model shows in its outputs, by the names of `DiffGenerator.from_pretrained`; paths
    so that they name the same model from elsewhere too.
    """

    model_path: str | None
    revision: str | None
    transformer_weights_path: str | None
    quantize: str | None
    loras: Sequence[Loras] = ()

    @property
    def report(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that open it again."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "loras"}
        own |= dict.fromkeys(("lora_path", "lora_scale", "lora_path_2", "lora_scale_2"))
        for loras in self.loras:
            own |= loras.report
        return own

    def params(self, asked: Asked) -> SamplingParams:
        """`asked`, checked; UsageError for one that a result or a file holds and that is of another model."""
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
