"""Fingerprints of what is on a device: by a few kernels for all of it, and one transfer of a few bytes for each tensor.

Rules this module keeps:

- Nothing is written but scratch, which is bounded whatever is looked at; nothing of a tensor's size is allocated.
- The host waits once, at the end, and for nothing but the fingerprints.
- All work is on the side stream, and so comes after every copy that was submitted before ([Note: streams] in
  weights/device.py). Whoever looks at what others may be writing puts the side stream behind them first.

[Note: fingerprint on a device]
It has the purpose of the one on the processor (weights/seals.py), and another shape, because there is one pass over
memory to be had, and no SHA-256. Words of 64 bits lie in rows of 4093, and 127 rows are a block. The columns of each
block are summed up, wrapping: the one pass. What comes of it, less than a hundredth, is cut into sections of 4096
words, whose halves are multiplied by odd numbers of 64 bits that were drawn once, and summed up again, one sum for each
section. The host hashes these with SHA-256.

Every flip of a bit changes a column, and every word that moves changes two, unless it moves by a multiple of 4093
words in its block, which no row of weights does whose width has few prime factors. 127 and 4093 are primes, so highest
bits, which cancel in pairs, fall on some columns an odd number of times, as there. A section whose columns changed in
whatever way keeps its sum with a probability below 2**-32: multiplying *halves* leaves the highest bit no place to
cancel in. (Sums of rows beside those of columns, as on the processor, would read everything twice.)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch

from hotglm.weights.device import Device
from hotglm.weights.digest import view_buffer
from hotglm.weights.download import digest_on_device
from hotglm.weights.seals import WORD_NBYTES, Seal, find_flat
from hotglm.weights.workers import Cancellation

__all__ = ["find_unchanged", "seal_on_device", "take_fingerprints"]

_NUM_COLUMNS = 4093
_NUM_ROWS = 127
_ROW_NBYTES = _NUM_COLUMNS * WORD_NBYTES
_PIECE_NBYTES = 32 * _NUM_ROWS * _ROW_NBYTES
"""Largest part of a tensor that is summed up at once: 133 MB."""

_SECTION = 4096
_MAX_SECTIONS = 256
"""Sections in scratch: 24 MiB with their products. A piece has 34 at most."""

_SECTION_NBYTES = 3 * _SECTION * WORD_NBYTES
"""Of scratch: words, and their products."""

_SPARE = 4
"""How many times the scratch has to be free: torch takes whole blocks, and others take some meanwhile."""

_SEED = 0x686F74


def take_fingerprints(
    tensors: Sequence[torch.Tensor], device: Device, *, pause: Callable[[], object] = lambda: None
) -> list[int | None]:
    """Return the fingerprint of each tensor, at the speed of the device's memory.

    Args:
        tensors: of `device`; only read. Nobody writes them meanwhile but by the side stream, before.
        device: theirs.
        pause: called now and then; whatever it raises ends the work.

    Returns:
        One for each, in order. None where the elements of a tensor do not fill its memory, each once and from a word
        on; None for all where the device has no room for scratch.
    """
    flats = [_find_aligned(tensor) for tensor in tensors]
    wanted = [flat for flat in flats if flat is not None]
    if not wanted:
        return [None] * len(flats)
    num_sections = _count_scratch(wanted)
    try:
        with torch.inference_mode(mode=False), torch.no_grad(), device.staging(), device.submitting():
            # Torch would empty its cache for scratch that does not fit, which waits for the whole device.
            if device.read_free_nbytes() < _SPARE * num_sections * _SECTION_NBYTES:
                return [None] * len(flats)
            found = iter(_Summing(wanted, num_sections).run(pause))
    except torch.OutOfMemoryError:
        return [None] * len(flats)
    return [None if flat is None else next(found) for flat in flats]


def find_unchanged(
    tensors: Mapping[str, torch.Tensor],
    seals: Mapping[str, Seal],
    device: Device,
    *,
    pause: Callable[[], object] = lambda: None,
) -> set[str]:
    """Return the names of those tensors that have the fingerprint of their seal; one without any tells nothing."""
    names = [name for name, tensor in tensors.items() if _can_tell(seals[name], tensor)]
    found = take_fingerprints([tensors[name] for name in names], device, pause=pause)
    return {name for name, one in zip(names, found, strict=True) if one is not None and one == seals[name].fingerprint}


def _can_tell(seal: Seal, tensor: torch.Tensor) -> bool:
    return seal.fingerprint is not None and seal.stride == tensor.stride()


def seal_on_device(tensor: torch.Tensor, device: Device, *, cancellation: Cancellation) -> Seal:
    """Return the seal of a tensor, whose bytes are fetched to be hashed; see `digest_on_device`.

    The fingerprint is taken before and after, and kept only where both are the same: then it is of the bytes that were
    hashed.

    Raises:
        MemoryPlanError: there is no pinned memory to be had.
        StageFailedError: the device has failed under every window of the ring.
    """
    (before,) = take_fingerprints([tensor], device, pause=cancellation.raise_if_cancelled)
    digest = digest_on_device(tensor, device, cancellation=cancellation)
    (after,) = take_fingerprints([tensor], device, pause=cancellation.raise_if_cancelled)
    if before is None or before != after:
        return Seal(digest=digest)
    return Seal(digest=digest, fingerprint=after, stride=tensor.stride())


def _find_aligned(tensor: torch.Tensor) -> torch.Tensor | None:
    flat = find_flat(tensor)
    return None if flat is None or (flat.numel() and flat.data_ptr() % WORD_NBYTES) else flat


@functools.cache
def _draw_multipliers(place: torch.device) -> torch.Tensor:
    """Return as many odd numbers as a section has halves of words; the same in every process."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (2 * _SECTION,), dtype=torch.int64, generator=generator, device="cpu")
    return (drawn | 1).to(place)


