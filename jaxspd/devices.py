"""Which devices a model is spread over, and how. Names are those of `sglang generate`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxspd import processes
from jaxspd.errors import UsageError
from jaxspd.models.vae.coder import parameter_bytes
from jaxspd.runtime.memory import memory_limit
from jaxspd.target import SAMPLES, TOKENS, Target

log = logging.getLogger("jaxspd")

# The share of a device's memory that whole weights may take. The rest is for a step's activations.
WEIGHTS_SHARE = 0.85
# The refused options, with the reason: the bytes that each of 8 H100s sends in a step of FLUX.1 at 1024×1024,
# by XLA's programs.
REFUSED = {
    "tp_size": "matrices that are split make each of 8 devices send 9.4 GB in a step of FLUX.1",
    "ring_degree": "keys and values that go round make each of 8 devices send 3.2 GB in a step of FLUX.1",
}


@dataclass(frozen=True)
class Degrees:
    """The user's options for devices. None leaves the choice to `spread_over`.

    `num_gpus` devices, of any kind, share the transformer's work. `ulysses_degree` devices share the tokens
    of each prediction. With `enable_cfg_parallel`, each half of the devices makes one of guidance's two
    predictions. `fsdp` also shards the weights. `tp_size` and `ring_degree` must be 1. Raises UsageError for
    other values.
    """

    num_gpus: int = 1
    ulysses_degree: int | None = None
    enable_cfg_parallel: bool | None = None
    fsdp: bool | None = None
    tp_size: int = 1
    ring_degree: int = 1

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None:
                continue
            if name in ("enable_cfg_parallel", "fsdp"):
                if not isinstance(value, bool):
                    raise UsageError(f"{name} must be true or false, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} must be a whole number of 1 or more, not {value!r}")
        for name, reason in REFUSED.items():
            if getattr(self, name) > 1:
                raise UsageError(
                    f"{name} must be 1: {reason}, tokens that are spread 0.7; use ulysses_degree"
                )

    def shape(self) -> tuple[int, int]:
        """The numbers of devices along samples and along tokens, whose product is `num_gpus`.

        Raises UsageError if the given options allow no such product.
        """
        count, tokens, guided = self.num_gpus, self.ulysses_degree, self.enable_cfg_parallel
        allowed = [2, 1] if guided is None else [2] if guided else [1]
        for samples in allowed:
            if count % samples == 0 and tokens in (None, count // samples):
                return samples, count // samples
        fits = [f"{count // samples}" for samples in reversed(allowed) if count % samples == 0]
        if not fits:
            raise UsageError(f"enable_cfg_parallel needs an even num_gpus, not {count}; leave it out")
        raise UsageError(
            f"ulysses_degree {tokens} does not make use of num_gpus {count}; use {' or '.join(fits)}, or "
            "leave it out"
        )


def spread_over(
    target: Target,
    family: Any,
    dtype: Any,
    degrees: Degrees,
    devices: Sequence[jax.Device] | None = None,
    limit: int | None = None,
) -> Target:
    """`target` for as many devices as `degrees` asks for, to run `family` in `dtype`.

    They are the first of `devices`, by default JAX's. Each has `limit` bytes, by default what JAX may take of
    it.

    By default each half of the devices makes one of guidance's two predictions, which exchanges the least
    data. The tokens of a prediction are spread over its devices. Weights are whole on each device if they
    fit. Gathering them would take as long on a coarse grid as on the finest, so growing the grid would gain
    little. Raises UsageError for a wrong number of devices, and for `fsdp` on one device.
    """
    samples, _ = degrees.shape()
    count, together = degrees.num_gpus, processes.count()
    if devices is None:
        devices = jax.devices() if together > 1 else jax.local_devices()
    if together > 1 and count != len(devices):
        raise UsageError(
            f"num_gpus is {count}, and the {together} processes have {len(devices)}; use {len(devices)}"
        )
    if count > len(devices):
        raise UsageError(f"num_gpus is {count}, and JAX sees {len(devices)}; use {len(devices)} or fewer")
    if count == 1:
        if degrees.fsdp:
            raise UsageError("fsdp shards weights over devices; it needs num_gpus 2 or more")
        return target
    # All processes must make the same choice.
    most = limit or processes.least(memory_limit(target.device))
    sharded = not fits(family, dtype, most) if degrees.fsdp is None else degrees.fsdp
    return target.over(devices[:count], samples, sharded, most)


def fits(family: Any, dtype: Any, limit: float) -> bool:
    """Whether a device of `limit` bytes can hold the whole weights of `family` in `dtype`."""
    return family.streamed or parameter_bytes(family.abstract_parameters(dtype)) <= WEIGHTS_SHARE * limit


def say_layout(target: Target, family: Any, dtype: Any) -> None:
    """Logs how `family`, run in `dtype`, is spread over the devices of `target`, if there are several."""
    if target.mesh is None:
        return
    count, samples, tokens = target.mesh.size, target.mesh.shape[SAMPLES], target.mesh.shape[TOKENS]
    if samples > 1 and family.guided(family.default_guidance):
        layout = f"each of guidance's two predictions on {tokens} of them, which share its tokens"
    else:
        layout = "tokens are shared among all"
    note = ""
    if target.shard_weights:
        size = parameter_bytes(family.abstract_parameters(dtype))
        note = f"; each keeps 1/{count} of the weights of {size / 1e9:.1f} GB"
        assert target.memory is not None, "`spread_over` sets it with the mesh"
        if not fits(family, dtype, target.memory):
            note += f", as there are {target.memory / 1e9:.1f} GB on one"
            if family.quantize is None:
                note += " (quantize int8 takes half: whole weights make coarse steps fast)"
    log.warning("spread over %d devices: %s%s", count, layout, note)
