"""From an old tensor to a new one: the smallest payload that is exact to the bit, and back into memory that is there.

Rules this module keeps:

- `decode_into(encode(old, new)) on old == new`, bit for bit, for every dtype that can be loaded (C16): elements are
  integers of their size throughout, so that NaN keep their payload and -0.0 its sign (C12).
- Nothing of a payload is believed: sizes are compared before memory is taken, indices before they are used, and what
  comes out is hashed by whoever called. What is wrong is a `DeltaError` that names the tensor.
- Without the extra `delta` tensors are encoded all the same, with the codecs that need none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hotglm.delta_fields import WHOLE
from hotglm.errors import DeltaError, Problem
from hotglm.weights.delta_parts import Part, PayloadError
from hotglm.weights.delta_sparse import decode_sparse, encode_sparse, verify_sparse
from hotglm.weights.delta_xor import decode_xor, encode_xor, verify_xor
from hotglm.weights.digest import tensor_bytes
from hotglm.weights.zstd import has_zstd

__all__ = ["SPARSE", "XOR", "Encoded", "decode_into", "encode", "verify_parts"]

XOR = "xor-zstd"
SPARSE = "sparse"

_MIN_SAVING = {SPARSE: 16, XOR: 4}
"""One part in so many is the least that a codec must save: reading a tensor whole is faster than decoding it, and three
times as fast as undoing compression. Weights that were trained anew still share signs and exponents with the old ones,
which saves a tenth of their bytes, and is not worth that."""

_REMEDY = "fetch the delta again, or stage the full release."


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What makes a new tensor of an old one.

    Attributes:
        codec: name of the codec.
        parts: tensors of the payload, in the codec's order; for `whole`, the new tensor itself, without a copy.
    """

    codec: str
    parts: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts)


def encode(old: torch.Tensor | None, new: torch.Tensor) -> Encoded:
    """Return the smallest payload that makes `new` of `old`, or `new` as it is where that saves too little.

    `sparse` must save a sixteenth of the bytes, and `xor-zstd`, which takes longer to apply, a quarter.

    Args:
        old: on the CPU; None, or of another dtype or shape, where there is none to start from.
        new: on the CPU. Neither is written.

    Example:
        >>> from hotglm.weights.delta_parts import TensorPart
        >>> old = torch.zeros(1000)
        >>> new = old.clone()
        >>> new[7] = -0.0
        >>> encoded = encode(old, new)
        >>> encoded.codec, encoded.nbytes
        ('sparse', 5)
        >>> decode_into(old, codec=encoded.codec, parts=[TensorPart(tensor=part) for part in encoded.parts], name="w")
        >>> torch.equal(old.view(torch.int32), new.view(torch.int32))
        True
    """
    whole = Encoded(codec=WHOLE, parts=(new.detach(),))
    if old is None or old.dtype is not new.dtype or old.shape != new.shape or not new.numel():
        return whole
    before, after = tensor_bytes(old), tensor_bytes(new)
    limits = {codec: after.numel() - max(1, after.numel() // part) for codec, part in _MIN_SAVING.items()}
    best = whole
    sparse = encode_sparse(before, after, dtype=new.dtype)
    if sparse is not None and (found := Encoded(codec=SPARSE, parts=sparse)).nbytes <= limits[SPARSE]:
        best = found
    limit = min(limits[XOR], best.nbytes - 1)
    if has_zstd() and (xor := encode_xor(before, after, itemsize=new.element_size(), limit=limit)) is not None:
        best = Encoded(codec=XOR, parts=(xor,))
    return best


def verify_parts(name: str, codec: str, parts: Sequence[Part], *, dtype: torch.dtype, numel: int) -> None:
    """Refuse parts whose headers alone say that they cannot be applied; no byte of them is read.

    Args:
        name: of the tensor.
        codec: as the delta names it.
        parts: of its payload.
        dtype: of the tensor.
        numel: its elements.

    Raises:
        DeltaError: they cannot.
    """
    try:
        if codec == XOR and len(parts) == 1:
            verify_xor(parts[0], nbytes=numel * dtype.itemsize)
        elif codec == SPARSE and len(parts) == 2:
            verify_sparse(parts[0], parts[1], dtype=dtype, numel=numel)
        else:
            message = f"Expected {XOR!r} with one part or {SPARSE!r} with two, got {codec!a} with {len(parts)}."
            raise PayloadError("DELTA_BAD_CODEC", message)
    except PayloadError as fault:
        raise _name_tensor(fault, name) from fault


def decode_into(
    view: torch.Tensor, *, codec: str, parts: Sequence[Part], name: str, pause: Callable[[], object] = lambda: None
) -> None:
    """Make a new tensor of an old one, in place.

    Memory beside `view`: a few pieces of at most 1 MiB. The result is not verified here; hash it.

    Args:
        view: the old tensor; contiguous, on the CPU; worthless after an error.
        codec: `xor-zstd` or `sparse`; a whole tensor is read by whoever reads tensors.
        parts: of its payload.
        name: of the tensor, for errors.
        pause: called before each piece; whatever it raises ends the work.

    Raises:
        DeltaError: the payload is broken (DELTA_BAD_PAYLOAD), too large (DELTA_TOO_LARGE), names elements that are not
            there or twice (DELTA_BAD_INDEX), or is of another codec (DELTA_BAD_CODEC).
        MissingExtraError: it needs the extra `delta`.
        SourceReadError, SourceChangedError: a part cannot be read.
    """
    verify_parts(name, codec, parts, dtype=view.dtype, numel=view.numel())
    flat = tensor_bytes(view)
    try:
        if codec == XOR:
            decode_xor(flat, parts[0], itemsize=view.element_size(), pause=pause)
        else:
            decode_sparse(flat, parts[0], parts[1], dtype=view.dtype, pause=pause)
    except PayloadError as fault:
        raise _name_tensor(fault, name) from fault


def _name_tensor(fault: PayloadError, name: str) -> DeltaError:
    problem = Problem(code=fault.code, message=str(fault), tensor=name)
    return DeltaError("Expected a delta that can be applied.", problems=[problem], remedy=_REMEDY)
