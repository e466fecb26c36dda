"""Exchanging tensors: each side gets the other's bytes, or, after a failure at any copy, keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hotglm import seam
from hotglm.weights import exchange as exchange_module
from hotglm.weights.exchange import Exchange, Pair, is_dense
from support.exchanges import FailAt
from support.swaps import same_bits

PIECE_NBYTES = 4096


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes several pieces need not be large; and threads start for little."""
    monkeypatch.setattr(exchange_module, "PIECE_NBYTES", PIECE_NBYTES)
    monkeypatch.setattr(exchange_module, "_SMALL_NBYTES", 0)


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.randn(5, 3)


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: _random((7, 5)),
    "bfloat16": lambda: _random((3, 3), torch.bfloat16),
    "float8": lambda: _random((9,), torch.float8_e4m3fn),
    "bool": lambda: _random((4,), torch.bool),
    "complex64": lambda: _random((2, 2), torch.complex64),
    "int64": lambda: _random((3,), torch.int64),
    "no dimension": lambda: _random(()),
    "nothing": lambda: _random((0, 4)),
    "transposed": lambda: _random((5, 7)).t(),
    "permuted": lambda: _random((2, 3, 4)).permute(2, 0, 1),
    "columns of a table": lambda: _random((6, 8))[:, 2:5],
    "every other": lambda: _random((64,))[::2],
    "several pieces": lambda: _random((PIECE_NBYTES // 4 * 2 + 17,)),
    "rows of several pieces": lambda: _random((50, 128))[:, :100],
    "wide rows with gaps": lambda: _random((2, 3, PIECE_NBYTES))[:, :, ::2],
    "inference": _inference,
}


def _pairs(names: list[str]) -> list[Pair]:
    return [Pair(name=name, live=TENSORS[name](), image=TENSORS[name]()) for name in names]


def _values(pairs: list[Pair]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(pair.live.detach().clone(), pair.image.detach().clone()) for pair in pairs]


@pytest.mark.parametrize("name", TENSORS)
def test_each_side_gets_the_bytes_of_the_other(name: str) -> None:
    """Whatever the dtype, shape and strides, NaN bits included; a second run brings everything home."""
    pairs = _pairs([name])
    before = _values(pairs)
    address = pairs[0].live.data_ptr()
    exchange = Exchange(pairs, num_threads=1)
    exchange.run()
    assert same_bits(_values(pairs), [(image, live) for live, image in before])
    Exchange(pairs, num_threads=3).run()
    assert same_bits(_values(pairs), before)
    assert pairs[0].live.data_ptr() == address


def test_what_lies_in_the_gaps_of_a_tensor_is_not_touched() -> None:
    """The columns between those of a tensor belong to somebody else."""
    table, other = _random((6, 8)), _random((6, 8))
    gaps = table[:, 5:].clone(), table[:, :2].clone()
    Exchange([Pair(name="w", live=table[:, 2:5], image=other[:, 2:5])], num_threads=1).run()
    assert same_bits((table[:, 5:], table[:, :2]), gaps)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_many_tensors_by_several_threads(num_threads: int) -> None:
    """Each lane takes its share, and all of them together every byte once."""
    pairs = _pairs([*TENSORS, *TENSORS, *["several pieces"] * 3])
    before = _values(pairs)
    exchange = Exchange(pairs, num_threads=num_threads)
    exchange.run()
    assert same_bits(_values(pairs), [(image, live) for live, image in before])
    assert exchange.nbytes == sum(pair.live.numel() * pair.live.element_size() for pair in pairs)
    assert exchange.buffer_nbytes <= num_threads * PIECE_NBYTES
    exchange.undo()
    assert same_bits(_values(pairs), before)


@pytest.mark.parametrize("uncounted", [False, True], ids=["before a copy", "after one that was not counted"])
def test_a_failure_at_every_copy_is_undone(monkeypatch: pytest.MonkeyPatch, uncounted: bool) -> None:
    """F18: both sides hold what they held, wherever it failed, also where a copy had ended and was not counted yet."""
    names = ["float32", "several pieces", "transposed", "columns of a table", "bool"]
    num_copies = 3 * sum(3 if name == "several pieces" else 1 for name in names)
    for nth in range(1, num_copies + 1):
        pairs = _pairs(names)
        before = _values(pairs)
        exchange = Exchange(pairs, num_threads=1)
        with monkeypatch.context() as patch:
            patch.setattr(seam, "active", FailAt(nth))
            with pytest.raises(MemoryError, match="planted"):
                exchange.run()
        if uncounted and nth > 1:
            exchange._lanes[0]._ended -= 1
        exchange.undo()
        assert same_bits(_values(pairs), before), nth
        exchange.run()
        assert same_bits(_values(pairs), [(image, live) for live, image in before]), nth


class Stubborn(TorchFunctionMode):
    """Fails before the nth `copy_` of torch itself."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left = nth

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("planted")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stopped_at", [5, 7, 8, 9])
def test_an_undo_that_fails_goes_on_where_it_failed(monkeypatch: pytest.MonkeyPatch, stopped_at: int) -> None:
    """A second call of `undo` ends what the first one began, from every copy of the way back."""
    for nth in range(1, 10):
        pairs = _pairs(["float32", "bfloat16", "bool"])
        before = _values(pairs)
        exchange = Exchange(pairs, num_threads=1)
        with monkeypatch.context() as patch:
            patch.setattr(seam, "active", FailAt(stopped_at))
            with pytest.raises(MemoryError):
                exchange.run()
        try:
            with Stubborn(nth):
                exchange.undo()
        except MemoryError:
            exchange.undo()
        assert same_bits(_values(pairs), before), nth


def test_a_graph_that_saved_a_tensor_notices() -> None:
    """G06: the write counts in torch's version, which a backward pass compares."""
    for name in ("float32", "transposed", "columns of a table"):
        pair = _pairs([name])[0]
        versions = pair.live._version, pair.image._version
        Exchange([pair], num_threads=1).run()
        assert pair.live._version > versions[0]
        assert pair.image._version > versions[1]


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(2, 3), True),
        (torch.empty(2, 3).t(), True),
        (torch.empty(1, 3).as_strided((1, 3), (99, 1)), True),
        (torch.empty(0, 3), True),
        (torch.empty(()), True),
        (torch.empty(4, 4)[:, :2], False),
        (torch.empty(1).expand(4), False),
        (torch.empty(6).as_strided((2, 3), (1, 1)), False),
        (torch.empty(9).as_strided((3, 3), (2, 2)), False),
        (torch.empty(9).as_strided((2, 2, 2), (1, 3, 3)), False),
    ],
)
def test_dense_means_each_byte_once(tensor: torch.Tensor, dense: bool) -> None:
    """Gaps, expansion and overlap are not dense; the stride of a dimension of one element means nothing."""
    assert is_dense(tensor) is dense
