"""What the commands about releases print of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from hotglm.commands.console import show_count, show_size
from hotglm.commands.delta_changes import Changes
from hotglm.commands.tensor_tree import Node, grow_tree
from hotglm.delta_fields import BaseRelease
from hotglm.errors import shorten_repr
from hotglm.manifest_fields import Manifest
from hotglm.release.directory import Release

_MAX_LINES = 200

__all__ = ["align", "describe_release", "draw_bar", "show_release", "show_time"]


def describe_release(release: Release) -> dict[str, object]:
    """Return what identifies a release, as JSON values."""
    manifest = release.manifest
    return {
        "path": release.path,
        "name": manifest.name,
        "version": str(manifest.version),
        "sequence": manifest.sequence,
        "kind": manifest.kind,
        "digest": release.digest,
        "created": show_time(manifest.created_at),
        "expires": None if manifest.expires_at is None else show_time(manifest.expires_at),
        "num_files": len(manifest.files),
        "num_tensors": len(manifest.tensors),
        "nbytes": manifest.total_nbytes,
        "base": None if manifest.delta is None else _identify_base(manifest.delta.base),
    }


def _identify_base(base: BaseRelease) -> dict[str, object]:
    return {"version": str(base.version), "sequence": base.sequence, "digest": base.digest}


def show_release(release: Release, changes: Changes | None, *, is_whole: bool) -> Iterator[str]:
    """Yield what a release says about itself, in lines of text.

    Args:
        release: the release.
        changes: what it changes, where it is a delta.
        is_whole: whether every tensor is listed, with its digest, and not as part of a tree.
    """
    manifest = release.manifest
    yield f"release {shorten_repr(manifest.name)} {manifest.version}, number {manifest.sequence}, {manifest.kind}"
    yield f"digest {release.digest}"
    expires = "" if manifest.expires_at is None else f", expires {show_time(manifest.expires_at)}"
    yield f"created {show_time(manifest.created_at)}{expires}"
    if manifest.created_in is not None:
        packages = "".join(f", {name} {version}" for name, version in sorted(manifest.created_in.packages.items()))
        yield f"made with python {manifest.created_in.python}{packages}"
    yield from (f"requires {shorten_repr(requirement)}" for requirement in manifest.requires)
    if manifest.capabilities:
        yield f"can {', '.join(map(shorten_repr, sorted(manifest.capabilities)))}"
    if manifest.config is not None:
        yield f"config with {show_count(len(manifest.config), 'field')}"
    if manifest.code is not None:
        yield f"code {manifest.code.entry} in {show_count(len(manifest.code.files), 'file')}, which is not loaded"
    yield f"{show_count(len(manifest.files), 'file')}, {show_size(manifest.total_nbytes)}"
    rows = [(shorten_repr(name), entry.digest[:23], str(entry.size)) for name, entry in manifest.files.items()]
    yield from align([("file", "digest", "bytes"), *rows], right=("bytes",))
    if changes is not None:
        yield from _show_changes(changes, manifest)
    if manifest.tensors:
        nbytes = sum(one.nbytes for one in manifest.tensors.values())
        yield f"{show_count(len(manifest.tensors), 'tensor')}, {_short_size(nbytes)}"
        if is_whole:
            tensors = [
                (shorten_repr(name), one.dtype, str(list(one.shape)), one.digest[:15])
                for name, one in manifest.tensors.items()
            ]
            yield from align([("tensor", "dtype", "shape", "digest"), *tensors])
        else:
            rows_of_tree = [row for node in grow_tree(manifest.tensors).children for row in _list_node(node, nbytes)]
            yield from align(
                [("tensors", "dtype", "shape", "size", ""), *rows_of_tree[:_MAX_LINES]],
                right=("size",),
            )
            if len(rows_of_tree) > _MAX_LINES:
                yield f"  and {len(rows_of_tree) - _MAX_LINES} lines more; --all lists every tensor"


def _list_node(node: Node, whole: int, depth: int = 0) -> Iterator[tuple[str, ...]]:
    one = node.tensor
    alike = f" ({node.num_alike} alike)" if node.num_alike > 1 else ""
    name = f"{'  ' * depth}{shorten_repr(node.name)}{alike}"
    dtype, shape = ("", "") if one is None else (one.dtype, str(list(one.shape)))
    yield name, dtype, shape, _short_size(node.nbytes), draw_bar(node.nbytes, whole)
    for child in node.children:
        yield from _list_node(child, whole, depth + 1)


def _show_changes(changes: Changes, manifest: Manifest) -> Iterator[str]:
    if manifest.delta is None:
        return
    base = manifest.delta.base
    yield f"delta on {base.version}, number {base.sequence}"
    share = changes.carried_nbytes / changes.nbytes if changes.nbytes else 0
    yield f"carries {_short_size(changes.carried_nbytes)} for {_short_size(changes.nbytes)} of tensors ({share:.1%})"
    counts = ", ".join(f"{num} {kind}" for kind, num in sorted(changes.count_kinds().items()))
    yield f"{counts or 'nothing changed'}, {changes.num_kept} kept"
    if not changes.has_base:
        yield "the base is not here: what it had more is not known"
    rows = [
        (one.kind, shorten_repr(one.name), one.codec or "-", _short_size(one.nbytes), _short_size(one.carried_nbytes))
        for one in changes.tensors[:_MAX_LINES]
    ]
    if rows:
        bars = [draw_bar(one.carried_nbytes, changes.carried_nbytes) for one in changes.tensors]
        headings = ("change", "tensor", "codec", "size", "carried", "")
        yield from align(
            [headings, *((*row, bar) for row, bar in zip(rows, bars, strict=False))], right=("size", "carried")
        )
        if len(changes.tensors) > _MAX_LINES:
            yield f"  and {len(changes.tensors) - _MAX_LINES} more; --json has all of them"


def _short_size(nbytes: int) -> str:
    return show_size(nbytes).partition(" (")[0]


def show_time(instant: datetime) -> str:
    """Return a time as a manifest has it."""
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")


def align(rows: Sequence[tuple[str, ...]], *, right: Sequence[str] = ()) -> Iterator[str]:
    """Set rows in columns below the first one, their headings; those named in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            text.rjust(width) if heading in right else text.ljust(width)
            for heading, text, width in zip(rows[0], row, widths, strict=True)
        )
        yield f"  {'  '.join(cells)}".rstrip()


def draw_bar(part: int, whole: int, *, width: int = 20) -> str:
    """Return a bar of plain ASCII: as long as the part is of the whole, with a dot for what is too small to draw.

    >>> draw_bar(1, 2, width=4), draw_bar(1, 1000, width=4), draw_bar(0, 0, width=4)
    ('##', '.', '')
    """
    filled = round(width * part / whole) if whole else 0
    return "#" * filled or ("." if part else "")
