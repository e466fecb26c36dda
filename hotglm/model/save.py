"""Writing a safetensors file that says what it is: version, name, config and the digest of every tensor.

Rules this module keeps:

- The file appears whole or not at all: it is written beside its place, flushed to the disk and renamed (P11).
- A tied tensor is written once, under its first name.
- The metadata keys are those that staging reads: `hotglm.name`, `hotglm.version`, `hotglm.config`, `hotglm.requires`,
  `hotglm.digests`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hotglm.errors import Problem, TensorValueError
from hotglm.model.inspection import find_state
from hotglm.model.registry import find_definition, read_config
from hotglm.version import Version
from hotglm.weights.digest import digest_tensor
from hotglm.weights.dtypes import LOADABLE_DTYPES

__all__ = ["save_weights"]


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

    A reader of `path` sees the old file or the new one, never a part. On an error `path` is as it was.

    Args:
        source: the module (its parameters and persistent buffers) or the tensors, on the CPU; only read.
        path: the file; its directory must exist.
        version: version of these weights; for a module, what `@versioned` declared if None.
        name: name of the model; likewise.
        config: fields of the config, as JSON can hold them; for a module, those of the dataclass it keeps as `config`
            if None.
        requires: requirements such as `"torch>=2.6"`.

    Raises:
        VersionSyntaxError: `version` does not parse.
        TensorValueError: tensors of dtypes that safetensors lacks, all named.
        OSError: the file cannot be written.
    """
    definition = find_definition(type(source)) if isinstance(source, nn.Module) else None
    tensors = _collect(source)
    _verify_dtypes(tensors)
    digests = {key: digest_tensor(tensor) for key, tensor in tensors.items()}
    fields = read_config(source) if config is None and isinstance(source, nn.Module) else config
    chosen = version if version is not None else definition.version if definition else None
    metadata = {
        "hotglm.name": name or (definition.name if definition else None),
        "hotglm.version": None if chosen is None else str(Version(chosen)),
        "hotglm.config": None if fields is None else json.dumps(dict(fields)),
        "hotglm.requires": json.dumps(list(requires)) if requires else None,
        "hotglm.digests": json.dumps(digests),
    }
    _write(tensors, os.fspath(path), {key: value for key, value in metadata.items() if value is not None})
    return digests


def _collect(source: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(source, nn.Module):
        named = {entry.name: entry.tensor for entry in find_state(source) if entry.persistent}
    else:
        named = dict(source)
    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        identity = (
            (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        )
        if identity not in seen:
            seen.add(identity)
            tensors[name] = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return _separate(tensors)


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy what shares a storage with an earlier tensor: the format has no overlaps."""
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages and tensor.numel():
            tensors[name] = tensor.clone()
        storages.add(storage)
    return tensors


def _verify_dtypes(tensors: Mapping[str, torch.Tensor]) -> None:
    problems = [
        Problem(code="UNSUPPORTED_DTYPE", message=f"Expected a dtype of safetensors, got {tensor.dtype}", tensor=name)
        for name, tensor in tensors.items()
        if tensor.dtype not in LOADABLE_DTYPES
    ]
    if problems:
        raise TensorValueError(
            "Expected tensors that a file can hold.", problems=problems, remedy="convert the named tensors first."
        )


def _write(tensors: Mapping[str, torch.Tensor], path: str, metadata: Mapping[str, str]) -> None:
    directory = os.path.dirname(path) or "."
    temporary = os.path.join(directory, f".{os.path.basename(path)}.{secrets.token_hex(6)}.partial")
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    _flush(directory)


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
