"""The distance between two arrays."""

import numpy as np


def relative(ours, reference) -> float:
    """‖ours - reference‖ / ‖reference‖, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
