"""Carries out the kernels that torch launches on the processor: on the streams of the stub, late, holding nothing.

Rules this module keeps:

- Memory of the stub is the processor's, so an operation on tensors of CUDA is one on tensors of the processor that lie
  there. Views, allocations and plain copies stay torch's own.
- What is queued holds addresses and no tensors, as a kernel does: what is freed, reused or written too soon is seen.
- A captured operation is replayed as often as its graph is.

A pytest plugin, too: an operation that failed on its stream fails the test.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["SimulatedKernels", "errors", "library"]

library = ctypes.CDLL(None)
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_long)
library.fake_cuda_call.argtypes = [ctypes.c_long, _HANDLER, ctypes.c_long]

errors: list[BaseException] = []
_queued: dict[int, tuple[Callable[[], object], bool]] = {}
_numbers = itertools.count()


def _carry_out(number: int) -> None:
    run, is_captured = _queued[number]
    if not is_captured:
        del _queued[number]
    try:
        with torch.no_grad():
            run()
    except BaseException as failure:  # noqa: BLE001 - a thread of the stub has nobody to tell
        errors.append(failure)


_handler = _HANDLER(_carry_out)  # kept: the stub calls it


class _Place:
    """Where the elements of a tensor are."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._address, self._nbytes = storage.data_ptr(), storage.nbytes()
        self._dtype, self._offset = tensor.dtype, tensor.storage_offset()
        self.size, self._stride = tuple(tensor.size()), tensor.stride()

    def tensor(self) -> torch.Tensor:
        """Return a tensor of the processor that lies there."""
        if not self._nbytes:
            return torch.empty(self.size, dtype=self._dtype)
        memory = (ctypes.c_char * self._nbytes).from_address(self._address)
        count = self._nbytes // self._dtype.itemsize
        return torch.frombuffer(memory, dtype=self._dtype, count=count).as_strided(
            self.size, self._stride, int(self._offset)
        )


def _submit(run: Callable[[], object], device: torch.device) -> None:
    with torch.cuda.device(device):  # the default stream is that of the current device
        is_captured = torch.cuda.is_current_stream_capturing()
        number = next(_numbers)
        _queued[number] = (run, is_captured)
        library.fake_cuda_call(torch.cuda.current_stream().cuda_stream, _handler, number)


def _is_cuda(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


_NATIVE = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_pin_memory",
        "_unsafe_view",
        "alias",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "is_pinned",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "record_stream",
        "resize_",
        "set_",
    )
)
"""What launches no kernel."""


class SimulatedKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode in which every thread runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one operation."""
        del types
        options = kwargs or {}
        given = [value for value in tree_flatten((args, options))[0] if _is_cuda(value)]
        place = options.get("device")
        is_made = place is not None and torch.device(place).type == "cuda"
        name = func._schema.name
        if name in _NATIVE or not (given or is_made) or _is_view(func):
            return func(*args, **options)
        if name == "aten::copy_":
            return _copy(
                args[0], args[1], non_blocking=options.get("non_blocking", args[2] if len(args) > 2 else False)
            )
        if name == "aten::_to_copy":
            return _convert(args[0], options)
        if given:
            return _carry_out_on(given[0].device, func, args, options)
        made = func(*args, **{**options, "device": torch.device("cpu")})
        return _copy(_allocate(made, torch.device(str(place))), made, non_blocking=False)


def _find_written(func: Any) -> list[int]:
    taken = func._schema.arguments
    return [at for at, one in enumerate(taken) if one.alias_info is not None and one.alias_info.is_write]


def _is_view(func: Any) -> bool:
    return not _find_written(func) and any(one.alias_info is not None for one in func._schema.returns)


def _carry_out_on(device: torch.device, func: Any, args: Any, options: Any) -> Any:
    """Submit an operation, and return what it gives back, or will have written."""
    run = _freeze(func, args, options)
    if written := _find_written(func):
        _submit(run, device)
        names = [taken.name for taken in func._schema.arguments]
        found = [args[at] if at < len(args) else options.get(names[at]) for at in written]
        return _as_returned(found, len(func._schema.returns))
    if func._schema.name == "aten::equal":
        torch.cuda.current_stream(device).synchronize()
        return run()
    return _compute(func, args, options, run=run, device=device)


def _freeze(func: Any, args: Any, options: Any) -> Callable[[], Any]:
    """Return the operation on addresses; a generator of random numbers of CUDA is left out."""

    def freeze(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return None
        return _Place(value) if _is_cuda(value) else value

    frozen = tree_map(freeze, (args, options))

    def run() -> Any:
        found, named = tree_map(lambda value: value.tensor() if isinstance(value, _Place) else value, frozen)
        return func(*found, **named)

    return run


def _as_returned(found: list[Any], num_returned: int) -> Any:
    if num_returned > 1:
        return tuple(found)
    return found[0] if num_returned else None


def _compute(func: Any, args: Any, options: Any, *, run: Callable[[], Any], device: torch.device) -> Any:
    """Submit an operation that returns new tensors, whose shapes are known before it is done."""

    def to_meta(value: Any) -> Any:
        is_moved = isinstance(value, torch.Tensor) and (_is_cuda(value) or bool(value.dim()))
        return value.to("meta") if is_moved else value

    try:
        like = func(*tree_map(to_meta, args), **tree_map(to_meta, options))
    except Exception:  # noqa: BLE001 - whatever it is: the shapes depend on the values, which are waited for
        torch.cuda.current_stream(device).synchronize()
        like = run()
    several = isinstance(like, tuple | list)
    made = [_allocate(tensor, device) for tensor in (like if several else [like])]
    places = [_Place(tensor) for tensor in made]

    def run_and_keep() -> None:
        found = run()
        for place, value in zip(places, found if several else [found], strict=True):
            if tuple(value.shape) == place.size:  # where nothing is saved, only the processor says so
                place.tensor().copy_(value)

    _submit(run_and_keep, device)
    return type(like)(made) if several else made[0]


def _allocate(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=device)


def _convert(source: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    made = torch.empty_like(
        source,
        dtype=options.get("dtype") or source.dtype,
        device=options.get("device") or source.device,
        memory_format=options.get("memory_format") or torch.preserve_format,
    )
    return _copy(made, source, non_blocking=options.get("non_blocking", False))


def _copy(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
    """Copy as torch does where that is plain bytes; else where the memory is, in the order of the streams."""
    is_plain = (target.dtype, target.size()) == (source.dtype, source.size())
    if is_plain and target.is_contiguous() and source.is_contiguous():
        copied: torch.Tensor = torch.ops.aten.copy_.default(target, source, non_blocking)
        return copied
    if _is_cuda(target) and _is_cuda(source):
        to, of = _Place(target), _Place(source)
        _submit(lambda: to.tensor().copy_(of.tensor()), target.device)
        return target
    torch.cuda.current_stream(target.device if _is_cuda(target) else source.device).synchronize()
    here = _Place(target).tensor() if _is_cuda(target) else target
    here.copy_(_Place(source).tensor() if _is_cuda(source) else source)
    return target


def _install() -> SimulatedKernels:
    """Have every thread, this one first, run in the mode."""
    torch.backends.cudnn.enabled = False  # its operations are none of the processor's
    run = threading.Thread.run

    def run_in_mode(thread: threading.Thread) -> None:
        with SimulatedKernels():  # type: ignore[no-untyped-call]
            run(thread)

    threading.Thread.run = run_in_mode  # type: ignore[assignment,method-assign]
    mode = SimulatedKernels()  # type: ignore[no-untyped-call]
    mode.__enter__()  # type: ignore[no-untyped-call]
    return mode


_mode = _install()


@pytest.fixture(autouse=True)
def _nothing_failed() -> Iterator[None]:
    """Fail a test of which an operation failed on its stream."""
    errors.clear()
    yield
    torch.cuda.synchronize()
    assert errors == []
