"""A release directory: opened by its manifest, refused by name where it is not what that says, verified byte by byte.

Rules this module keeps:

- Only a directory with a manifest is a release; the manifest is written last, so one without is not finished (R1, R2).
- Every file is listed and every listed file is there, as a regular file of the right size: no link, nothing else,
  nothing more (R3 to R5). All that is wrong is named at once.
- The bytes that are used are the bytes that are verified: a side file is hashed in the buffer that is handed out, a
  header is bound by the digest of its file, and each tensor is hashed by the loader in the memory it will serve from
  (D1 to D3, P5).
- An open release shares the lock of its directory, so that a store's garbage collection leaves it alone (S8).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from hotglm.errors import (
    ArgumentError,
    DeltaError,
    DigestMismatchError,
    Problem,
    ReleaseError,
    SourceReadError,
    shorten_repr,
)
from hotglm.file_entry import combine_pieces
from hotglm.header import DEFAULT_LIMITS, Limits
from hotglm.manifest import MAX_MANIFEST_NBYTES, digest_manifest, digest_result, parse_manifest
from hotglm.manifest_fields import MANIFEST_NAME, Manifest
from hotglm.progress import Progress
from hotglm.release.closing import Closing
from hotglm.release.files import WeightFile, WeightFiles, open_weights, parse_config
from hotglm.release.hashing import FilePieces, HashMeter, cut_weights, cut_whole, hash_pieces
from hotglm.release.locks import lock_directory
from hotglm.release.payloads import find_promises, open_payload, verify_results
from hotglm.release.reading import (
    close_quietly,
    open_regular,
    read_document,
    read_error,
    read_status,
    verify_identity,
)
from hotglm.release.tree import REMEDY, report_release, verify_tree

__all__ = ["STORE_MARKER", "Release", "cut_side_file", "cut_weight_file", "is_release", "open_release"]

STORE_MARKER = "hotglm-store.json"
"""The file that makes a directory a store of releases; written last when one is made."""

_BATCH = 64
"""How many side files are open at once."""

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Release(Closing):
    """An open release; a context manager that closes it. Any thread may call any method.

    Attributes:
        path: its directory.
        manifest: what it says about itself.
        digest: `sha256:` and 64 hexadecimal digits over the bytes of the manifest, which bind everything else.
        manifest_bytes: the very bytes that `manifest` was read from; what a signature must be over.
    """

    path: str
    manifest: Manifest
    digest: str
    manifest_bytes: bytes = field(repr=False)
    _lease: ExitStack = field(repr=False)

    @property
    def result_digest(self) -> str:
        """The digest of the full release that this one leads to, the same for its full form and its deltas (D5)."""
        return self.digest if self.manifest.delta is None else digest_result(self.manifest)

    def find_path(self, name: str) -> str:
        """Return where the listed file `name` stands.

        Raises:
            ArgumentError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise ArgumentError(
                f"Expected a file of the release, got {shorten_repr(name)}.", remedy="look at `.manifest.files`."
            )
        return os.path.join(self.path, *name.split("/"))

    def read_file(self, name: str) -> bytes:
        """Return the bytes of a side file, having verified them.

        Raises:
            ArgumentError: the manifest does not list it, or lists it as weights; use `open_weights` for those.
            DigestMismatchError: they are not the ones that the manifest promises.
            SourceReadError: it cannot be read. SourceChangedError: it changed meanwhile.
        """
        path, entry = self.find_path(name), self.manifest.files[name]
        if not entry.digest.startswith("sha256:"):
            raise ArgumentError(
                f"Expected a side file, got the weights {shorten_repr(name)}.", remedy="use `open_weights` for those."
            )
        content = read_document(path, limit=entry.size, error=ReleaseError, code="SIZE_MISMATCH")
        found = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if found != entry.digest:
            self._raise_mismatches([_mismatch(path, entry.digest, found)])
        return content

    def read_config(self) -> Mapping[str, object] | None:
        """Return the fields of the model's config, from the manifest, else from `config.json`; None where unknown.

        A `config.json` with NaN or infinity cannot stand in a manifest, and is read, and verified, here (M11).

        Raises:
            DigestMismatchError, SourceError: the file is not what the manifest promises, or no JSON object.
        """
        manifest = self.manifest
        if manifest.config is not None or manifest.weights is None:
            return manifest.config
        name = "/".join([*manifest.weights.split("/")[:-1], _CONFIG])
        if name not in manifest.files:
            return None
        what, limit = f"config {shorten_repr(name)} of {shorten_repr(self.path)}", DEFAULT_LIMITS.config_nbytes
        return parse_config(self.read_file(name), path=self.find_path(name), what=what, limit=limit, constants=True)

    def open_weights(self, *, limits: Limits = DEFAULT_LIMITS) -> WeightFiles:
        """Open the weights and verify their headers against the manifest; each tensor still has to be hashed.

        Raises:
            DeltaError: the release is a delta, which holds no weights to load without its base (DELTA_NEEDS_BASE).
            ReleaseError: the release carries no weights, or its files hold other tensors than the manifest says.
            DigestMismatchError: a header is not the one that the manifest promises.
            HeaderError: a header breaks the format. ShardIndexError: the index does not fit its shards.
            SourceReadError: something cannot be read. SourceChangedError: it changed meanwhile.
        """
        if (delta := self.manifest.delta) is not None:
            message = f"Expected a full release, got a delta against {delta.base.version}."
            raise DeltaError(
                f"The release {shorten_repr(self.path)} holds no weights of its own.",
                problems=[Problem(code="DELTA_NEEDS_BASE", message=message, file=self.path)],
                remedy="stage it (`slot.stage(path)`), or make full files of it (`hotglm.materialize`).",
            )
        if self.manifest.weights is None:
            problem = Problem(code="NO_WEIGHTS", message="Expected weights in the release, got none.", file=self.path)
            raise ReleaseError("The release holds nothing to load.", problems=[problem], remedy=REMEDY)
        files = open_weights(self.find_path(self.manifest.weights), limits=limits, reads_config=False)
        try:
            self._verify_headers(files)
        except BaseException:
            files.close()
            raise
        return files

    def open_payload(self, *, limits: Limits = DEFAULT_LIMITS) -> WeightFiles:
        """Open the payload of a delta and verify its header against the manifest; its bytes still have to be hashed.

        Raises:
            ArgumentError: the release is full; use `open_weights`.
            DeltaError: the payload holds other parts than the manifest names, or ones of a wrong size.
            HeaderError: its header breaks the format.
            SourceReadError: it cannot be read. SourceChangedError: it changed meanwhile.
        """
        if self.manifest.delta is None:
            raise ArgumentError("Expected a delta, got a full release.", remedy="use `open_weights`.")
        return open_payload(self.find_path(self.manifest.delta.payload), self.manifest, limits=limits)

    def verify(self, *, progress: Callable[[Progress], object] | None = None) -> None:
        """Read every byte and refuse what is not as the manifest promises, all of it named.

        Of a delta this is its payload and side files, and that the headers of its result are those of the promised
        files; tensors that are made of the base are verified when they are made.

        Raises:
            DigestMismatchError: with every file and tensor that differs.
            DeltaError: the payload is not what the manifest says.
            ReleaseError, HeaderError, ShardIndexError: the files are not what the manifest says.
            SourceReadError: something cannot be read. SourceChangedError: it changed meanwhile.
        """
        manifest = self.manifest
        with ExitStack() as stack:
            opened = self._open_files(stack)
            meter = HashMeter("verify", manifest.total_nbytes, progress)
            cut = [cut_weight_file(file, name=self._name_of(file)) for file in opened]
            of_files, of_tensors = self._hash(cut, meter=meter)
            if manifest.delta is not None:
                verify_results(opened[0], manifest)
        others = sorted(manifest.files.keys() - of_files.keys())
        for start in range(0, len(others), _BATCH):
            with ExitStack() as stack:
                names = others[start : start + _BATCH]
                cut = [cut_side_file(self.find_path(name), name=name, stack=stack) for name in names]
                of_files |= self._hash(cut, meter=meter)[0]
        problems = [
            _mismatch(self.find_path(name), entry.digest, of_files[name])
            for name, entry in manifest.files.items()
            if of_files[name] != entry.digest
        ]
        problems += [
            _mismatch(self.find_path(file), expected, of_tensors[name], tensor=name)
            for name, (file, expected) in find_promises(manifest).items()
            if of_tensors[name] != expected
        ]
        self._raise_mismatches(problems)

    def close(self) -> None:
        """Give its lease up. Again does nothing."""
        self._lease.close()

    def _open_files(self, stack: ExitStack) -> tuple[WeightFile, ...]:
        if self.manifest.weights is None:
            return ()
        is_full = self.manifest.delta is None
        return stack.enter_context(self.open_weights() if is_full else self.open_payload()).files

    def _hash(self, cut: list[FilePieces], *, meter: HashMeter) -> tuple[dict[str, str], dict[str, str]]:
        digests = hash_pieces(cut, meter=meter)
        for one in cut:
            verify_identity(one.fd, identity=one.identity, path=self.find_path(one.path))
        return digests

    def _name_of(self, file: WeightFile) -> str:
        return os.path.relpath(file.path, self.path).replace(os.sep, "/")

    def _raise_mismatches(self, problems: list[Problem]) -> None:
        if problems:
            headline = f"The release {shorten_repr(self.path)} is not what its manifest says."
            raise DigestMismatchError(headline, problems=problems, remedy=REMEDY)

    def _verify_headers(self, files: WeightFiles) -> None:
        manifest, report = self.manifest, report_release(self.path)
        for name in sorted(manifest.tensors.keys() - files.tensors.keys()):
            report.add("TENSOR_MISSING", "Expected the tensor that the manifest names, got none.", tensor=name)
        mismatches = []
        for name, location in files.tensors.items():
            promised = manifest.tensors.get(name)
            found = (self._name_of(location.file), location.entry.torch_dtype, location.entry.shape)
            expected = None if promised is None else (promised.file, promised.dtype, promised.shape)
            if found != expected:
                message = f"Expected {_show_tensor(expected)}, as the manifest says, got {_show_tensor(found)}."
                report.add("TENSOR_MISMATCH", message, tensor=name)
        report.raise_if_any()
        for file in files.files:
            inside = (manifest.tensors[name].digest.removeprefix("sha256:") for name in file.header.tensors)
            digest = combine_pieces([file.header_sha256, *inside])
            name = self._name_of(file)
            if name not in manifest.files or manifest.files[name].digest != digest:
                expected_digest = manifest.files[name].digest if name in manifest.files else "none"
                mismatches.append(_mismatch(file.path, expected_digest, digest))
        self._raise_mismatches(mismatches)


