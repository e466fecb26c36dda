"""Two releases become a delta: what changed, encoded tensor by tensor on all cores, in one payload.

Rules this module keeps:

- A tensor of equal digest, dtype and shape costs nothing: it is not read. One that changed becomes what is smallest.
- The result digest of the delta is that of the new release: applying it gives its very bytes, headers too (X1, D5).
- Memory is bounded: a few tensors for each core. The delta appears whole or not at all (R2, C15).
- Both sides are verified by digest as they are read; a delta is never made of bytes that nobody promised.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hotglm.delta_fields import PAYLOAD_NAME, WHOLE, BaseRelease, DeltaFields, TensorDelta
from hotglm.deltas.ordered import run_ordered
from hotglm.deltas.payload_file import PayloadWriter, measure_header
from hotglm.deltas.reading import ResultReader, WeightsReader, open_result, typed_view
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.file_entry import FileEntry, combine_pieces
from hotglm.header import PREFIX_NBYTES, parse_header
from hotglm.manifest import format_manifest
from hotglm.manifest_fields import ReleasedTensor
from hotglm.progress import Progress
from hotglm.release.directory import Release, open_release
from hotglm.release.hashing import HashMeter
from hotglm.release.placing import find_destination, place_release, write_manifest
from hotglm.release.side_files import copy_side_files
from hotglm.release.writing import writing
from hotglm.weights.delta_codec import encode
from hotglm.weights.digest import digest_tensor, tensor_bytes
from hotglm.weights.dtypes import dtype_name

if TYPE_CHECKING:
    from hotglm.trust.keys import SigningKey

__all__ = ["Payload", "PayloadOverrun", "make_delta", "name_payload", "write_payload"]

_MODE = 0o644


class PayloadOverrun(Exception):  # noqa: N818 - nobody outside of this package sees it
    """A payload became larger than it may be; what was asked for is made in another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """A payload that was written, and what it leads to.

    Attributes:
        entry: of the file itself.
        tensors: every tensor of the result.
        files: the safetensors files of the result.
        deltas: how the tensors come about that are not the base's.
        headers: part that holds what stands in front of the data, for each file.
    """

    entry: FileEntry
    tensors: Mapping[str, ReleasedTensor]
    files: Mapping[str, FileEntry]
    deltas: Mapping[str, TensorDelta]
    headers: Mapping[str, str]

    def make_fields(self, base: BaseRelease, name: str) -> DeltaFields:
        """Return the field `delta` of a manifest, for a payload that is called `name`."""
        return DeltaFields(base=base, payload=name, tensors=self.deltas, files=self.files, headers=self.headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """One tensor of the result: its digest, and what makes it where it is not the base's."""

    name: str
    digest: str
    codec: str | None = None
    parts: tuple[tuple[str, tuple[int, ...], torch.Tensor, str], ...] = ()


def make_delta(
    old: str | os.PathLike[str] | Release,
    new: str | os.PathLike[str] | Release,
    destination: str | os.PathLike[str],
    *,
    signing_key: SigningKey | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Release:
    """Make a delta that leads from one release to another, and open it.

    Tensors that are equal cost nothing. Others are carried whole, or as what the smallest codec makes of old and new.
    Name, version, number and everything else are those of `new`. On an error nothing is left at the destination.

    Args:
        old: the base: a release, full or itself a delta with its bases beside it.
        new: what it leads to; likewise.
        destination: a directory that does not exist yet. To be applied, it must stand beside its base.
        signing_key: signs the delta before it appears; None for no signature.
        progress: told about every tensor, one at a time; what it raises ends the making.

    Returns:
        The open delta; the caller closes it.

    Raises:
        ArgumentError: both are of one content and number, or of different models, or a dtype that this torch lacks.
        StoreConflictError: something is at the destination already.
        StoreWriteError: it cannot be written.
        DeltaError: `old` or `new` is a delta that cannot be applied.
        SourceError: a release is not what it says, or cannot be read.
        ThreadStartError: no thread could be started.
    """
    path = find_destination(destination)
    with ExitStack() as stack:
        before, after = open_result(old, stack=stack), open_result(new, stack=stack)
        base = _verify_pair(before.release, after.release)
        manifest = after.manifest
        sides = {one: after.release.find_path(one) for one in manifest.files if one not in after.paths}
        with place_release(path) as workspace:
            files = copy_side_files(sides, workspace, mode=_MODE, promised=manifest.files)
            name = name_payload(manifest.files)
            payload = write_payload(before, after, os.path.join(workspace, name), mode=_MODE, progress=progress)
            files[name] = payload.entry
            made = replace(manifest, files=files, delta=payload.make_fields(base, name))
            sign = None if signing_key is None else signing_key.sign_manifest
            write_manifest(workspace, format_manifest(made), files, mode=_MODE, sign=sign)
    return open_release(path)


def _verify_pair(old: Release, new: Release) -> BaseRelease:
    before, after = old.manifest, new.manifest
    if before.name != after.name:
        found = f"{shorten_repr(before.name)} and {shorten_repr(after.name)}"
        raise ArgumentError(f"Expected two releases of one model, got {found}.", remedy="compare the right ones.")
    if old.result_digest == new.result_digest:
        raise ArgumentError(
            f"Expected two different releases, got {after.version}, number {after.sequence}, twice.",
            remedy="nothing has to be carried from a release to itself.",
        )
    return BaseRelease(version=before.version, sequence=before.sequence, digest=old.result_digest)


def name_payload(files: Iterable[str]) -> str:
    """Return what the payload may be called beside these files."""
    taken = {part.casefold() for path in files for part in (path, path.split("/")[0])}
    stem = PAYLOAD_NAME.removesuffix(".safetensors")
    names = (PAYLOAD_NAME, *(f"{stem}-{number}.safetensors" for number in range(len(taken) + 1)))
    return next(name for name in names if name not in taken)


def write_payload(
    old: ResultReader,
    new: WeightsReader,
    path: str,
    *,
    mode: int,
    max_nbytes: int | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Payload:
    """Write what makes the tensors of `new` of those of `old` to the file `path`, flushed.

    Args:
        old: the base.
        new: what is wanted. A digest that it promises and the base has is believed: the base's bytes will be used.
        path: a file that does not exist yet.
        mode: its permissions.
        max_nbytes: size of its parts from which on it is not worth it.
        progress: told about every tensor.

    Raises:
        PayloadOverrun: it would be larger than that.
        DeltaError, DigestMismatchError: a tensor of either side is not what is promised.
        ArgumentError: a dtype that this torch lacks. HeaderError: more tensors than a payload can hold.
        SourceReadError, SourceChangedError: something cannot be read. StoreWriteError: it cannot be written.
        ThreadStartError: no thread could be started.
    """
    order = _sort(new.tensors)
    numbers = {name: number for number, name in enumerate(sorted(new.tensors))}
    kept = {name for name in order if _is_kept(old.tensors.get(name), new.tensors[name])}
    todo = [name for name in order if name not in kept]
    total = sum(new.tensors[name].nbytes for name in order)
    meter = HashMeter("delta", total, progress)
    digests = {name: new.tensors[name].digest for name in kept}
    deltas: dict[str, TensorDelta] = {}
    data_start = measure_header((new.tensors[name].shape for name in todo), num_heads=len(new.paths))

    def work(name: str) -> _Encoded:
        return _encode(old, new, name)

    with writing(path), PayloadWriter(path, data_start=data_start, mode=mode) as writer:
        meter.add(sum(new.tensors[name].nbytes for name in kept))
        for one in run_ordered(work, todo, nbytes=sum(new.tensors[name].nbytes for name in todo)):
            digests[one.name] = one.digest
            if one.codec is not None:
                deltas[one.name] = _write(writer, one, numbers[one.name], old)
            if max_nbytes is not None and writer.nbytes > max_nbytes:
                raise PayloadOverrun
            meter.add(new.tensors[one.name].nbytes)
        new.verify_unchanged()
        tensors = {name: replace(tensor, digest=digests[name]) for name, tensor in new.tensors.items()}
        files, headers = _write_heads(writer, new, tensors)
        return Payload(entry=writer.finish(), tensors=tensors, files=files, deltas=deltas, headers=headers)


def _sort(tensors: Mapping[str, ReleasedTensor]) -> list[str]:
    """Return the names in the order that their data is placed in: those of large elements first, so all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _is_kept(old: ReleasedTensor | None, new: ReleasedTensor) -> bool:
    return old is not None and (old.dtype, old.shape, old.digest) == (new.dtype, new.shape, new.digest)


def _encode(old: ResultReader, new: WeightsReader, name: str) -> _Encoded:
    tensor, before = new.tensors[name], old.tensors.get(name)
    flat = new.read_tensor(name)
    digest = tensor.digest or digest_tensor(flat)
    if _is_kept(before, replace(tensor, digest=digest)):
        return _Encoded(name=name, digest=digest)
    has_base = before is not None and (before.dtype, before.shape) == (tensor.dtype, tensor.shape)
    base = typed_view(old.read_tensor(name), tensor) if has_base else None
    found = encode(base, typed_view(flat, tensor))
    if found.codec == WHOLE:
        return _Encoded(name=name, digest=digest, codec=WHOLE, parts=((tensor.dtype, tensor.shape, flat, digest),))
    parts = tuple(
        (dtype_name(part.dtype), tuple(part.shape), tensor_bytes(part), digest_tensor(part)) for part in found.parts
    )
    return _Encoded(name=name, digest=digest, codec=found.codec, parts=parts)


def _write(writer: PayloadWriter, one: _Encoded, number: int, old: ResultReader) -> TensorDelta:
    codec = one.codec or WHOLE
    names = tuple(f"{number}.{place}" for place in range(len(one.parts)))
    for name, (dtype, shape, flat, digest) in zip(names, one.parts, strict=True):
        (writer.place if codec == WHOLE else writer.spill)(name, dtype, shape, flat, digest=digest)
    return TensorDelta(codec=codec, base=None if codec == WHOLE else old.tensors[one.name].digest, parts=names)


def _write_heads(
    writer: PayloadWriter, new: WeightsReader, tensors: Mapping[str, ReleasedTensor]
) -> tuple[dict[str, FileEntry], dict[str, str]]:
    files, headers = {}, {}
    for number, path in enumerate(new.paths):
        head = new.read_head(path)
        size = len(head) + sum(one.nbytes for one in tensors.values() if one.file == path)
        inside = parse_header(head[PREFIX_NBYTES:], file_size=size, file=path).tensors
        first = hashlib.sha256(head).hexdigest()
        digest = combine_pieces([first, *(tensors[name].digest.removeprefix("sha256:") for name in inside)])
        files[path], headers[path] = FileEntry(size=size, digest=digest), f"header.{number}"
        flat = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        writer.spill(headers[path], "uint8", (len(head),), flat, digest=f"sha256:{first}")
    return files, headers
