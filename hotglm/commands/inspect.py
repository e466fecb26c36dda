"""`hotglm inspect`: list the tensors and the metadata of weights; reads headers only."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from hotglm.commands.command import OK, Command
from hotglm.commands.console import identify_weights, print_json, show_count, show_headline, show_size
from hotglm.errors import shorten_repr
from hotglm.release.files import WeightFiles, open_weights

__all__ = ["INSPECT"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a .safetensors file, a shard index, or a directory of either")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    with open_weights(arguments.path) as weights:
        if arguments.json:
            print_json("hotglm.inspect/1", _describe(weights))
        else:
            print("\n".join(_show(weights)))
    return OK


def _describe(weights: WeightFiles) -> dict[str, object]:
    """Return everything that `inspect` knows, as JSON values."""
    return {
        **identify_weights(weights),
        "metadata": dict(weights.metadata),
        "has_config": weights.config is not None,
        "num_tensors": len(weights.tensors),
        "nbytes": weights.total_nbytes,
        "files": [{"path": file.path, "size": file.size} for file in weights.files],
        "tensors": [
            {
                "name": name,
                "dtype": location.entry.torch_dtype,
                "shape": list(location.entry.shape),
                "nbytes": location.nbytes,
                "file": location.file.path,
                "offset": location.offset,
            }
            for name, location in weights.tensors.items()
        ],
    }


def _show(weights: WeightFiles) -> Iterator[str]:
    yield show_headline(weights)
    files, tensors = show_count(len(weights.files), "file"), show_count(len(weights.tensors), "tensor")
    yield f"{files}, {tensors}, {show_size(weights.total_nbytes)}"
    yield from (f"  file {shorten_repr(file.path)}: {show_size(file.size)}" for file in weights.files)
    if weights.metadata:
        yield "metadata"
        yield from (f"  {shorten_repr(k)}: {shorten_repr(v)}" for k, v in sorted(weights.metadata.items()))
    if weights.config is not None:
        yield f"config with {show_count(len(weights.config), 'field')}"
    if weights.tensors:
        yield "tensors"
        entries = ((name, location.entry) for name, location in weights.tensors.items())
        rows = [(shorten_repr(name), e.torch_dtype, str(list(e.shape)), str(e.nbytes)) for name, e in entries]
        yield from _align([("name", "dtype", "shape", "bytes"), *rows])


def _align(rows: Sequence[tuple[str, str, str, str]]) -> Iterator[str]:
    """Set rows in columns; the last one, a number, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *texts, number in rows:
        left = "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=False))
        yield f"  {left}  {number.rjust(widths[-1])}"


INSPECT = Command(
    name="inspect",
    summary="list the tensors and the metadata of weights; reads headers only",
    add_arguments=_add_arguments,
    run=_run,
)
