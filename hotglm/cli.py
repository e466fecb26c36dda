"""The command line: look into weights, compare two of them, run the demo.

Rules this module keeps:

- Nothing here imports torch, and no byte of a tensor is read: `inspect` and `diff` know what headers say.
- Exit codes: 0 is yes, 1 is no (`diff` only), 2 is an error, which goes to standard error without a traceback.
- Text is for people and may change; it is plain ASCII, with names from files quoted and escaped. `--json` is for
  programs: one document on standard output, whose `schema` changes when its meaning does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from hotglm import __version__
from hotglm.breakage import Breakage, find_breakages, required_bump
from hotglm.contract import Contract
from hotglm.errors import HotglmError, VersionSyntaxError, shorten_repr
from hotglm.problem import describe_exception
from hotglm.release.files import WeightFiles, open_weights
from hotglm.version import Bump, Version

__all__ = ["main"]

_OK, _NO, _ERROR = 0, 1, 2
_NAME_KEY, _VERSION_KEY = "hotglm.name", "hotglm.version"
_DEMO_MODULE = "hotglm.demo.main"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after the program's name; those of this process when None.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None or sys.stdout.closed:  # started with `>&-`
        _complain("standard output is closed.")
        return _ERROR
    try:
        try:
            return _run(words)
        except HotglmError as error:
            _complain(f"{type(error).__name__}: {error}")
            return _ERROR
        finally:
            sys.stdout.flush()  # here, so that what stands in its way is met inside of this `try`
    except BrokenPipeError:  # whoever read the answer has enough of it (`| head`)
        _discard(sys.stdout)
        return _ERROR
    except OSError as error:  # a full disk, most likely
        _discard(sys.stdout)
        _complain(describe_exception(error))
        return _ERROR


def _complain(text: str) -> None:
    """Say what went wrong, if there is anybody to say it to."""
    if sys.stderr is None or sys.stderr.closed:
        return
    try:
        print(f"hotglm: {text}", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Lead a stream that failed to nowhere, so that what is left in it does not fail again at exit."""
    with contextlib.suppress(OSError):  # one that has no descriptor of its own needs nothing
        fd = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)


