"""Rewrites a model's tensors from diffusers' layout to others."""

from collections.abc import Mapping

import numpy as np

from jaxspd.convert.layout import Layout


def in_layout(layout: Layout, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a file of `layout` that holds the model `tensors`: the reverse of `Target.take`."""
    made = {}
    for source, targets in layout.sources(tensors).items():
        if targets[0].whole:
            made[source] = tensors[targets[0].key]
            continue
        units = sum(len(target.parts) for target in targets)
        size = sum(len(tensors[target.key]) for target in targets) // units
        rows = np.empty((units * size, *tensors[targets[0].key].shape[1:]), tensors[targets[0].key].dtype)
        for target in targets:
            for place, part in enumerate(target.parts):
                mine = tensors[target.key][place * size : (place + 1) * size]
                rows[part * size : (part + 1) * size] = mine
        made[source] = rows
    return made
