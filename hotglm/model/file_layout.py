"""How tensors, config and metadata stand in a file that is to be written: header text that a reader takes.

Rules this module keeps: no torch, no IO. What reading would refuse is refused here: the header goes through the
reader's own parser, and so does the config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hotglm.document import Report, parse_json
from hotglm.errors import ArgumentError, HeaderError, Problem, SourceError, shorten_repr
from hotglm.header import DEFAULT_LIMITS, DTYPES, PREFIX_NBYTES, TensorEntry, format_header, parse_header
from hotglm.migration.tensor_spec import TensorSpec
from hotglm.problem import describe_exception

__all__ = ["format_config", "lay_out_entries", "make_header"]

_FORMAT_NAMES = {info.torch_name: name for name, info in DTYPES.items() if info.torch_name}


def lay_out_entries(specs: Mapping[str, TensorSpec]) -> list[TensorEntry]:
    """Return where each tensor goes: those of large elements first, so that all are aligned, then by name.

    Raises:
        ArgumentError: dtypes that the format does not have, with every tensor of such a one.
    """
    problems = [
        Problem(code="UNSUPPORTED_DTYPE", message=f"Expected a dtype of safetensors, got {spec.dtype}", tensor=name)
        for name, spec in specs.items()
        if spec.dtype not in _FORMAT_NAMES
    ]
    if problems:
        remedy = "convert the named tensors first, or leave them out."
        raise ArgumentError("Expected tensors that a file can hold.", problems=problems, remedy=remedy)
    entries: list[TensorEntry] = []
    end = 0
    for name in sorted(specs, key=lambda name: (-DTYPES[_FORMAT_NAMES[specs[name].dtype]].nbits, name)):
        spec, start = specs[name], end
        end += spec.nbytes
        dtype = _FORMAT_NAMES[spec.dtype]
        entries.append(TensorEntry(name=name, dtype=dtype, shape=spec.shape, start=start, stop=end))
    return entries


def format_config(config: Mapping[str, Any]) -> str:
    """Return the config as JSON that staging reads.

    Raises:
        ArgumentError: with every field that it would refuse.
    """
    remedy = "pass config= with fields that JSON can hold: text, finite numbers, booleans, None, lists and mappings."
    if not isinstance(config, Mapping):
        raise ArgumentError(f"Expected a mapping as config, got {shorten_repr(type(config).__name__)}.", remedy=remedy)
    problems = [
        Problem(code="BAD_CONFIG", message=f"Expected field {shorten_repr(field)} to be JSON, got {why}")
        for field, value in config.items()
        if (why := _why_not_json(field, value))
    ]
    text = "" if problems else json.dumps(dict(config), allow_nan=False)
    if len(text) > DEFAULT_LIMITS.config_nbytes:
        message = f"Expected at most {DEFAULT_LIMITS.config_nbytes} bytes of JSON, got {len(text)}"
        problems = [Problem(code="CONFIG_TOO_LARGE", message=message)]
    if problems:
        raise ArgumentError("Expected a config that a file can hold.", problems=problems, remedy=remedy)
    return text


def _why_not_json(field: object, value: object) -> str | None:
    if not isinstance(field, str):
        return "a name that is not text"
    report = Report(SourceError, headline="Refused", remedy="", prefix="CONFIG", file=None)
    try:
        parse_json(json.dumps({field: value}, allow_nan=False).encode(), report=report)
    except SourceError as refusal:  # too deep, or a key twice: 1 and "1"
        return refusal.problems[0].message.rpartition("got ")[2]
    except (TypeError, ValueError, RecursionError) as error:
        return describe_exception(error, limit=120)
    return None


def make_header(entries: list[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Return the header, having read it as a reader of the file will.

    Raises:
        HeaderError: with everything that a reader would refuse.
    """
    text = format_header(entries, metadata)
    data_nbytes = entries[-1].stop if entries else 0
    try:
        parse_header(text, file_size=PREFIX_NBYTES + len(text) + data_nbytes)
    except HeaderError as error:
        raise HeaderError(
            "Expected weights that can be read again once they are written; the header was refused.",
            problems=error.problems,
            remedy="rename or leave out what is named; nothing was written.",
        ) from None
    return text
