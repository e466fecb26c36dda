"""Migrating weights from one file to another: the same evaluation as on load, so bitwise the same tensors.

Rules this module keeps:

- Unit by unit: the operands of one unit stand in memory for each thread, and one of its outputs; never all weights.
- The new file appears whole or not at all, and only when every digest that the source promises was verified (P11).
  Source and target may be the same file.
- Metadata of others is kept. Version, config, digests and versions of modules are those of the result.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from hotglm.document import Report, parse_json
from hotglm.errors import TensorValueError, shorten_repr
from hotglm.header import PREFIX_NBYTES, TensorEntry
from hotglm.migration.expression import find_sources
from hotglm.migration.plan import Unit
from hotglm.migration.registry import Migrations
from hotglm.model.file_layout import format_config, lay_out_entries, make_header
from hotglm.model.module_versions import KEY as MODULE_VERSIONS_KEY
from hotglm.model.module_versions import carry_module_versions, format_module_versions
from hotglm.model.whole_file import open_whole, verify_path, write_at
from hotglm.release.files import CONFIG_KEY, WeightFiles, open_weights
from hotglm.release.migration import VERSION_KEY, FileMigration, plan_file_migration
from hotglm.version import Version
from hotglm.weights.bundles import make_turn
from hotglm.weights.digest import format_digest, tensor_bytes, view_buffer
from hotglm.weights.evaluation import Evaluation, count_room, has_call
from hotglm.weights.operands import Operands
from hotglm.weights.proof import Loaded, LoadOptions
from hotglm.weights.scratch import Scratch, align
from hotglm.weights.workers import count_cores, run_tasks

__all__ = ["migrate_weights"]

_DIGESTS_KEY = "hotglm.digests"
_MAX_THREADS = 4
_NO_DIGEST = format_digest("0" * 64)
"""Stands in the header until the digest is known, which is as long."""


def migrate_weights(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    migrations: Migrations,
    to: str | Version,
    version: str | Version | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, str]:
    """Write the weights at `source`, brought to version `to`, to the file `target`; return the digests by name.

    A reader of `target` sees the old file or the new one, never a part. On an error `target` is as it was.

    Args:
        source: a `.safetensors` file, a shard index, or a directory of either; its config is migrated too.
        target: one `.safetensors` file; its directory must exist. It may be `source`.
        migrations: the steps that are known, such as `Ranker.migrations`.
        to: the version to be.
        version: the version that `source` is; what it says if None.
        progress: called with bytes done and bytes in all, in whichever thread is working.

    Raises:
        MigrationError: no one path leads there, a step does not fit, or its function failed; the step is named.
        SourceError: the weights cannot be read, or are not the ones whose digests they carry.
        ArgumentError, HeaderError: the result is nothing that a file can hold.
        OSError: `target` cannot be written.
    """
    path = verify_path(target)
    with open_weights(source) as files:
        migration = plan_file_migration(files, migrations, to=to, version=version)
        writer = _Writer(files, migration, to=Version(to), progress=progress)
        with open_whole(path) as fd:
            writer.write(fd)
        return writer.digests


class _Writer:
    """One file on its way."""

    def __init__(
        self,
        files: WeightFiles,
        migration: FileMigration,
        *,
        to: Version,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self._files = files
        self._plan = migration.plan
        self._entries = {entry.name: entry for entry in lay_out_entries(migration.plan.specs)}
        self._metadata = _describe(files, migration, to=to)
        self.digests = dict.fromkeys(self._entries, _NO_DIGEST)
        self._header_nbytes = len(self._make_header())
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        promised = _read_promised(files)
        self._options = LoadOptions(expected=promised, report=self._report)
        self._loaded = Loaded()
        self._turn = make_turn(self._options)
        self._operands = Operands(files, options=self._options, loaded=self._loaded, turn=self._turn)
        self._scratch = Scratch()

    def write(self, fd: int) -> None:
        """Write every tensor, and last the header, which has their digests."""
        self._report(sum(map(self._operands.nbytes_of, self._plan.dropped)))
        units = sorted(self._plan.units, key=self._count_operands, reverse=True)
        run_tasks(
            [functools.partial(self._write_unit, fd, unit) for unit in units],
            num_threads=min(_MAX_THREADS, count_cores()),
            nice=0,
            cancellation=self._options.cancellation,
            name="hotglm-migrate",
        )
        self._files.verify_unchanged()
        self._loaded.raise_if_any(self._operands.label)
        header = self._make_header()
        os.ftruncate(fd, PREFIX_NBYTES + len(header) + max((e.stop for e in self._entries.values()), default=0))
        write_at(fd, memoryview(len(header).to_bytes(PREFIX_NBYTES, "little") + header), 0)

    def _write_unit(self, fd: int, unit: Unit) -> None:
        """Write the outputs of one unit; returns before the next one begins, so that its operands are let go of."""
        names = unit.outputs
        outputs = [self._plan.outputs[name] for name in names]
        needed = find_sources(*outputs)
        calls = any(map(has_call, outputs))
        room = self._operands.count_room(needed, owned=calls) + count_room(outputs, has_calls=calls)
        work = self._scratch.open(room + max(align(output.spec.nbytes) for output in outputs))
        operands = self._operands.read(needed, owned=calls, work=work)
        evaluation = Evaluation(operands, work=work)
        mark = work.mark()
        for name, output in zip(names, outputs, strict=True):
            try:
                value = evaluation.compute(output)
            except TensorValueError as error:  # tensors that cannot be tied: named with all else that is wrong
                self._loaded.problems += [(TensorValueError, problem) for problem in error.problems]
                continue
            if not value.is_contiguous():
                value = work.take(value.dtype, value.shape).copy_(value)
            data = tensor_bytes(value)
            self._write_tensor(fd, self._entries[name], memoryview(b"") if not data.numel() else view_buffer(data))
            if not calls:
                work.reset(mark)
        self._report(self._count_operands(unit))

    def _write_tensor(self, fd: int, entry: TensorEntry, data: memoryview) -> None:
        write_at(fd, data, PREFIX_NBYTES + self._header_nbytes + entry.start)
        self.digests[entry.name] = format_digest(hashlib.sha256(data).hexdigest())

    def _make_header(self) -> bytes:
        metadata = {**self._metadata, _DIGESTS_KEY: json.dumps(self.digests)}
        return make_header(list(self._entries.values()), metadata)

    def _count_operands(self, unit: Unit) -> int:
        return sum(map(self._operands.nbytes_of, unit.sources))

    def _report(self, nbytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._files.total_nbytes)


def _describe(files: WeightFiles, migration: FileMigration, *, to: Version) -> dict[str, str]:
    metadata = {**files.metadata, VERSION_KEY: str(to)}
    if migration.config is not None:
        metadata[CONFIG_KEY] = format_config(migration.config)
    told = _read_object(files, MODULE_VERSIONS_KEY)
    if told is not None and all(type(version) is int for version in told.values()):
        carried = carry_module_versions(migration.plan.outputs, told)
        known = {path: version for path, version in carried.items() if version is not None and version != 1}
        metadata[MODULE_VERSIONS_KEY] = format_module_versions(known)
    return metadata


def _read_promised(files: WeightFiles) -> Mapping[str, str]:
    promised = _read_object(files, _DIGESTS_KEY) or {}
    if not all(name in files.tensors and isinstance(digest, str) for name, digest in promised.items()):
        raise TensorValueError(
            f"Expected digests of tensors in metadata {_DIGESTS_KEY!r} of {shorten_repr(files.path)}, got others.",
            remedy="write the file with hotglm.save_weights.",
        )
    return promised


def _read_object(files: WeightFiles, key: str) -> dict[str, Any] | None:
    text = files.metadata.get(key)
    if text is None:
        return None
    headline = f"Expected JSON in metadata {key!r} of {shorten_repr(files.path)}."
    remedy = "write the file with hotglm.save_weights."
    report = Report(TensorValueError, headline=headline, remedy=remedy, prefix="METADATA", file=files.path)
    value = parse_json(text.encode(), report=report)
    if not isinstance(value, dict):
        raise TensorValueError(headline, remedy=remedy)
    return value
