"""Tensors of a release as bytes in memory: of a full one, of a chain of deltas, or of weights that are no release yet.

Rules this module keeps:

- A tensor is handed out only when its bytes have the digest that is promised for it, where one is (X7, C03).
- One tensor is in memory per call, and each part of a payload is read once for it. Any thread may read.
- Files stay open as long as the stack that they were opened with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

import torch

from hotglm.delta_plan import MAX_CHAIN, FileStart, PartStart
from hotglm.errors import ArgumentError, DigestMismatchError, Problem, shorten_repr
from hotglm.manifest_fields import Manifest, ReleasedTensor
from hotglm.release.chains import Chain, open_chain
from hotglm.release.directory import Release, open_release
from hotglm.release.drafts import Draft
from hotglm.release.files import TensorLocation, WeightFile, WeightFiles
from hotglm.release.payloads import read_result_header, report_delta
from hotglm.release.reading import read_exactly, read_scattered
from hotglm.weights.delta_codec import decode_into
from hotglm.weights.delta_parts import FilePart
from hotglm.weights.digest import digest_tensor, view_buffer
from hotglm.weights.dtypes import TORCH_DTYPES

__all__ = ["DraftReader", "ResultReader", "WeightsReader", "open_result", "typed_view"]

_CHUNK_NBYTES = 64 * 2**20


class WeightsReader(Protocol):
    """Where tensors and the bytes in front of them come from."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The safetensors files, as they are called in the release."""

    @property
    def tensors(self) -> Mapping[str, ReleasedTensor]:
        """Every tensor; its digest is empty where none is promised."""

    def read_tensor(self, name: str) -> torch.Tensor:
        """Return the bytes of a tensor, flat, in memory that is the caller's."""

    def read_head(self, path: str) -> bytes:
        """Return the bytes of a file in front of its data."""

    def verify_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""


class ResultReader:
    """What a release leads to, full or delta."""

    def __init__(self, chain: Chain, *, stack: ExitStack) -> None:
        """Open the files that the plan of a chain reads from; `stack` closes them.

        Raises:
            SourceError: a file is not what its manifest says, or cannot be read.
        """
        self.release = chain.releases[0]
        self._plan = chain.plan.tensors
        self._files: dict[int, WeightFiles] = {}
        for place in sorted(chain.plan.links | {0}):
            release = chain.releases[place]
            is_full = release.manifest.delta is None
            self._files[place] = stack.enter_context(release.open_weights() if is_full else release.open_payload())

    @property
    def manifest(self) -> Manifest:
        """The full manifest that the release leads to."""
        return self.release.manifest.result

    @property
    def tensors(self) -> Mapping[str, ReleasedTensor]:
        """Every tensor, with its digest."""
        return self.manifest.tensors

    @property
    def paths(self) -> tuple[str, ...]:
        """The safetensors files of the result."""
        return tuple(path for path, one in self.manifest.files.items() if one.digest.startswith("safetensors:"))

    def read_tensor(self, name: str) -> torch.Tensor:
        """Return the bytes of a tensor, flat, in memory that is the caller's.

        Raises:
            DeltaError: a payload cannot be applied.
            DigestMismatchError: it has other bytes than promised; after a delta was applied, DELTA_RESULT_MISMATCH.
            MissingExtraError: it needs the extra `delta`.
            SourceReadError: it cannot be read. SourceChangedError: a file changed meanwhile.
        """
        plan, promised = self._plan[name], self.tensors[name]
        start = plan.start
        if isinstance(start, PartStart):
            flat = _read(self._files[start.link].tensors[start.part])
        elif isinstance(start, FileStart):
            flat = _read(self._files[start.link].tensors[name])
        else:
            raise ArgumentError("Expected a chain that ends in files.", remedy="open it without known tensors.")
        for step in plan.steps:
            tensors = self._files[step.link].tensors
            parts = [FilePart(location=tensors[part]) for part in step.delta.parts]
            decode_into(typed_view(flat, promised), codec=step.delta.codec, parts=parts, name=name)
        found = digest_tensor(flat)
        if found != promised.digest:
            code = "DELTA_RESULT_MISMATCH" if plan.steps else "DIGEST_MISMATCH"
            raise _mismatch(self.release, name, promised.digest, found, code=code)
        return flat

    def read_head(self, path: str) -> bytes:
        """Return the bytes of a file of the result in front of its data.

        Raises:
            DeltaError: they are not those of the file that is promised.
            SourceReadError: they cannot be read. SourceChangedError: a file changed meanwhile.
        """
        files, manifest = self._files[0].files, self.release.manifest
        if manifest.delta is None:
            return _read_head(next(one for one in files if one.path == self.release.find_path(path)))
        report = report_delta(files[0].path)
        text = read_result_header(files[0], manifest, manifest.delta, path, report=report)
        report.raise_if_any()
        return text

    def verify_unchanged(self) -> None:
        """Refuse files that were written to since they were opened.

        Raises:
            SourceChangedError: some were. SourceReadError: the system did not say.
        """
        for files in self._files.values():
            files.verify_unchanged()


