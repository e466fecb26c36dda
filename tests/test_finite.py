"""Finding NaN and infinity: exactly what `torch.isfinite` finds, in every dtype, and at memory speed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotglm.weights import finite
from hotglm.weights.dtypes import LOADABLE_DTYPES
from hotglm.weights.finite import NonFinite, find_nonfinite

FLOATS = sorted((d for d in LOADABLE_DTYPES if d.is_floating_point or d.is_complex), key=str)
WHOLE = sorted((d for d in LOADABLE_DTYPES if not (d.is_floating_point or d.is_complex)), key=str)


def _reference(tensor: torch.Tensor) -> NonFinite | None:
    """Say the same element by element, in Python."""
    wide = tensor if tensor.dtype.is_complex else tensor.to(torch.float64)
    bad = [i for i, value in enumerate(wide.reshape(-1)) if not torch.isfinite(value)]
    return NonFinite(num_elements=len(bad), first_index=bad[0]) if bad else None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.binary(min_size=0, max_size=96), columns=st.integers(1, 3))
def test_any_bits_are_judged_as_the_reference_judges_them(dtype: torch.dtype, data: bytes, columns: int) -> None:
    """For any bit pattern of any floating dtype, count and first index are those of an element-wise search."""
    numel = len(data) // dtype.itemsize // columns * columns
    raw = torch.frombuffer(bytearray(data[: numel * dtype.itemsize]), dtype=torch.uint8) if numel else torch.empty(0)
    tensor = raw.view(dtype).reshape(-1, columns) if numel else torch.empty(0, columns, dtype=dtype)
    assert find_nonfinite(tensor) == _reference(tensor)
    assert find_nonfinite(tensor.t()) == _reference(tensor.t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, 6, 11])
def test_one_nan_is_found_wherever_it_is(dtype: torch.dtype, place: int) -> None:
    """A single NaN among ones is counted and located."""
    tensor = torch.ones(12).to(dtype)
    tensor[place] = float("nan")
    assert find_nonfinite(tensor.reshape(3, 4)) == NonFinite(num_elements=1, first_index=place)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_finite_numbers_are_no_false_alarm(dtype: torch.dtype) -> None:
    """Extreme, denormal, zero and constant values are finite."""
    info = torch.finfo(dtype)
    values = [info.max, info.smallest_normal, 1.0] if "e8m0" in str(dtype) else [info.max, info.min, info.tiny, 0.0]
    assert find_nonfinite(torch.tensor(values, dtype=torch.float64).to(dtype)) is None
    assert find_nonfinite(torch.full((5,), 1.0).to(dtype)) is None


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_whole_numbers_are_finite(dtype: torch.dtype) -> None:
    """Integers and booleans, all bits set, are never looked at twice."""
    assert find_nonfinite(torch.ones(4, dtype=dtype)) is None


@pytest.mark.parametrize("part", ["real", "imag"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_both_parts_of_a_complex_number_count(part: str, value: float) -> None:
    """A complex number is finite only if its real and imaginary parts are; lazily conjugated ones too."""
    tensor = torch.ones(6, dtype=torch.complex64)
    getattr(tensor, part)[4] = value
    assert find_nonfinite(tensor) == find_nonfinite(tensor.conj()) == NonFinite(num_elements=1, first_index=4)


def test_a_scalar_and_an_empty_tensor_are_judged() -> None:
    """Tensors of no dimension or no element need no special care by the caller."""
    assert find_nonfinite(torch.tensor(float("inf"))) == NonFinite(num_elements=1, first_index=0)
    assert find_nonfinite(torch.tensor(1.0)) is None
    assert find_nonfinite(torch.empty(0, 3)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_the_search_goes_on_over_its_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index and count are right when the tensor is longer than one chunk of the search."""
    monkeypatch.setattr(finite, "_CHUNK_NUMEL", 8)
    tensor = torch.ones(30).to(dtype)
    tensor[[13, 14, 29]] = float("nan")
    assert find_nonfinite(tensor) == NonFinite(num_elements=3, first_index=13)


def test_a_parameter_is_judged_without_touching_its_graph() -> None:
    """Tensors that require gradients are only looked at."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, float("nan")]))
    assert find_nonfinite(parameter) == NonFinite(num_elements=1, first_index=1)
    assert parameter.grad_fn is None
