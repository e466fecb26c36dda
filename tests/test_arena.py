"""Arenas and leases: the memory is taken exactly as long as anything over it lives, and looks like ordinary tensors."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hotglm import seam
from hotglm.errors import MemoryPlanError
from hotglm.weights.arena import ALIGNMENT, Arena, Lease
from hotglm.weights.dtypes import LOADABLE_DTYPES

DTYPES = sorted(LOADABLE_DTYPES, key=str)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Turn the cyclic collector off: what is freed then was freed by reference counts, at once."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _tensor(lease: Lease, *shape: int) -> torch.Tensor:
    return lease.view(0, dtype=torch.float32, shape=shape or (4, 4))


def _linear(lease: Lease) -> nn.Linear:
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(_tensor(lease))
    return linear


def _graph(lease: Lease) -> object:
    x = torch.ones(4, 4, requires_grad=True)
    return (x * _tensor(lease)).sum().grad_fn  # the product's node saved the tensor for its backward pass


def _iterator(lease: Lease) -> object:
    rows = iter(_tensor(lease))
    next(rows)
    return rows


def _closure(lease: Lease) -> object:
    tensor = _tensor(lease)
    return lambda: tensor


def _fail(tensor: torch.Tensor) -> None:
    raise ValueError(tensor.shape)


def _traceback(lease: Lease) -> object:
    try:
        _fail(_tensor(lease))
    except ValueError as error:
        return error.__traceback__.tb_next if error.__traceback__ else None
    return None


HOLDERS: dict[str, Callable[[Lease], object]] = {
    "tensor": _tensor,
    "view of a tensor": lambda lease: _tensor(lease)[1:, ::2],
    "transposed view": lambda lease: _tensor(lease).t(),
    "0-d element": lambda lease: _tensor(lease)[0, 0],
    "detached alias": lambda lease: _tensor(lease).detach(),
    "unbound rows": lambda lease: _tensor(lease).unbind(),
    "iterator over rows": _iterator,
    "storage": lambda lease: _tensor(lease).untyped_storage(),
    "numpy array": lambda lease: _tensor(lease).numpy(),
    "dlpack": lambda lease: torch.utils.dlpack.from_dlpack(_tensor(lease)),
    "window of bytes": lambda lease: lease.bytes(8, 16),
    "parameter": lambda lease: nn.Parameter(_tensor(lease)),
    "parameter's data": lambda lease: nn.Parameter(_tensor(lease)).data,
    "output that aliases a weight": lambda lease: nn.Flatten(0)(nn.Parameter(_tensor(lease))),
    "autograd graph": _graph,
    "bound method of a module": lambda lease: _linear(lease).forward,
    "module": _linear,
    "module inside a module": lambda lease: nn.Sequential(nn.Sequential(_linear(lease)))[0],
    "state dict": lambda lease: _linear(lease).state_dict(),
    "parameters generator": lambda lease: _linear(lease).named_parameters(),
    "closure": _closure,
    "frame of an exception": _traceback,
}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("kind", HOLDERS)
def test_every_kind_of_holder_keeps_the_arena_and_gives_it_back_at_once(kind: str) -> None:
    """Whatever torch or Python derives from a tensor keeps the arena taken, and the last to go frees it at once."""
    arena = Arena(4096)
    lease = arena.lease()
    watch = lease.watch
    holder = HOLDERS[kind](lease)
    del lease
    assert not arena.is_free
    assert watch() is not None
    with pytest.raises(RuntimeError, match="still lent"):
        arena.lease()
    del holder
    assert arena.is_free
    assert watch() is None
    arena.lease()


@pytest.mark.usefixtures("no_collector")
def test_a_copy_or_a_weak_reference_holds_nothing() -> None:
    """Clones, deep copies, computed outputs and weak references leave the arena free."""
    arena = Arena(4096)
    lease = arena.lease()
    tensor = _tensor(lease)
    kept = [tensor.clone(), copy.deepcopy(tensor), tensor * 2, weakref.ref(tensor), lease.watch]
    del lease, tensor
    assert arena.is_free
    assert len(kept) == 5


def _cycle(lease: Lease) -> object:
    cycle: list[object] = [_tensor(lease)]
    cycle.append(cycle)
    return cycle


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("make", [_cycle, lambda lease: torch.optim.SGD(_linear(lease).parameters(), lr=0.1)])
def test_a_holder_in_a_reference_cycle_lasts_until_the_garbage_collector(make: Callable[[Lease], object]) -> None:
    """A cycle, such as torch's optimizers may be, keeps the arena until it is collected, and not longer."""
    arena = Arena(4096)
    holder = make(arena.lease())
    assert not arena.is_free
    if make is _cycle:
        del holder
        assert not arena.is_free
    holder = None
    gc.collect()
    assert arena.is_free