def open_release(path: str | os.PathLike[str]) -> Release:
    """Open the release in the directory `path`: read its manifest and compare names, kinds and sizes of its files.

    No byte of a file but the manifest's is read here; `Release.verify` reads all of them.

    Returns:
        The open release; the caller closes it.

    Raises:
        ArgumentError: `path` is no path.
        ReleaseError: there is no manifest (INCOMPLETE), it breaks the format, or the directory holds something else
            than it lists; everything that is wrong is named.
        SourceReadError: something cannot be read.
    """
    try:
        # Links on the way are followed once: one that is turned while a release is read does not lead to another one.
        directory = os.path.realpath(os.fsdecode(path))
    except ValueError as error:  # a NUL
        raise read_error(error, path=os.fsdecode(path)) from error
    except TypeError as error:
        raise ArgumentError(
            f"Expected a path, got {shorten_repr(type(path).__name__)}.", remedy="give a str or os.PathLike."
        ) from error
    with ExitStack() as stack:
        _take_lease(directory, stack=stack)
        at = os.path.join(directory, MANIFEST_NAME)
        text = _read_manifest(directory, at)
        manifest = parse_manifest(text, file=at)
        verify_tree(directory, manifest.files)
        return Release(
            path=directory,
            manifest=manifest,
            digest=digest_manifest(text),
            manifest_bytes=text,
            _lease=stack.pop_all(),
        )


