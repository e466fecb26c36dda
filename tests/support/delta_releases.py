"""Releases on disk to stage: full ones of given tensors, and deltas between two of them, of any codec, with any fault.

Made here by hand and not by hotglm's own maker, so that a fault of one does not hide one of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import hotglm
from hotglm.delta_fields import CODECS, BaseRelease, DeltaFields, TensorDelta
from hotglm.file_entry import FileEntry, combine_pieces
from hotglm.manifest import format_manifest
from hotglm.manifest_fields import MANIFEST_NAME
from hotglm.release.files import open_weights
from hotglm.release.store_reading import release_name
from hotglm.weights.delta_codec import SPARSE, XOR, Encoded, encode
from hotglm.weights.delta_sparse import encode_sparse
from hotglm.weights.delta_xor import encode_xor
from hotglm.weights.digest import digest_tensor, tensor_bytes

__all__ = ["read_tensors", "write_delta", "write_full"]

Parts = dict[str, torch.Tensor]


def write_full(root: Path, sequence: int, tensors: Mapping[str, torch.Tensor], *, name: str = "m") -> Path:
    """Write a full release, number and version of `sequence`, as a store would call it."""
    directory = root / release_name(sequence, f"1.0.{sequence}")
    directory.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors")
    hotglm.pack(directory, name=name, version=f"1.0.{sequence}", sequence=sequence).close()
    return directory


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return what a full release holds."""
    with open_weights(directory / "model.safetensors") as files:
        data = {name: (location, files.files[0]) for name, location in files.tensors.items()}
        text = Path(files.files[0].path).read_bytes()
    found = {}
    for name, (location, _) in data.items():
        raw = torch.tensor(list(text[location.offset : location.offset + location.nbytes]), dtype=torch.uint8)
        found[name] = raw.view(getattr(torch, location.entry.torch_dtype)).view(location.entry.shape)
    return found


def write_delta(
    old: Path,
    new: Path,
    destination: Path,
    *,
    codecs: Mapping[str, str] | None = None,
    spoil: Callable[[Parts], object] | None = None,
    respell: Callable[[dict[str, TensorDelta]], object] | None = None,
) -> Path:
    """Write the delta that leads from a full release to another one.

    Args:
        old: the base.
        new: the result.
        destination: where the delta goes; beside its base, to be applied.
        codecs: by name of a tensor; the smallest otherwise.
        spoil: is given the parts of the payload before they are written and hashed.
        respell: is given what the manifest will say about each tensor.
    """
    with hotglm.open_release(old) as base, hotglm.open_release(new) as result:
        before, after = base.manifest, result.manifest
        sequence = BaseRelease(version=before.version, sequence=before.sequence, digest=base.digest)
    parts: Parts = {}
    deltas: dict[str, TensorDelta] = {}
    olds, news = read_tensors(old), read_tensors(new)
    for name, one in after.tensors.items():
        known = before.tensors.get(name)
        if known is not None and (known.digest, known.dtype, known.shape) == (one.digest, one.dtype, one.shape):
            continue
        found = _encode(olds.get(name), news[name], (codecs or {}).get(name))
        names = tuple(f"{name}:{number}" for number in range(len(found.parts)))
        parts |= dict(zip(names, (part.contiguous() for part in found.parts), strict=True))
        digest = None if known is None or not CODECS[found.codec].has_base else known.digest
        deltas[name] = TensorDelta(codec=found.codec, base=digest, parts=names)
    weights = new / "model.safetensors"
    with open_weights(weights) as files:
        head = weights.read_bytes()[: files.files[0].header.data_start]
    parts["header:0"] = torch.tensor(list(head), dtype=torch.uint8)
    if spoil is not None:
        spoil(parts)
    if respell is not None:
        respell(deltas)
    destination.mkdir(parents=True)
    save_file(parts, destination / "delta.safetensors")
    entry = _describe(destination / "delta.safetensors", parts)
    fields = DeltaFields(
        base=sequence,
        payload="delta.safetensors",
        tensors=deltas,
        files={"model.safetensors": after.files["model.safetensors"]},
        headers={"model.safetensors": "header:0"},
    )
    manifest = replace(after, files={"delta.safetensors": entry}, delta=fields)
    (destination / MANIFEST_NAME).write_bytes(format_manifest(manifest))
    return destination


def _encode(old: torch.Tensor | None, new: torch.Tensor, codec: str | None) -> Encoded:
    if old is None or codec == "whole":
        return Encoded(codec="whole", parts=(new,))
    before, after = tensor_bytes(old), tensor_bytes(new)
    if codec == XOR:
        payload = encode_xor(before, after, itemsize=new.element_size(), limit=10**12)
        assert payload is not None
        return Encoded(codec=XOR, parts=(payload,))
    if codec == SPARSE:
        parts = encode_sparse(before, after, dtype=new.dtype)
        assert parts is not None
        return Encoded(codec=SPARSE, parts=parts)
    return encode(old, new)


def _describe(path: Path, parts: Parts) -> FileEntry:
    with open_weights(path) as files:
        head = hashlib.sha256(path.read_bytes()[: files.files[0].header.data_start]).hexdigest()
        inside = [digest_tensor(parts[name]).removeprefix("sha256:") for name in files.files[0].header.tensors]
    return FileEntry(size=path.stat().st_size, digest=combine_pieces([head, *inside]))