def test_a_lease_outlives_its_arena() -> None:
    """Memory that somebody holds stays readable and unchanged when its owner drops the arena."""
    arena = Arena(4096)
    tensor = _tensor(arena.lease()).fill_(7)
    gone = weakref.ref(arena)
    del arena
    assert gone() is None
    assert torch.equal(tensor, torch.full((4, 4), 7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shared_dtype_can_live_in_an_arena(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every dtype of torch and safetensors makes views, of any rank, whose bytes are those of the arena."""
    lease = Arena(4096).lease()
    lease.bytes(0, 256)[:] = bytes(i % 2 for i in range(256))
    for shape in ((), (3,), (2, 3), (1, 2, 1, 3)):
        tensor = lease.view(ALIGNMENT, dtype=dtype, shape=shape)
        assert (tensor.dtype, tuple(tensor.shape), tensor.requires_grad) == (dtype, shape, False)
        nbytes = tensor.numel() * dtype.itemsize
        assert tensor.untyped_storage().nbytes() == nbytes
        written = tensor.reshape(-1).view(torch.uint8).tolist()
        assert written == list(lease.bytes(ALIGNMENT, nbytes))
        save_file({"t": tensor}, tmp_path / "t.safetensors")
        again = load_file(tmp_path / "t.safetensors")["t"]
        assert again.reshape(-1).view(torch.uint8).tolist() == written


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 1 << 40)])
def test_an_empty_tensor_holds_no_memory(shape: tuple[int, ...]) -> None:
    """A tensor without elements has its shape, and does not keep the arena."""
    arena = Arena(4096)
    tensor = arena.lease().view(0, dtype=torch.float32, shape=shape)
    assert tuple(tensor.shape) == shape
    assert arena.is_free


def test_strides_are_kept() -> None:
    """A channels-last tensor keeps its memory format in the arena, in a storage of exactly its extent."""
    lease = Arena(4096).lease()
    like = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensor = lease.view(64, dtype=torch.float32, shape=like.shape, stride=like.stride())
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert tensor.untyped_storage().nbytes() == like.numel() * 4
    assert tensor.data_ptr() % ALIGNMENT == 0


def test_an_arena_starts_at_a_page() -> None:
    """An arena's first byte is aligned to a page, so that offsets alone decide alignment."""
    arena = Arena(1)
    assert arena.address % mmap.PAGESIZE == 0
    assert arena.lease().view(0, dtype=torch.uint8, shape=(1,)).data_ptr() == arena.address


def test_a_tensor_of_an_arena_is_no_window_into_it(tmp_path: Path) -> None:
    """torch.save, deepcopy and safetensors treat each tensor as its own storage, never as part of the arena."""
    lease = Arena(1 << 20).lease()
    one = lease.view(0, dtype=torch.float32, shape=(8,)).fill_(1)
    two = lease.view(32, dtype=torch.float32, shape=(8,)).fill_(2)
    file = io.BytesIO()
    torch.save(one, file)
    assert file.tell() < 4096
    twin = copy.deepcopy(one)
    assert twin.data_ptr() != one.data_ptr()
    assert torch.equal(twin, one)
    save_file({"one": one, "two": two}, tmp_path / "both.safetensors")  # it refuses tensors that share a storage
    loaded = load_file(tmp_path / "both.safetensors")
    assert torch.equal(loaded["one"], one)
    assert torch.equal(loaded["two"], two)


def test_resizing_a_tensor_does_not_reach_the_arena() -> None:
    """A storage over an arena refuses to grow, so nothing can run past its own bytes."""
    lease = Arena(4096).lease()
    tensor = lease.view(0, dtype=torch.float32, shape=(4,))
    with pytest.raises(RuntimeError):
        tensor.resize_(1 << 20)
    assert tensor.untyped_storage().nbytes() == 16


def test_memory_is_private_and_zero_at_first() -> None:
    """A fresh arena is zero, and populating any range of it changes nothing."""
    arena = Arena(3 * 4096 + 5)
    for start, nbytes in ((0, 0), (0, 1), (4095, 2), (0, 1 << 40), (3 * 4096, 5)):
        arena.populate(start, nbytes)
    assert not any(arena.lease().bytes(0, arena.nbytes))


def test_an_arena_of_no_bytes_can_be_lent() -> None:
    """A module without weights gets an arena like any other."""
    arena = Arena(0)
    lease = arena.lease()
    assert lease.view(0, dtype=torch.float32, shape=(0,)).numel() == 0
    del lease
    assert arena.is_free


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), ValueError("x"), OverflowError(), MemoryError()]
)
def test_memory_that_is_not_there_is_a_typed_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused mapping is a MemoryPlanError that says how much was wanted."""

    class NoMemory(seam.Seam):
        def map_anonymous(self, nbytes: int) -> mmap.mmap:
            raise error

    monkeypatch.setattr(seam, "active", NoMemory())
    with pytest.raises(MemoryPlanError) as caught:
        Arena(4096)
    assert "4096" in str(caught.value)