def is_release(path: str) -> bool:
    """Tell whether a manifest stands in the directory `path`; False for a file, and where nothing is.

    Raises:
        SourceReadError: the OS did not say.
    """
    try:
        read_status(os.path.join(path, MANIFEST_NAME))
    except SourceReadError as error:
        if error.code in ("NOT_FOUND", "BAD_PATH"):
            return False
        raise
    return True


def _take_lease(directory: str, *, stack: ExitStack) -> None:
    try:
        fd = lock_directory(directory)
    except NotADirectoryError as error:
        raise _refuse_file(error, directory) from error
    except (OSError, ValueError) as error:
        raise read_error(error, path=directory) from error
    if fd is None:
        problem = Problem(
            code="NOT_FOUND", message="Expected a release, got one that is being removed.", file=directory
        )
        raise SourceReadError(f"Cannot read {shorten_repr(directory)}.", problems=[problem], remedy="choose another.")
    stack.callback(close_quietly, fd)


def _refuse_file(error: OSError, path: str) -> SourceReadError:
    message = "Expected a release, which is a directory, got a file."
    refusal = SourceReadError(
        f"Cannot read {shorten_repr(path)}.",
        problems=[Problem(code="NOT_FOUND", message=message, file=path)],
        remedy="make a release of it with `hotglm pack`, or check the path.",
    )
    refusal.errno = error.errno
    refusal.filename = path
    return refusal


