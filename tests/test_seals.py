"""Seals: what is copied is what its digest says, found out at the speed of memory, whatever wrote it meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotglm.weights import seals
from hotglm.weights.digest import digest_tensor, tensor_bytes
from hotglm.weights.dtypes import LOADABLE_DTYPES
from hotglm.weights.seals import Seal, copy_sealed, seal_tensor
from support.spares import random_tensor

SHAPES: tuple[tuple[int, ...], ...] = ((), (0, 3), (1,), (5,), (129, 3), (16, 8, 3, 3))


def _copy(tensor: torch.Tensor, seal: Seal) -> tuple[torch.Tensor, Seal | None]:
    view = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return view, copy_sealed(view, tensor, seal)


@pytest.mark.parametrize("dtype", sorted(LOADABLE_DTYPES, key=str))
@pytest.mark.parametrize("is_known", [True, False])
def test_a_copy_has_the_bytes_and_a_seal_of_its_own(dtype: torch.dtype, is_known: bool) -> None:
    """Whatever the dtype and shape, with a fingerprint and without, the copy is exact and its seal serves the next."""
    for shape in SHAPES:
        tensor = random_tensor(dtype, *shape)
        taken = seal_tensor(tensor, digest=None, is_finite=True)
        assert taken.digest == digest_tensor(tensor)
        view, found = _copy(tensor, taken if is_known else Seal(digest=taken.digest, is_finite=True))
        assert found == taken
        assert torch.equal(tensor_bytes(view), tensor_bytes(tensor))
        assert _copy(view, found)[1] == taken


@pytest.mark.parametrize("is_known", [True, False])
def test_layouts_that_are_not_row_major_are_copied_too(is_known: bool) -> None:
    """Channels last, transposed, expanded and gappy tensors keep their digests, which are of row-major bytes."""
    plain = torch.randn(4, 6, 3, 5)
    gappy = torch.randn(8, 8)[:, ::2]
    for tensor in (plain.contiguous(memory_format=torch.channels_last), plain[0, 0].t(), gappy):
        taken = seal_tensor(tensor, digest=None, is_finite=False)
        assert taken.digest == digest_tensor(tensor)
        view, found = _copy(tensor, taken if is_known else Seal(digest=taken.digest))
        assert torch.equal(view, tensor)
        assert found is not None
        assert found.digest == taken.digest
        other = torch.empty(tensor.shape)
        assert copy_sealed(other, tensor, taken) is not None
        assert torch.equal(other, tensor)


@given(numel=st.integers(1, 3000), bit=st.integers(0, 10**9), is_known=st.booleans())
def test_every_flipped_bit_is_found(numel: int, bit: int, is_known: bool) -> None:
    """A tensor in which any one bit has flipped since it was sealed is not copied as what it was (C02)."""
    tensor = torch.arange(numel, dtype=torch.uint8)
    taken = seal_tensor(tensor, digest=None, is_finite=True)
    seal = taken if is_known else Seal(digest=taken.digest)
    index = bit // 8 % numel
    poked = (ctypes.c_uint8 * numel).from_address(tensor.data_ptr())
    poked[index] ^= 1 << bit % 8
    assert _copy(tensor, seal)[1] is None
    poked[index] ^= 1 << bit % 8
    assert _copy(tensor, seal)[1] is not None


@pytest.mark.parametrize("nbytes", [seals._CHUNK_NBYTES + 8, 3 * seals._CHUNK_NBYTES + 1])
def test_what_moved_is_found(nbytes: int) -> None:
    """Words that change places within a stripe or between chunks, and ends that are cut off, change a fingerprint."""
    tensor = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    taken = seal_tensor(tensor, digest=None, is_finite=True)
    for one, other in ((0, 8), (0, seals._CHUNK_NBYTES), (nbytes - 8, 16)):
        moved = tensor.clone()
        moved[one : one + 8], moved[other : other + 8] = tensor[other : other + 8], tensor[one : one + 8]
        assert _copy(moved, taken)[1] is None
    assert _copy(tensor, taken)[1] == taken


def _swap_rows(weight: torch.Tensor) -> None:
    weight[[0, 3]] = weight[[3, 0]]


@pytest.mark.parametrize("width", [4, 32, 509, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        _swap_rows,
        lambda weight: weight.copy_(weight.flip(0)),
        lambda weight: weight.copy_(weight.roll(1, 0)),
        lambda weight: weight[:, 3].neg_(),
        lambda weight: weight[::2, 3].mul_(2),
        lambda weight: weight[:2, 3].neg_(),
        lambda weight: weight[:, 1::2].neg_(),
    ],
)
def test_what_programs_do_to_weights_in_place_is_found(
    width: int, dtype: torch.dtype, change: Callable[[torch.Tensor], object]
) -> None:
    """Rows that trade places and columns that change their signs, at the strides that weights have, are found."""
    weight = torch.randn(1024, width).to(dtype)
    taken = seal_tensor(weight, digest=None, is_finite=True)
    assert seals.is_intact(weight, taken)
    change(weight)
    assert digest_tensor(weight) != taken.digest
    assert not seals.is_intact(weight, taken)
    assert _copy(weight, taken)[1] is None


def test_a_tensor_that_begins_between_two_words_is_sealed_by_its_digest() -> None:
    """A parameter that is a part of a flat one, at an odd place, is hashed and copied like any other."""
    tensor = torch.randn(65).to(torch.bfloat16)[1:].view(8, 8)
    taken = seal_tensor(tensor, digest=None, is_finite=False)
    assert taken.digest == digest_tensor(tensor)
    view = torch.empty(8, 8, dtype=torch.bfloat16)
    assert copy_sealed(view, tensor, taken) is not None
    assert torch.equal(view, tensor)


def test_what_is_written_while_it_is_copied_is_found() -> None:
    """The copy is what is proved, not the original: bytes that change between two chunks are found out."""
    tensor = torch.zeros(3 * seals._CHUNK_NBYTES, dtype=torch.uint8)
    taken = seal_tensor(tensor, digest=None, is_finite=True)
    calls: list[int] = []

    def pause() -> None:
        calls.append(1)
        if len(calls) == 3:
            tensor.fill_(7)

    view = torch.empty_like(tensor)
    assert copy_sealed(view, tensor, taken, pause=pause) is None
