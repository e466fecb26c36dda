"""Digests: those of a file's byte ranges, whatever the tensor's strides, and of a state without ambiguity."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hotglm.release.files import open_weights
from hotglm.weights.digest import combine_digests, digest_tensor
from hotglm.weights.dtypes import LOADABLE_DTYPES


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    numel = int(torch.Size(shape).numel())
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (numel * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", sorted(LOADABLE_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,), (3, 0)], ids=str)
def test_a_digest_is_the_sha256_of_the_files_byte_range(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Anybody can recompute a tensor's digest from the safetensors file with `sha256sum` on its byte range."""
    tensor = _random(dtype, *shape)
    path = tmp_path / "model.safetensors"
    save_file({"before": torch.ones(3), "t": tensor}, path)
    with open_weights(path) as files:
        at = files.tensors["t"]
    data = path.read_bytes()[at.offset : at.offset + at.nbytes]
    assert digest_tensor(tensor) == _sha256(data)


def test_strides_views_and_gradients_do_not_matter() -> None:
    """Equal elements have equal digests: transposed, channels-last, sliced, expanded or on the autograd tape."""
    dense = torch.randn(2, 3, 4, 5)
    wanted = digest_tensor(dense)
    assert digest_tensor(dense.to(memory_format=torch.channels_last)) == wanted
    assert digest_tensor(dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)) == wanted
    assert digest_tensor(torch.cat([dense, dense])[2:]) == wanted
    assert digest_tensor(dense.clone().requires_grad_()) == wanted
    assert digest_tensor(torch.ones(1, 1).expand(2, 3)) == digest_tensor(torch.ones(2, 3))
    assert digest_tensor(torch.ones(4)[::2][:1]) == digest_tensor(torch.ones(1))


def test_lazily_negated_and_conjugated_tensors_have_the_digest_of_their_values() -> None:
    """Tensors whose sign or conjugation torch has put off are hashed by value."""
    z = torch.tensor([1 + 2j, -3 + 0.5j])
    assert digest_tensor(z.conj()) == digest_tensor(z.conj().resolve_conj())
    assert digest_tensor(z.conj().imag) == digest_tensor(torch.tensor([-2.0, -0.5]))
    assert digest_tensor(torch._neg_view(torch.ones(3))) == digest_tensor(-torch.ones(3))


def test_bits_decide_not_values() -> None:
    """Minus zero and the payload of a NaN are part of the digest."""
    assert digest_tensor(torch.tensor([0.0])) != digest_tensor(torch.tensor([-0.0]))
    quiet, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert digest_tensor(quiet) != digest_tensor(other)


def test_a_states_digest_does_not_depend_on_order() -> None:
    """The digest of a state is that of the set of its tensors."""
    entries = {name: (torch.float32, (2, 3), _sha256(name.encode())) for name in "cab"}
    assert combine_digests(entries) == combine_digests(dict(sorted(entries.items())))


_ENTRY = st.tuples(
    st.sampled_from([torch.float32, torch.int32]), st.sampled_from([(), (1,), (1, 2)]), st.sampled_from(["x", "y"])
)
_STATES = st.dictionaries(st.text(alphabet='a"\n \\é', max_size=4), _ENTRY, max_size=3)


@given(_STATES, _STATES)
def test_states_that_differ_have_digests_that_differ(
    one: dict[str, tuple[torch.dtype, tuple[int, ...], str]], other: dict[str, tuple[torch.dtype, tuple[int, ...], str]]
) -> None:
    """Names, dtypes, shapes and digests all count, and no name can imitate another line."""
    assert (combine_digests(one) == combine_digests(other)) == (one == other)


def test_a_name_cannot_imitate_a_second_tensor() -> None:
    """A newline in a name is written as an escape, so one strange name is not two plain ones."""
    entry = (torch.float32, (1,), "sha256:00")
    forged = 'a" float32 [1] sha256:00\n"b'
    assert combine_digests({forged: entry}) != combine_digests({"a": entry, "b": entry})
