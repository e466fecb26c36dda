"""What stands in the directory of a release, and whether that is what its manifest lists.

Rules this module keeps:

- Links are not followed; what is no regular file is named, and never opened (R4).
- All that is wrong is named at once. No byte of a file is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping

from hotglm.document import Report
from hotglm.errors import ReleaseError, shorten_repr
from hotglm.file_entry import FileEntry
from hotglm.manifest_fields import RESERVED_PREFIX
from hotglm.manifest_reader import MAX_FILES
from hotglm.release.reading import list_directory, read_status

__all__ = ["REMEDY", "find_entries", "report_release", "verify_tree"]

REMEDY = "publish the release again with `hotglm pack`, or fetch all of it again."


def report_release(directory: str) -> Report:
    """Return an empty report about the release `directory`; its refusals are `ReleaseError`."""
    headline = f"The release {shorten_repr(directory)} was refused"
    return Report(ReleaseError, headline=headline, remedy=REMEDY, prefix="RELEASE", file=directory)


def verify_tree(directory: str, files: Mapping[str, FileEntry]) -> None:
    """Refuse a directory that holds something else than these files, all of it named (R3 to R5).

    Raises:
        ReleaseError: names, kinds or sizes are other ones. SourceReadError: it cannot be listed.
    """
    report = report_release(directory)
    parents = {name[:at] for name in files for at, character in enumerate(name) if character == "/"}
    missing = dict(files)
    for name, status in find_entries(directory):
        if stat.S_ISDIR(status.st_mode) and name in parents:
            continue
        entry = missing.pop(name, None)
        if entry is None:
            report.add(
                "EXTRA_FILE", f"Expected only what the manifest lists, got {shorten_repr(name)} too.", found=name
            )
        else:
            _verify_status(name, entry, status, report=report)
    for name in missing:
        report.add("MISSING_FILE", f"Expected {shorten_repr(name)}, as the manifest says, got none.", expected=name)
    report.raise_if_any()


def _verify_status(name: str, entry: FileEntry, status: os.stat_result, *, report: Report) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = "a link" if stat.S_ISLNK(status.st_mode) else "something else"
        report.add("NOT_REGULAR", f"Expected {shorten_repr(name)} to be a regular file, got {found}.", found=name)
    elif status.st_size != entry.size:
        message = f"Expected {shorten_repr(name)} to have {entry.size} bytes, got {status.st_size}."
        report.add("SIZE_MISMATCH", message, expected=entry.size, found=status.st_size)


def find_entries(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of everything below `directory` that could be part of a release, links not followed.

    Names that start with a dot are passed over, and at the top those that are reserved for manifest and signatures.

    Raises:
        SourceReadError: it cannot be listed.
        ReleaseError: there is more than a release may hold.
    """
    todo, num = [""], 0
    while todo:
        parent = todo.pop()
        for name in list_directory(os.path.join(directory, parent)):
            if name.startswith(".") or (not parent and name.startswith(RESERVED_PREFIX)):
                continue
            num += 1
            if num > 2 * MAX_FILES:
                report_release(directory).stop("TOO_MANY_FILES", f"Expected at most {MAX_FILES} files, got more.")
            path = f"{parent}/{name}" if parent else name
            status = read_status(os.path.join(directory, path))
            if stat.S_ISDIR(status.st_mode):
                todo.append(path)
            yield path, status
