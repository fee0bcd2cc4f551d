"""Argument checks; error messages name the argument, the value received and the values allowed."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import get_args

import torch
from torch import Tensor

from cldsde.messages import brief

TimeLike = float | Tensor
LevelLike = float | Tensor
Parameter = float | Tensor
"""A number, or a tensor with one element that may be a learnt parameter."""
MatrixLike = Tensor | Sequence[Sequence[Parameter]]


def as_times(value: TimeLike, name: str, end: float = 1.0) -> Tensor:
    """Convert times to float64 on the CPU; raise if one lies outside [0, end]."""
    if isinstance(value, Tensor):
        times = _floating(value, name)
    elif isinstance(value, Real) and not isinstance(value, bool):
        times = torch.tensor(float(value), device="cpu", dtype=torch.float64)
    else:
        msg = f"{name} must be a floating-point tensor or a real number; got {type(value).__name__}"
        raise TypeError(msg)
    if times.numel():
        # A NaN propagates into both extremes and fails the comparison.
        low, high = (float(x) for x in times.detach().aminmax())
        if not (low >= 0.0 and high <= end):
            got = "NaN" if math.isnan(low) else f"values from {low:.17g} to {high:.17g}"
            raise ValueError(f"{name} must lie in [0, {end:g}]; got {got}")
    return times


def as_grid_times(times: object, name: str, end: float = 1.0, *, least: int = 2) -> Tensor:
    """Convert a monotonic grid of ``least`` or more times in [0, end] to float64 on the CPU."""
    if not isinstance(times, Tensor) or times.ndim != 1 or len(times) < least:
        msg = f"{name} must be a tensor of at least {least} decreasing times; got {shaped(times)}"
        raise (ValueError if isinstance(times, Tensor) else TypeError)(msg)
    grid = as_times(times.detach(), name, end)
    steps = grid.diff()
    if bool((steps > 0).all() | (steps < 0).all()):
        return grid
    i = int((steps >= 0).nonzero()[0])
    got = f"{float(grid[i]):g} before {float(grid[i + 1]):g}"
    msg = f"{name} must decrease from T to ε, or increase throughout to encode data; got {got}"
    raise ValueError(msg)


def _floating(value: Tensor, name: str) -> Tensor:
    if not value.is_floating_point():
        msg = f"{name} must be a floating-point tensor or a real number; got dtype {value.dtype}"
        raise TypeError(msg)
    return value.cpu().to(torch.float64)


def as_levels(value: float | Tensor, name: str, shape: torch.Size) -> Tensor:
    """Convert finite numbers ≥ 0 to float64 on the CPU, broadcast to ``shape``."""
    if not isinstance(value, Tensor):
        value = torch.tensor(check_at_least(value, 0.0, name), device="cpu", dtype=torch.float64)
    levels = _floating(value, name)
    if not bool((levels.isfinite() & (levels >= 0)).all()):
        raise ValueError(f"{name} must be finite and at least 0; got {levels.tolist()}")
    try:
        return levels.expand(shape)
    except RuntimeError:
        msg = f"{name} must broadcast with the times, {tuple(shape)}; got {tuple(levels.shape)}"
        raise ValueError(msg) from None


def as_float64(value: object) -> Tensor:
    """Convert numbers, tensors, or nested sequences of them to float64 on the CPU.

    Tensors inside sequences keep their graph, so that a matrix can be assembled from parameters.
    """
    if isinstance(value, Tensor):
        return value.cpu().to(torch.float64)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0:
        return torch.stack([as_float64(item) for item in value])
    return torch.as_tensor(value, device="cpu", dtype=torch.float64)


def as_matrix(value: MatrixLike, name: str, shape: tuple[int | None, int | None]) -> Tensor:
    """Convert nested numbers or a tensor to a finite float64 matrix on the CPU.

    ``shape`` holds the required numbers of rows and columns; None allows any number.
    """
    try:
        # Copy the tensor, so that the process does not change with the caller's tensor.
        matrix = as_float64(value).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a matrix of real numbers; got {value!r}") from error
    fits = matrix.ndim == 2 and all(
        want in (None, got) for got, want in zip(matrix.shape, shape, strict=True)
    )
    if not fits or matrix.numel() == 0:
        want = " × ".join("any" if n is None else str(n) for n in shape)
        msg = f"{name} must be a matrix of shape {want}; got shape {tuple(matrix.shape)}"
        raise ValueError(msg)
    if not bool(matrix.detach().isfinite().all()):
        raise ValueError(f"{name} must be finite; got {matrix.detach().tolist()}")
    return matrix


def as_number(value: object, name: str) -> float:
    """Convert a real number to a float; raise TypeError for a bool, a tensor or anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number; got {value!r}")
    return float(value)


def as_integer(value: object, least: int, name: str) -> int:
    """Convert an integer ≥ ``least`` to an int; raise TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return int(value)


def as_parameter(value: object, name: str) -> Parameter:
    """Convert a number to a float, and a tensor with one element to a 0-dimensional float64 tensor.

    The tensor is copied to the CPU and keeps its graph. Convert it before any arithmetic, which
    would leave 7 digits in single precision.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.reshape(()).cpu().to(torch.float64)
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a real number or a tensor with one element; "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )
    return as_number(value, name)


