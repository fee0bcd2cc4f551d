"""A simulated accelerator: tensors on ``sim:0`` whose numbers lie in CPU memory.

Code runs "on a GPU" without one, with real numbers:

- Mixing devices raises, as on a GPU; 0-dimensional CPU tensors are allowed as on a GPU.
- A generator of another device raises.
- `Traffic` counts copies, read-backs, boolean selections and float64 tensors.

PyTorch sees a wrapper subclass on the device of its PrivateUse1 backend, so that autograd and
modules work as usual. ``__torch_dispatch__`` runs each operation on the CPU, below autograd, with
the CPU's bits.

`conftest.py` imports this module before any test: autograd starts one thread per device at the
first backward pass, and the device has to exist by then. Mark the tests with `needs_simulation`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

needs_simulation = pytest.mark.skipif(
    not AVAILABLE, reason="a device written in Python needs PyTorch 2.9 or newer"
)

aten = torch.ops.aten
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Operations that PyTorch does not tag with an output that depends on data, but which wait for it.
WAITING = {"aten::equal", "aten::_linalg_check_errors"}
DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

_counts: Counter[str] = Counter()


class Traffic(NamedTuple):
    """Numbers of events on the device, since a reset or between two moments."""

    to_device: int = 0  # copies of tensors
    to_cpu: int = 0
    read_backs: int = 0  # waits for a value or a size, as `item` and selections by a mask do
    selections: int = 0  # boolean, reading or writing
    float64: int = 0  # tensors of double precision, views included

    @property
    def waits(self) -> int:
        """How often the CPU waits for the device: copies to the CPU and read-backs."""
        return self.to_cpu + self.read_backs

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(self, earlier, strict=True)))


class SimulatedDevice:
    """The counts of the device."""

    def traffic(self) -> Traffic:
        """A snapshot of the counts."""
        return Traffic(**_counts)

    def reset(self) -> None:
        """Set all counts to zero."""
        _counts.clear()


@contextlib.contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """Make ``device="sim"`` work, with counts that start at zero."""
    device = SimulatedDevice()
    device.reset()
    with _GeneratorCheck(), _Dispatch():
        yield device


class Generator(torch.Generator):
    """A generator of the device; it draws the numbers of a CPU generator of the same seed."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("sim:0")


class SimulatedTensor(torch.Tensor):
    """A tensor on the device; ``inner`` is the CPU tensor that holds its numbers."""

    inner: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> SimulatedTensor:
        _counts["float64"] += inner.dtype in {torch.float64, torch.complex128}
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=torch.device("sim:0"), **layout
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()


class _Dispatch(TorchDispatchMode):
    """Runs operations that name the device but have no tensor on it, such as ``torch.zeros``."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _GeneratorCheck(TorchFunctionMode):
    """Raises for generators of another device: below it their device is not known."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result, generator = function(*args, **(kwargs or {})), (kwargs or {}).get("generator")
        for x in tree_leaves(result) if generator is not None else ():
            if isinstance(x, Tensor) and x.device.type != generator.device.type:
                msg = f"Expected a {x.device.type!r} generator; found {generator.device.type!r}"
                raise RuntimeError(msg)
        return result


def _here(x: object) -> bool:
    return isinstance(x, SimulatedTensor)


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation of PyTorch on the inner tensors; count it; wrap what it returns."""
    tensors = list(_tensors(args))
    tensors += _tensors(kwargs.values()) if kwargs else ()
    present, target = any(map(_here, tensors)), kwargs.get("device")
    if function is aten.copy_.default:
        lands = _here(args[0])
    else:
        lands = present if target is None else torch.device(target).type == "sim"
    if not present and not lands:
        return function(*args, **kwargs)

    name = function._schema.name
    if name in {"aten::_to_copy", "aten::copy_"}:
        source = _here(args[name == "aten::copy_"])
        _counts["to_device"] += lands and not source
        _counts["to_cpu"] += source and not lands
    elif present:
        _count_waits(function, name, args)
        _check_devices(name, args, kwargs)
    wrappers = {id(x.inner): x for x in tensors if _here(x)}
    args = _mapped(lambda x: x.inner if _here(x) else x, args)
    kwargs = {key: _mapped(lambda x: x.inner if _here(x) else x, x) for key, x in kwargs.items()}
    if target is not None:
        kwargs["device"] = "cpu"
    result = function(*args, **kwargs)
    if not lands:
        return result

    def wrapped(x: Tensor) -> Tensor:
        return wrappers[id(x)] if id(x) in wrappers else SimulatedTensor(x)

    return _mapped(wrapped, result)


def _mapped(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """With changed tensors, of arguments and of lists of them; pytrees take ten times as long."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)(_mapped(change, y) for y in x) if isinstance(x, list | tuple) else x


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists of them; pytrees would take most of the time."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from (y for y in x if isinstance(y, Tensor))


def _count_waits(function: Any, name: str, args: Any) -> None:
    if name in INDEXING:
        indices = list(_tensors(args[1]))
        masks = [x for x in indices if x.dtype in {torch.bool, torch.uint8}]
        _counts["selections"] += bool(masks)
        _counts["read_backs"] += any(map(_here, masks))
        _counts["to_device"] += sum(not _here(x) for x in indices)
        _counts["to_device"] += len(args) > 2 and not _here(args[2])
    else:
        _counts["selections"] += name == "aten::masked_select"
        _counts["read_backs"] += name in WAITING or not DATA_DEPENDENT.isdisjoint(function.tags)


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    """Raise for CPU tensors, but for numbers and for indices, which a device takes."""
    checked = (args[0], *args[2:]) if name in INDEXING else (*args, *kwargs.values())
    if any(x.ndim and not _here(x) for x in _tensors(checked)):
        msg = f"Expected all tensors on one device, but found sim:0 and cpu, in {name}"
        raise RuntimeError(msg)


if AVAILABLE:

    class _BackendModule(backend_registration._DummyBackendModule):
        """``torch.sim``, which is not available to code that looks for an accelerator."""

        def is_available(self) -> bool:
            return False

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend("sim", _BackendModule())
    # `torch.tensor` and indexing with a list copy numbers to the device, and no mode sees it.
    _library = torch.library.Library("aten", "IMPL")

    def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> Tensor:
        return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def _copy_from(source: Tensor, target: SimulatedTensor, non_blocking: bool = False) -> Tensor:
        _counts["to_device"] += 1
        target.inner.copy_(source)
        return target

    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    # Without a kernel of the backend autograd would take these apart, to other bits than the CPU's.
    for _name in ("silu_backward", "mish_backward", "native_channel_shuffle"):
        _library.impl(_name, torch.library.fallthrough_kernel, "PrivateUse1")
