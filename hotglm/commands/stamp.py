"""`hotglm stamp`: write into a plain file which version its weights are; not a byte of a tensor is changed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

from hotglm.commands.command import OK, Command
from hotglm.commands.console import NAME_KEY, print_json
from hotglm.commands.progress import ProgressBar
from hotglm.errors import ArgumentError, shorten_repr
from hotglm.header import PREFIX_NBYTES
from hotglm.model.file_layout import make_header
from hotglm.model.whole_file import verify_path, write_whole
from hotglm.release.files import WeightFile, WeightFiles, open_weights
from hotglm.release.migration import VERSION_KEY
from hotglm.release.reading import read_exactly
from hotglm.version import Version

__all__ = ["STAMP"]

_CHUNK_NBYTES = 1 << 22


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a .safetensors file, or a directory with one")
    parser.add_argument("target", metavar="DST", nargs="?", help="the file to write; SRC itself where left out")
    parser.add_argument("--version", required=True, metavar="VERSION", help="the version of its weights")
    parser.add_argument("--name", metavar="NAME", help="the name of the model")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _run(arguments: argparse.Namespace) -> int:
    version = Version(arguments.version)
    with open_weights(arguments.source) as files, ProgressBar(sys.stderr) as bar:
        file = _find_only(files)
        target = verify_path(arguments.target if arguments.target is not None else file.path)
        metadata = {**file.header.metadata, VERSION_KEY: str(version)}
        if arguments.name is not None:
            metadata[NAME_KEY] = arguments.name
        header = make_header(list(file.header.tensors.values()), metadata)
        write_whole(target, _chunks(files, file, header, progress=bar.show))
        before = files.metadata.get(VERSION_KEY)
    if arguments.json:
        document = {"source": files.path, "written": target, "version": str(version), "before": before}
        print_json("hotglm.stamp/1", {**document, "name": metadata.get(NAME_KEY)})
    else:
        was = "none" if before is None else shorten_repr(before)
        print(f"wrote {shorten_repr(target)}: version {version}; it was {was}")
    return OK


def _find_only(files: WeightFiles) -> WeightFile:
    if len(files.files) != 1:
        raise ArgumentError(
            f"Expected one file of weights, got {len(files.files)} shards in {shorten_repr(files.path)}.",
            remedy="pass the version where they are used (version=..., --from), or migrate them into one file.",
        )
    return files.files[0]


def _chunks(
    files: WeightFiles, file: WeightFile, header: bytes, *, progress: Callable[[int, int], object]
) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(PREFIX_NBYTES, "little") + header)
    start, size = file.header.data_start, file.size
    for offset in range(start, size, _CHUNK_NBYTES):
        nbytes = min(_CHUNK_NBYTES, size - offset)
        yield memoryview(read_exactly(file.fd, nbytes=nbytes, offset=offset, path=file.path))
        progress(offset + nbytes - start, size - start)
    files.verify_unchanged()  # before the new file takes its place


STAMP = Command(
    name="stamp",
    summary="write into a file which version its weights are",
    epilog="The file appears whole or not at all. Exit code: 0 if it was written, 2 on an error.",
    add_arguments=_add_arguments,
    run=_run,
)