def positive_parameter(value: object, name: str) -> Parameter:
    """`as_parameter` for a finite number above zero; raise ValueError otherwise."""
    parameter = as_parameter(value, name)
    check_positive(parameter_value(parameter), name)
    return parameter


def parameter_at_least(value: object, bound: float, name: str) -> Parameter:
    """`as_parameter` for a finite number ≥ ``bound``; raise ValueError otherwise."""
    parameter = as_parameter(value, name)
    check_at_least(parameter_value(parameter), bound, name)
    return parameter


def parameter_value(parameter: Parameter) -> float:
    """Float value of a parameter, without its graph."""
    return float(parameter.detach()) if isinstance(parameter, Tensor) else parameter


def described(value: object) -> object:
    """Dtype of a tensor, or the name of another object's type, for error messages."""
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def shaped(value: object) -> object:
    """Shape of a tensor, or the name of another object's type, for error messages."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def check_positive(value: float, name: str) -> float:
    """Return ``value`` as a float if it is finite and above zero; raise ValueError otherwise."""
    number = as_number(value, name)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and positive; got {value}")
    return number


def check_at_least(value: float, bound: float, name: str) -> float:
    """Return ``value`` as a float if it is finite and ≥ ``bound``; raise ValueError otherwise."""
    number = as_number(value, name)
    if not (math.isfinite(number) and number >= bound):
        raise ValueError(f"{name} must be finite and at least {bound:g}; got {value}")
    return number


def check_between(value: float, low: float, high: float, name: str) -> float:
    """Return ``value`` as a float if it lies in [low, high]; raise ValueError otherwise."""
    number = as_number(value, name)
    if not low <= number <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {value}")
    return number


def check_callable(value: object, name: str, kind: str) -> None:
    """Raise TypeError unless a value is callable; ``kind`` says what it must be."""
    if not callable(value):
        raise TypeError(f"{name} must be {kind}; got {reprlib.repr(value)}")


def checked_values(
    function: Callable[[Tensor], Tensor], times: Tensor, name: str, *, signed: bool = True
) -> Tensor:
    """Finite float64 values of a function at times ``(n,)`` of [0, 1]; raise ValueError otherwise.

    Unless ``signed``, they must not be negative.
    """
    try:
        values = torch.as_tensor(function(times), device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{name} must accept a tensor of times, as torch's functions do; it raised: {error}"
        raise ValueError(msg) from error
    if values.shape != times.shape or values.dtype != torch.float64:
        raise ValueError(
            f"{name} must return float64 of the shape {tuple(times.shape)}, as its argument has; "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
    bad = ~(values.isfinite() if signed else values.isfinite() & (values >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"{name} must be finite{'' if signed else ' and not negative'} on [0, 1]; got "
            f"{float(values[bad][0]):g} at t = {float(times[bad][0]):g}"
        )
    return values


def as_device(device: torch.device | str) -> torch.device:
    """Convert the name of a device; raise ValueError unless this machine has it."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch has no class for it
        msg = f"device must be one that this machine has; got {str(device)!r} ({brief(error)})"
        raise ValueError(msg) from error


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless a dtype is a floating-point type that torch calculates with."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"dtype must be a floating-point type of 16 to 64 bits; got {dtype!r}")


def check_alphas_cumprod(table: Tensor) -> None:
    """Raise ValueError unless ``(N,)`` numbers decrease from below 1 to at least 0."""
    before = torch.cat([table.new_ones(1), table[:-1]])
    bad = ~((table < before) & (table >= 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            "table must decrease from below 1 to at least 0; "
            f"got {float(table[i]):.6g} after {float(before[i]):.6g} at index {i}"
        )


def check_state(z: Tensor, components: int, name: str = "z") -> Tensor:
    """Return ``z`` if it is a floating-point state ``(B, components, *D)``; raise otherwise."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        msg = f"{name} must be a floating-point tensor of shape (B, {components}, *D)"
        msg += f"; got {described(z)}"
        raise TypeError(msg)
    if z.ndim < 2 or z.shape[1] != components:
        raise ValueError(
            f"{name} must have shape (B, {components}, *D), with the {components} component(s) of "
            f"the process on axis 1; got {tuple(z.shape)}"
        )
    return z


def one_of(value: object, allowed: object, name: str) -> None:
    """Raise ValueError unless ``value`` is in a tuple of strings, or in a Literal type."""
    options = allowed if isinstance(allowed, tuple) else get_args(allowed)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")


def two_increasing(value: object, name: str) -> tuple[float, float]:
    """Check and return two increasing real numbers, of which the second may be infinite."""
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(x, Real) for x in pair) or not pair[0] < pair[1]:
        raise ValueError(f"{name} must be two increasing numbers; got {value!r}")
    low, high = float(pair[0]), float(pair[1])
    if not math.isfinite(low):
        raise ValueError(f"{name} must start with a finite number; got {value!r}")
    return low, high
