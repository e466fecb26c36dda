"""What the commands about releases print of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from hotglm.commands.console import show_count, show_size
from hotglm.errors import shorten_repr
from hotglm.release.directory import Release

__all__ = ["align", "describe_release", "show_release", "show_time"]


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
    }


def show_release(release: Release) -> Iterator[str]:
    """Yield everything that a release says about itself, in lines of text."""
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
    yield from align([("file", "digest", "bytes"), *rows])
    if manifest.tensors:
        yield show_count(len(manifest.tensors), "tensor")
        tensors = [
            (shorten_repr(name), one.dtype, str(list(one.shape)), one.digest[:15])
            for name, one in manifest.tensors.items()
        ]
        yield from align([("tensor", "dtype", "shape", "digest"), *tensors], numbers=False)


def show_time(instant: datetime) -> str:
    """Return a time as a manifest has it."""
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")


def align(rows: Sequence[tuple[str, ...]], *, numbers: bool = True) -> Iterator[str]:
    """Set rows in columns; the last one to the right if it holds numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *texts, last in rows:
        left = "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=False))
        yield f"  {left}  {last.rjust(widths[-1]) if numbers else last}".rstrip()
