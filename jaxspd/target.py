"""What a program is made for: a device, which need not be there, and perhaps one attention backend."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

# JAX keeps what it has traced under one value apart from what it has traced under another.
_FORCED = jax.make_user_context(None)


@dataclass(frozen=True)
class Target:
    """The device that programs run on, by default JAX's first, and the attention backend to force, a name in
    `models.attention`, or None for the best there is.

    A device of `jax.experimental.topologies` can be compiled for where no such device is.
    """

    device: jax.Device = field(default_factory=lambda: jax.devices()[0])
    attention_backend: str | None = None

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Meanwhile, what this thread traces is for this target: `platform` and `forced_attention` tell."""
        with jax.set_mesh(Mesh(np.array([self.device]), ("device",))), _FORCED(self.attention_backend):
            yield

    def abstract(self, tree: Any) -> Any:
        """`tree`, whose leaves have a shape and a dtype, as abstract arrays on the device."""
        place = SingleDeviceSharding(self.device)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def platform() -> str:
    """The platform of the target that is traced for, or of JAX's own default: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def forced_attention() -> str | None:
    """The attention backend that the target traced for forces, if any."""
    return _FORCED.value
