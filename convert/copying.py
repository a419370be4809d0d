"""Copies between NumPy arrays by PyTorch, which converts types faster than NumPy."""

import ml_dtypes
import numpy as np
import torch


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array with nothing in it yet, where PyTorch puts one: aligned so that JAX on a CPU takes it over
    instead of copying it.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return torch.empty(size, dtype=torch.uint8).numpy().view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Fills `target` with `source`, of the same shape and any float type; rounds to nearest even."""
    as_tensor(target).copy_(as_tensor(source))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor; PyTorch knows no bfloat16 of NumPy's."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as an array: the reverse of `as_tensor`."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
