"""Golden releases: for every version ever released its weights, and what it answered, kept and verified for ever.

A golden is a directory `DIR/NAME/VERSION` of three files:

- `weights.safetensors`, as `hotglm.save_weights` writes it: version, name, config and the digest of every tensor.
- `tensors.safetensors`: the tensors among the arguments and outputs of one pass.
- `golden.json`: the trees those tensors stand in, the tolerance, the digests of the two other files, and what all of
  it was made on.

Rules this module keeps:

- A golden is made once: one that is there is never written over, and one that is made appears whole or not at all.
- Data only: nothing is unpickled or imported to read one, and its files are hashed before they are used.
- A golden is what its directory says: one that was renamed, copied or lost a file is named as wrong, never passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from hotglm.document import Report, parse_json
from hotglm.errors import (
    ArgumentError,
    DigestMismatchError,
    HotglmError,
    Problem,
    SourceError,
    shorten_repr,
)
from hotglm.model.recording import call_with
from hotglm.model.registry import find_definition
from hotglm.model.save import save_weights
from hotglm.problem import describe_exception
from hotglm.release.files import open_weights
from hotglm.slot.checks import Inputs
from hotglm.testing.golden_tree import pack, unpack
from hotglm.testing.traffic import Tolerance
from hotglm.version import Version
from hotglm.weights.digest import format_digest

__all__ = ["GoldenRelease", "describe_machine", "find_goldens", "make_golden", "read_golden"]

SCHEMA = "hotglm.golden/1"
_WEIGHTS, _TENSORS, _DOCUMENT = "weights.safetensors", "tensors.safetensors", "golden.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_REMEDY = "restore the golden from version control; a golden is never edited, and made again only as another version."


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRelease:
    """A golden that was read, with its files as they were promised.

    Attributes:
        path: its directory.
        name: name of the model.
        version: the version.
        inputs: arguments of the pass.
        outputs: what it answered, every mapping and dataclass as a dict.
        tolerance: how far an answer may be from `outputs` where bits cannot be asked for.
        made_on: names and versions of what it was made on.
        config: fields of its config, None where it has none.
    """

    path: Path
    name: str
    version: Version
    inputs: Inputs
    outputs: Any
    tolerance: Tolerance
    made_on: Mapping[str, Any]
    config: Mapping[str, Any] | None

    @property
    def weights(self) -> Path:
        """The file with the weights."""
        return self.path / _WEIGHTS


# -- making ------------------------------------------------------------------------------------------------------------


def make_golden(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    inputs: Inputs,
    name: str | None = None,
    version: str | Version | None = None,
    config: Mapping[str, Any] | None = None,
    tolerance: Tolerance = Tolerance(rtol=1e-4, atol=1e-5),  # noqa: B008 - immutable
) -> Path:
    """Record what `model` answers to `inputs`, beside its weights; return the new directory.

    Args:
        model: the released model, in `eval()` mode; it runs one pass without gradients.
        directory: where all goldens are kept.
        inputs: arguments of the pass: a tensor, a tuple or a mapping; tensors, numbers, text and containers of those.
        name: name of the model; what `@versioned` declared if None.
        version: its version; likewise.
        config: fields of its config; those of the dataclass that it keeps as `config` if None.
        tolerance: how far later code may be from the answer where its operations differ.

    Raises:
        ArgumentError: no name or version is known, they are no plain names of directories, the answer is no data, or
            there is a golden already.
        OSError: it cannot be written.
    """
    definition = find_definition(type(model))
    label, number = (
        name or (definition.name if definition else ""),
        version or (definition.version if definition else ""),
    )
    path = _find_place(Path(directory), label, str(number))
    with torch.no_grad():
        outputs = call_with(model, inputs)
    inputs_tree, tensors = pack(inputs, "inputs")
    outputs_tree, found = pack(outputs, "outputs")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{secrets.token_hex(6)}.partial"
    partial.mkdir()
    try:
        save_weights(model, partial / _WEIGHTS, version=number, name=label, config=config)
        save_weights({**tensors, **found}, partial / _TENSORS)
        document = {
            "schema": SCHEMA,
            "name": label,
            "version": str(Version(number)),
            "inputs": inputs_tree,
            "outputs": outputs_tree,
            "rtol": tolerance.rtol,
            "atol": tolerance.atol,
            "digests": {file: _digest(partial / file) for file in (_WEIGHTS, _TENSORS)},
            "made_on": describe_machine(),
        }
        (partial / _DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _verify_readable(partial)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _find_place(directory: Path, name: str, version: str) -> Path:
    for what, text in (("name", name), ("version", version)):
        if not _PLAIN_NAME.fullmatch(text):
            raise ArgumentError(
                f"Expected a plain {what} of a model, got {shorten_repr(text)}.",
                remedy="give name and version, of letters, digits and . _ + - only.",
            )
    path = directory / name / str(Version(version))
    if path.exists():
        raise ArgumentError(
            f"Expected no golden of {name} {version} yet, got {path!s}.",
            remedy="release the change as another version; a golden of what was never released may be deleted by hand.",
        )
    return path


def _verify_readable(partial: Path) -> None:
    try:
        _read(partial)
    except HotglmError as error:
        raise ArgumentError(
            "Expected a golden that can be read again once it is made.",
            problems=error.problems,
            remedy="give arguments, outputs and a tolerance that can be kept as data; nothing was written.",
        ) from error


def _digest(file: Path) -> str:
    return format_digest(hashlib.sha256(file.read_bytes()).hexdigest())


def describe_machine() -> dict[str, str]:
    """Return names and versions of what decides the bits of an answer, and of Python."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "num_threads": str(torch.get_num_threads()),
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def find_goldens(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the directory of every golden under `directory`, by name and version; those that lost a file as well."""
    with contextlib.suppress(OSError):
        found = {
            path.parent
            for file in (_DOCUMENT, _WEIGHTS, _TENSORS)
            for path in Path(directory).glob(f"*/*/{file}")
            if not path.parent.name.startswith(".")  # what a making that was killed has left behind
        }
        yield from sorted(found, key=_order)


def _order(path: Path) -> tuple[str, Version, str]:
    try:
        return path.parent.name, Version(path.name), path.name
    except HotglmError:
        return path.parent.name, Version("0"), path.name


def read_golden(path: str | os.PathLike[str]) -> GoldenRelease:
    """Return the golden in the directory `path`, having hashed its files.

    Raises:
        SourceError: it cannot be read, or is not as a golden is written. DigestMismatchError: a file is another one.
    """
    path = Path(path)
    golden = _read(path)
    place = path.resolve()
    if (golden.name, str(golden.version)) != (place.parent.name, place.name):
        kept = f"{golden.name} {golden.version}"
        raise _unfit(path, f"the golden of {shorten_repr(f'{place.parent.name} {place.name}')}, got {kept!a}")
    return golden


def _read(path: Path) -> GoldenRelease:
    try:
        text = (path / _DOCUMENT).read_bytes()
        headline, file = f"Expected a golden in {str(path)!a}.", str(path / _DOCUMENT)
        report = Report(SourceError, headline=headline, remedy=_REMEDY, prefix="GOLDEN", file=file)
        document = parse_json(text, report=report)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise _unfit(path, f"schema {SCHEMA!r}, got {shorten_repr(document)}")
        for name in (_WEIGHTS, _TENSORS):
            expected = document["digests"][name]
            if (found := _digest(path / name)) != expected:
                problem = Problem(
                    code="DIGEST_MISMATCH",
                    message="Expected the file that the golden was made with, got another",
                    file=str(path / name),
                    expected=expected,
                    found=found,
                )
                raise DigestMismatchError(headline, problems=[problem], remedy=_REMEDY)
        tensors = safetensors.torch.load((path / _TENSORS).read_bytes())
        return GoldenRelease(
            path=path,
            name=_read_text(document["name"]),
            version=Version(document["version"]),
            inputs=unpack(document["inputs"], tensors),
            outputs=unpack(document["outputs"], tensors),
            tolerance=Tolerance(rtol=_read_number(document["rtol"]), atol=_read_number(document["atol"])),
            made_on={_read_text(key): _read_text(value) for key, value in document["made_on"].items()},
            config=_read_config(path / _WEIGHTS),
        )
    except OSError as error:
        raise _unfit(path, f"its files, got {describe_exception(error)}") from error
    except (KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        raise _unfit(path, f"its fields, got {describe_exception(error)}") from error


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"no text: {shorten_repr(value)}")
    return value


def _read_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"no tolerance: {shorten_repr(value)}")
    return value


def _read_config(weights: Path) -> Mapping[str, Any] | None:
    with open_weights(weights) as files:
        return files.config


def _unfit(path: Path, what: str) -> SourceError:
    problem = Problem(code="BAD_GOLDEN", message=f"Expected {what}", file=str(path / _DOCUMENT))
    return SourceError(f"Expected a golden in {str(path)!a}.", problems=[problem], remedy=_REMEDY)
