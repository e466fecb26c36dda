"""Writing a safetensors file that says what it is: version, name, config and the digest of every tensor.

Rules this module keeps:

- The file appears whole or not at all: it is written beside its place, flushed to the disk and renamed (P11).
- What reading would refuse is not written: the header goes through the reader's own parser first, and so does the
  config.
- Tensors go from their memory to the file, one after the other; only one that is not contiguous is copied, for as long
  as it is written. Nothing but torch is needed for it.
- A tied tensor of a module is written once, under its first name; of a mapping, every name is.
- The metadata keys are those that staging reads: `hotglm.name`, `hotglm.version`, `hotglm.config`, `hotglm.requires`,
  `hotglm.digests`, `hotglm.module_versions`; and `hotglm.environment`, where the file was made, for `hotglm doctor`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hotglm.environment import MAX_REQUIREMENTS, Unmet, find_distinct, parse_requirement
from hotglm.errors import ArgumentError, Problem, shorten_repr
from hotglm.header import PREFIX_NBYTES
from hotglm.migration.tensor_spec import TensorSpec
from hotglm.model.file_layout import format_config, lay_out_entries, make_header
from hotglm.model.inspection import find_state, find_tensor_fault
from hotglm.model.module_versions import KEY as MODULE_VERSIONS_KEY
from hotglm.model.module_versions import find_module_versions, format_module_versions
from hotglm.model.registry import find_definition, read_config
from hotglm.model.whole_file import verify_path, write_whole
from hotglm.release.environment import CREATION_KEY, format_creation
from hotglm.version import Version
from hotglm.weights.digest import digest_tensor, tensor_bytes, view_buffer
from hotglm.weights.dtypes import LOADABLE_DTYPES, dtype_name

__all__ = ["save_weights", "untied_state"]


def save_weights(
    source: nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    version: str | Version | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    requires: Collection[str] = (),
) -> dict[str, str]:
    """Write the weights of a module, or a mapping of tensors, to one safetensors file; return the digests by name.

    The versions that modules give their state (`state_dict()._metadata`) are written beside them; see
    `model/module_versions.py`.

    A reader of `path` sees the old file or the new one, never a part. On an error `path` is as it was, unless what
    failed is the last step, flushing the directory: then the new file is there, whole, and may be gone after a crash.

    Args:
        source: the module (its parameters and persistent buffers) or the tensors, on the CPU; only read.
        path: the file; its directory must exist. A link is followed; the mode of a file that is there is kept.
        version: version of these weights; for a module, what `@versioned` declared if None.
        name: name of the model; likewise.
        config: fields of the config, as JSON can hold them; for a module, those of the dataclass it keeps as `config`
            if None.
        requires: requirements such as `"torch>=2.6"`.

    Raises:
        VersionSyntaxError: `version` does not parse.
        ArgumentError: tensors that a file cannot hold, fields of the config that JSON cannot, or requirements that do
            not parse; of each kind, all are named.
        HeaderError: names or sizes that reading the file would refuse, all named.
        OSError: the file cannot be written.
    """
    target = verify_path(path)
    tensors = _collect(source)
    metadata = _describe(source, version=version, name=name, config=config, requires=requires)
    digests = {key: digest_tensor(tensor) for key, tensor in tensors.items()}
    metadata["hotglm.digests"] = json.dumps(digests)
    specs = {key: TensorSpec(dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for key, t in tensors.items()}
    entries = lay_out_entries(specs)
    header = make_header(entries, metadata)
    write_whole(target, _chunks(header, [tensors[entry.name] for entry in entries]))
    return digests


# -- tensors -----------------------------------------------------------------------------------------------------------


def _collect(source: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(source, nn.Module):
        tensors = dict(untied_state(source))
    elif isinstance(source, Mapping):
        tensors = dict(source)
    else:
        raise ArgumentError(
            f"Expected a module or a mapping of tensors, got {shorten_repr(type(source).__name__)}.",
            remedy="pass the model or its state_dict().",
        )
    problems = [problem for key, tensor in tensors.items() if (problem := _find_problem(key, tensor))]
    if problems:
        remedy = "convert the named tensors first, or leave them out."
        raise ArgumentError("Expected tensors that a file can hold.", problems=problems, remedy=remedy)
    return tensors


def untied_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the state of a module, what has several names under the first of them."""
    seen: set[tuple[object, ...]] = set()
    wrapped: set[int] = set()
    for entry in find_state(module):
        tensor = entry.tensor
        if not entry.persistent:
            continue
        if entry.wrapper is not None:  # no file can hold what it is; whoever writes one says so
            if id(entry.wrapper) not in wrapped:
                wrapped.add(id(entry.wrapper))
                yield entry.registered_name, entry.wrapper
            continue
        if find_tensor_fault(tensor) is None and tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if place in seen:
                continue
            seen.add(place)
        yield entry.name, tensor