class DraftReader:
    """Weights that are no release yet; a digest that they carry themselves is what is promised."""

    def __init__(self, draft: Draft, files: WeightFiles) -> None:
        """Take an open draft, and its open weights."""
        self._files = files
        self._by_path = {os.path.relpath(one.path, draft.root).replace(os.sep, "/"): one for one in files.files}
        promised = _find_promised(draft)
        self.tensors = {
            name: ReleasedTensor(
                file=path, dtype=entry.torch_dtype, shape=tuple(entry.shape), digest=promised.get(name, "")
            )
            for path, file in self._by_path.items()
            for name, entry in file.header.tensors.items()
        }

    @property
    def paths(self) -> tuple[str, ...]:
        """The safetensors files."""
        return tuple(sorted(self._by_path))

    def read_tensor(self, name: str) -> torch.Tensor:
        """Return the bytes of a tensor, flat, in memory that is the caller's.

        Raises:
            DigestMismatchError: it has other bytes than the source promises itself.
            SourceReadError: it cannot be read. SourceChangedError: a file changed meanwhile.
        """
        flat, promised = _read(self._files.tensors[name]), self.tensors[name].digest
        if promised and (found := digest_tensor(flat)) != promised:
            raise _mismatch(None, name, promised, found, code="DIGEST_MISMATCH")
        return flat

    def read_head(self, path: str) -> bytes:
        """Return the bytes of a file in front of its data.

        Raises:
            SourceReadError: they cannot be read. SourceChangedError: the file changed meanwhile.
        """
        return _read_head(self._by_path[path])

    def verify_unchanged(self) -> None:
        """Refuse files that were written to since they were opened.

        Raises:
            SourceChangedError: some were. SourceReadError: the system did not say.
        """
        self._files.verify_unchanged()


def _find_promised(draft: Draft) -> Mapping[str, str]:
    """Return the digests that a source promises itself, in its manifest or its metadata."""
    if draft.manifest is not None:
        return {name: one.digest for name, one in draft.manifest.tensors.items()}
    digests: Mapping[str, object] = draft.read_metadata("hotglm.digests", {})
    return {name: digest for name, digest in digests.items() if isinstance(digest, str)}


def open_result(
    source: str | os.PathLike[str] | Release, *, stack: ExitStack, max_length: int = MAX_CHAIN
) -> ResultReader:
    """Open a release with everything that it builds on; `stack` closes what is opened here.

    Raises:
        DeltaChainError, WrongBaseError: a delta whose bases are not there.
        ReleaseError: it carries no weights, or is not what its manifest says.
        SourceError: something cannot be read.
    """
    release = source if isinstance(source, Release) else stack.enter_context(open_release(source))
    chain = stack.enter_context(open_chain(release, max_length=max_length))
    return ResultReader(chain, stack=stack)


def typed_view(flat: torch.Tensor, tensor: ReleasedTensor) -> torch.Tensor:
    """Return flat bytes as the tensor that they are; a view.

    Raises:
        ArgumentError: this torch has no such dtype.
    """
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ArgumentError(
            f"Expected a dtype of this torch, got {tensor.dtype}.", remedy="use a torch that has it, to make a delta."
        )
    return flat.view(dtype).reshape(tensor.shape)


def _read(location: TensorLocation) -> torch.Tensor:
    flat = torch.empty(location.nbytes, dtype=torch.uint8)
    if location.nbytes:
        whole, file = view_buffer(flat), location.file
        for start in range(0, location.nbytes, _CHUNK_NBYTES):
            chunk = whole[start : start + _CHUNK_NBYTES]
            read_scattered(file.fd, [chunk], location.offset + start, path=file.path, size=file.size)
    return flat


def _read_head(file: WeightFile) -> bytes:
    nbytes = file.header.data_start
    return read_exactly(file.fd, nbytes=nbytes, offset=0, path=file.path)


def _mismatch(release: Release | None, name: str, expected: str, found: str, *, code: str) -> DigestMismatchError:
    what = "The weights" if release is None else f"The release {shorten_repr(release.path)}"
    message = f"Expected digest {expected}, got {found}."
    file = None if release is None else release.path
    problem = Problem(code=code, message=message, tensor=name, file=file, expected=expected, found=found)
    return DigestMismatchError(
        f"{what} gives other bytes than promised.",
        problems=[problem],
        remedy="fetch it and what it builds on again; it was damaged.",
    )
