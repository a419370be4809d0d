"""What PyTorch loaded stays in memory between uses, where there is room: the one place that decides.

A `Residency` is in force inside `with residency:`; `torch_parts` asks it before it reads anything from disk,
and offers it what it has read. Outside, nothing is kept.
"""

import weakref
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax

from jaxspd.runtime.memory import host_memory

# This share of the host's memory stays free for activations, for decoding, and for files that are read.
HOST_FREE = 1 / 4
# This share of what JAX leaves of the GPU's memory stays free for PyTorch's own activations.
DEVICE_FREE = 1 / 2

_current: ContextVar["Residency | None"] = ContextVar("residency", default=None)


def current() -> "Residency | None":
    """The residency in force here."""
    return _current.get()


class Residency:
    """Modules and tokenizers of one generator. `to_come` is how many bytes of host memory are spoken for by
    weights that are still being read.
    """

    def __init__(self):
        self.to_come = 0
        self._modules: dict[tuple[type, Path, str], Any] = {}
        self._small: dict[Hashable, Any] = {}
        # Modules refer to themselves in circles, so that their weights would outlive the generator.
        weakref.finalize(self, _drop, self._modules).atexit = False

    def __enter__(self) -> "Residency":
        self._token = _current.set(self)
        return self

    def __exit__(self, *_) -> None:
        _current.reset(self._token)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with `key`: for what is small, such as tokenizers."""
        if key not in self._small:
            self._small[key] = make()
        return self._small[key]

    def take(self, key: tuple[type, Path, str]) -> Any | None:
        """The module kept as `key`, wherever it lies. It is the caller's until `keep` is called again."""
        return self._modules.pop(key, None)

    def keep(self, key: tuple[type, Path, str], module: Any) -> bool:
        """Whether `module` stays in memory: on its device, or else on the host."""
        size = _size(module)
        if _on_device(module):
            held = sum(_size(other) for other in self._modules.values() if _on_device(other))
            if held + size > device_room():
                if not self._host_has_room(size):
                    return False
                module.to("cpu")
        elif not self._host_has_room(0):  # `module` is there already
            return False
        self._modules[key] = module
        return True

    def leave_device(self) -> None:
        """Makes room on the device: modules go to the host, or out of memory."""
        for key, module in [*self._modules.items()]:
            if _on_device(module):
                if self._host_has_room(_size(module)):
                    module.to("cpu")
                else:
                    _drop({key: self._modules.pop(key)})

    def places(self) -> dict[str, str]:
        """Component -> "host" or "device", for each module in memory."""
        return {key[1].name: "device" if _on_device(m) else "host" for key, m in self._modules.items()}

    def _host_has_room(self, size: int) -> bool:
        available, total = host_memory()
        return available - size - self.to_come >= HOST_FREE * total


def device_room() -> int:
    """Bytes of the GPU that modules may hold between uses: JAX may come to need all that it is allowed."""
    import torch

    _, total = torch.cuda.mem_get_info()
    allowed = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return int((total - allowed) * (1 - DEVICE_FREE))


def _size(module: Any) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _on_device(module: Any) -> bool:
    return module.device.type != "cpu"


def _drop(modules: dict[Any, Any]) -> None:
    for module in modules.values():
        module.to("meta")
    modules.clear()