def _find_problem(name: object, tensor: object) -> Problem | None:
    if not isinstance(name, str):
        return Problem(code="BAD_NAME", message=f"Expected text as a name, got {shorten_repr(name)}")
    if not isinstance(tensor, torch.Tensor):
        found = shorten_repr(type(tensor).__name__)
        return Problem(code="BAD_TENSOR", message=f"Expected a tensor, got {found}", tensor=name)
    if fault := find_tensor_fault(tensor):
        message = f"Expected a plain dense CPU tensor, got {fault}"
        return Problem(code="UNSUPPORTED_TENSOR", message=message, tensor=name)
    if tensor.dtype not in LOADABLE_DTYPES:
        message = f"Expected a dtype of safetensors, got {dtype_name(tensor.dtype)}"
        return Problem(code="UNSUPPORTED_DTYPE", message=message, tensor=name)
    return None


def _chunks(header: bytes, tensors: list[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(PREFIX_NBYTES, "little"))
    yield memoryview(header)
    for tensor in tensors:
        data = tensor_bytes(tensor)
        if data.numel():
            yield view_buffer(data)  # `data` stays until the consumer asks for the next one


# -- metadata ----------------------------------------------------------------------------------------------------------


def _describe(
    source: object,
    *,
    version: str | Version | None,
    name: str | None,
    config: Mapping[str, Any] | None,
    requires: Collection[str],
) -> dict[str, str]:
    module = source if isinstance(source, nn.Module) else None
    definition = None if module is None else find_definition(type(module))
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"Expected text as name, got {shorten_repr(name)}.", remedy="pass a string.")
    fields = read_config(module) if config is None and module is not None else config
    chosen = version if version is not None else definition.version if definition else None
    parts = find_module_versions(source)
    metadata = {
        "hotglm.name": name or (definition.name if definition else None),
        "hotglm.version": None if chosen is None else str(Version(chosen)),
        "hotglm.config": None if fields is None else format_config(fields),
        "hotglm.requires": _format_requirements(requires),
        CREATION_KEY: format_creation((*requires, *(definition.requires if definition else ()))),
        MODULE_VERSIONS_KEY: None if parts is None else format_module_versions(parts),
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _format_requirements(requires: Collection[str]) -> str | None:
    remedy = "pass a list such as ['torch>=2.6']."
    if isinstance(requires, str):
        raise ArgumentError(f"Expected a list of requirements, got {shorten_repr(requires)}.", remedy=remedy)
    judged = [parse_requirement(text) for text in find_distinct(requires)]
    problems = [Problem(code=unmet.code, message=unmet.message) for unmet in judged if isinstance(unmet, Unmet)]
    if len(judged) > MAX_REQUIREMENTS:
        message = f"Expected at most {MAX_REQUIREMENTS} requirements, got more."
        problems.append(Problem(code="BAD_REQUIREMENT", message=message))
    if problems:
        raise ArgumentError("Expected requirements that can be judged.", problems=problems, remedy=remedy)
    return json.dumps(list(requires)) if requires else None