def _read_manifest(directory: str, at: str) -> bytes:
    report = report_release(directory)
    try:
        if not stat.S_ISREG(read_status(at).st_mode):
            report.stop("NOT_REGULAR", f"Expected a regular file as {MANIFEST_NAME!r}, got a link or something else.")
        return read_document(at, limit=MAX_MANIFEST_NBYTES, error=ReleaseError, code="MANIFEST_TOO_LARGE")
    except SourceReadError as error:
        if error.code != "NOT_FOUND" or error.errno == errno.ENOTDIR:
            raise
        message = (
            f"Expected {MANIFEST_NAME!r}, which is written last, got none: this is no release, or not a whole one."
        )
        if os.path.lexists(os.path.join(directory, STORE_MARKER)):
            message = "Expected a release, got a store of releases, one of which is meant: `hotglm log` shows them."
        report.stop("INCOMPLETE", message)


def cut_weight_file(file: WeightFile, *, name: str) -> FilePieces:
    """Return an open safetensors file cut into its header and its tensors, under the name it has in the release."""
    start = file.header.data_start
    tensors = ((tensor, start + entry.start, entry.nbytes) for tensor, entry in file.header.tensors.items())
    return FilePieces(
        path=name, fd=file.fd, identity=file.identity, pieces=cut_weights(start, tensors), is_weights=True
    )


def cut_side_file(path: str, *, name: str, stack: ExitStack) -> FilePieces:
    """Open another file; `stack` closes it. It is one piece.

    Raises:
        SourceReadError: it cannot be opened, or is no regular file.
    """
    fd, identity = open_regular(path)
    stack.callback(close_quietly, fd)
    return FilePieces(path=name, fd=fd, identity=identity, pieces=cut_whole(identity.size))


def _show_tensor(found: tuple[str, str, tuple[int, ...]] | None) -> str:
    return "no such tensor" if found is None else f"{found[1]} {list(found[2])} in {shorten_repr(found[0])}"


def _mismatch(path: str, expected: str, found: str, *, tensor: str | None = None) -> Problem:
    message = f"Expected digest {expected}, got {found}."
    return Problem(code="DIGEST_MISMATCH", message=message, file=path, tensor=tensor, expected=expected, found=found)