def _run(words: list[str]) -> int:
    if words[:1] == ["demo"]:  # it has options of its own, and its own --help
        # By name, because the demo imports torch, which everything else here does without.
        code: int = importlib.import_module(_DEMO_MODULE).main(words[1:])
        return code
    arguments = _make_parser().parse_args(words)
    if arguments.command == "inspect":
        return _inspect(arguments.path, as_json=arguments.json)
    return _diff(arguments.old, arguments.new, as_json=arguments.json)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hotglm", description="Look into model weights, compare them, and watch a live model being swapped."
    )
    parser.add_argument("--version", action="version", version=f"hotglm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="list the tensors and the metadata of weights; reads headers only")
    inspect.add_argument("path", metavar="PATH", help="a .safetensors file, a shard index, or a directory of either")
    diff = commands.add_parser(
        "diff",
        help="compare two weights and tell how big a step of the version they are apart",
        epilog="Exit code: 0 if NEW fills the code that holds OLD as it is, 1 if it does not or names another model, "
        "2 on an error.",
    )
    diff.add_argument("old", metavar="OLD", help="weights as for inspect")
    diff.add_argument("new", metavar="NEW", help="weights as for inspect")
    for command in (inspect, diff):
        command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    commands.add_parser(
        "demo", help="swap a live classifier under load (demo --help lists its options)", add_help=False
    )
    return parser


# -- inspect -----------------------------------------------------------------------------------------------------------


def _inspect(path: str, *, as_json: bool) -> int:
    with open_weights(path) as weights:
        if as_json:
            _print_json("hotglm.inspect/1", _describe(weights))
        else:
            print("\n".join(_show(weights)))
    return _OK


def _describe(weights: WeightFiles) -> dict[str, object]:
    """Return everything that `inspect` knows, as JSON values."""
    return {
        **_identify(weights),
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
    yield _headline(weights)
    files, tensors = _count(len(weights.files), "file"), _count(len(weights.tensors), "tensor")
    yield f"{files}, {tensors}, {_size(weights.total_nbytes)}"
    yield from (f"  file {shorten_repr(file.path)}: {_size(file.size)}" for file in weights.files)
    if weights.metadata:
        yield "metadata"
        yield from (f"  {shorten_repr(k)}: {shorten_repr(v)}" for k, v in sorted(weights.metadata.items()))
    if weights.config is not None:
        yield f"config with {_count(len(weights.config), 'field')}"
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


# -- diff --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The step from one version to another: what it needs, and what it claims where both are known."""

    needed: Bump
    old: Version | None
    new: Version | None

    @property
    def honest(self) -> Version | None:
        """The smallest version after the old one that would be honest."""
        return None if self.old is None else self.old.bumped(self.needed)

    @property
    def claimed(self) -> Bump | None:
        """How big a step the two versions claim."""
        return None if self.old is None or self.new is None else self.old.bump_to(self.new)

    @property
    def is_honest(self) -> bool | None:
        """Whether they claim enough; a label is enough for new values (PATCH)."""
        return None if self.claimed is None else self.claimed >= self.needed or self.needed is Bump.PATCH


def _diff(old_path: str, new_path: str, *, as_json: bool) -> int:
    with open_weights(old_path) as old, open_weights(new_path) as new:
        breakages = tuple(find_breakages(_contract(old), _contract(new)))
        step = _Step(needed=max(Bump.PATCH, required_bump(breakages)), old=_read_version(old), new=_read_version(new))
        if as_json:
            _print_json("hotglm.diff/1", _describe_diff(old, new, breakages=breakages, step=step))
        else:
            print("\n".join(_show_diff(old, new, breakages=breakages, step=step)))
        # A file promises nothing but its name and layout, so every breakage that two files can have keeps one from
        # taking the place of the other under the same code; how big a step that is called is the author's business.
        return _NO if breakages or _is_renamed(old, new) else _OK


def _is_renamed(old: WeightFiles, new: WeightFiles) -> bool:
    """Tell whether the two are named as different models, which a slot would refuse (NAME_MISMATCH)."""
    names = {weights.metadata[_NAME_KEY] for weights in (old, new) if _NAME_KEY in weights.metadata}
    return len(names) > 1


def _contract(weights: WeightFiles) -> Contract:
    entries = ((name, location.entry) for name, location in weights.tensors.items())
    return Contract.of_tensors({name: (entry.torch_dtype, entry.shape) for name, entry in entries})


def _describe_diff(
    old: WeightFiles, new: WeightFiles, *, breakages: Iterable[Breakage], step: _Step
) -> dict[str, object]:
    breakages = list(breakages)
    return {
        "old": _identify(old),
        "new": _identify(new),
        "compatible": not breakages and not _is_renamed(old, new),
        "renamed": _is_renamed(old, new),
        "needed": step.needed.value,
        "claimed": None if step.claimed is None else step.claimed.value,
        "honest": step.is_honest,
        "honest_version": None if step.honest is None else str(step.honest),
        "breakages": [breakage.to_dict() for breakage in breakages],
    }


def _show_diff(old: WeightFiles, new: WeightFiles, *, breakages: Sequence[Breakage], step: _Step) -> Iterator[str]:
    yield f"old: {_headline(old)}"
    yield f"new: {_headline(new)}"
    if _is_renamed(old, new):
        yield "  - NAME_MISMATCH: they are named as different models; a slot of the one refuses the other"
    yield from (f"  - {breakage.code} ({breakage.bump.value}): {breakage.explain()}" for breakage in breakages)
    if breakages:
        yield f"{_count(len(breakages), 'breakage')}: the code that holds the old one cannot hold the new one."
    else:
        yield "Same names, shapes and dtypes: the code that holds the old one holds the new one."
    honest = "" if step.honest is None else f", such as {step.honest} after {step.old}"
    yield f"Needs a step of {step.needed.value}{honest}."
    if step.claimed is not None:
        order = "after" if step.old is None or step.new is None or step.new >= step.old else "going back from"
        yield f"Claims a step of {step.claimed.value} ({step.new} {order} {step.old}): {_judge(step)}."


def _judge(step: _Step) -> str:
    return "enough" if step.is_honest else "too little"


# -- what both share ---------------------------------------------------------------------------------------------------


def _identify(weights: WeightFiles) -> dict[str, object]:
    version = _read_version(weights)
    return {
        "path": weights.path,
        "name": weights.metadata.get(_NAME_KEY),
        "version": None if version is None else str(version),
    }


def _headline(weights: WeightFiles) -> str:
    name, version = weights.metadata.get(_NAME_KEY), _read_version(weights)
    parts = [
        shorten_repr(weights.path),
        *([f"model {shorten_repr(name)}"] if name is not None else []),
        f"version {version}" if version is not None else "no version",
    ]
    return ", ".join(parts)


def _read_version(weights: WeightFiles) -> Version | None:
    """Return the version that the metadata names; None where there is none, or one that does not parse."""
    text = weights.metadata.get(_VERSION_KEY)
    try:
        return None if text is None else Version(text)
    except VersionSyntaxError:
        return None


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def _size(nbytes: int) -> str:
    """Return a size for people, with the exact number where it is rounded.

    >>> _size(1000), _size(3 * 2**20)
    ('1000 bytes', '3.00 MiB (3145728 bytes)')
    """
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit} ({nbytes} bytes)"
    return _count(nbytes, "byte")


def _print_json(schema: str, document: Mapping[str, object]) -> None:
    print(json.dumps({"schema": schema, **document}, indent=2, ensure_ascii=True, allow_nan=False))