class _Summing:
    """One look at some flat tensors of one device: scratch, what is in it, and what came of it so far."""

    def __init__(self, flats: Sequence[torch.Tensor], num_sections: int) -> None:
        self._flats = flats
        place = flats[0].device
        self._words = torch.zeros(num_sections * _SECTION, dtype=torch.int64, device=place)
        self._products = torch.empty((num_sections, 2 * _SECTION), dtype=torch.int64, device=place)
        self._multipliers = _draw_multipliers(place)
        self._num_used = 0
        self._sums: list[torch.Tensor] = []

    def run(self, pause: Callable[[], object]) -> list[int]:
        counts = []
        for flat in self._flats:
            count = 0
            for piece in _cut(flat):
                pause()
                count += self._add(piece)
            counts.append(count)
        self._multiply()
        # The one wait.
        sums = torch.cat(self._sums).cpu() if self._sums else torch.empty(0, dtype=torch.int64, device="cpu")
        return [_hash(each) for each in torch.split(sums, counts)]

    def _add(self, piece: torch.Tensor) -> int:
        """Sum the columns of a piece up into scratch; return how many sections they take there."""
        count = _count_sections(piece.numel())
        if (self._num_used + count) * _SECTION > self._words.numel():
            self._multiply()
        target = self._words[self._num_used * _SECTION :]
        self._num_used += count
        num_rows = piece.numel() // _ROW_NBYTES
        num_blocks, num_left = divmod(num_rows, _NUM_ROWS)
        rows = piece[: num_rows * _ROW_NBYTES].view(torch.int64).view(num_rows, _NUM_COLUMNS)
        at = num_blocks * _NUM_COLUMNS
        if num_blocks:
            blocks = rows[: num_rows - num_left].view(num_blocks, _NUM_ROWS, _NUM_COLUMNS)
            torch.sum(blocks, dim=1, out=target[:at].view(num_blocks, _NUM_COLUMNS))
        if num_left:
            torch.sum(rows[num_rows - num_left :], dim=0, out=target[at : at + _NUM_COLUMNS])
            at += _NUM_COLUMNS
        tail = piece[num_rows * _ROW_NBYTES :]
        if tail.numel():
            target[at:].view(torch.uint8)[: tail.numel()].copy_(tail)
        return count

    def _multiply(self) -> None:
        """Sum up each section in scratch, its halves of words times the multipliers; empty scratch."""
        if not self._num_used:
            return
        words, products = self._words[: self._num_used * _SECTION], self._products[: self._num_used]
        torch.mul(words.view(torch.int32).view(self._num_used, 2 * _SECTION), self._multipliers, out=products)
        self._sums.append(products.sum(1))
        words.zero_()
        self._num_used = 0


def _cut(flat: torch.Tensor) -> list[torch.Tensor]:
    return [flat[start : start + _PIECE_NBYTES] for start in range(0, flat.numel(), _PIECE_NBYTES)]


def _count_scratch(flats: Sequence[torch.Tensor]) -> int:
    """Return how many sections of scratch are taken to look at some tensors."""
    num_sections = sum(_count_sections(piece.numel()) for flat in flats for piece in _cut(flat))
    return max(1, min(_MAX_SECTIONS, num_sections))


def _count_sections(nbytes: int) -> int:
    """Return how many sections the sums of a piece and what is left of it take."""
    num_rows, tail_nbytes = divmod(nbytes, _ROW_NBYTES)
    num_words = -(-num_rows // _NUM_ROWS) * _NUM_COLUMNS + -(-tail_nbytes // WORD_NBYTES)
    return -(-num_words // _SECTION)


def _hash(sums: torch.Tensor) -> int:
    hashed = hashlib.sha256(b"device")
    if sums.numel():
        hashed.update(view_buffer(sums.contiguous().view(torch.uint8)))
    return int.from_bytes(hashed.digest()[:WORD_NBYTES], "little")
