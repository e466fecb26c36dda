"""Deltas to test with: manifests in which every part of a delta is there."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from hotglm.delta_fields import CODECS, BaseRelease, DeltaFields, TensorDelta
from hotglm.file_entry import FileEntry
from hotglm.manifest_fields import Manifest, ReleasedTensor
from hotglm.version import Version
from support.releases import SHA, manifests, small_manifest

__all__ = ["delta_manifests", "small_delta"]

PAYLOAD = "delta.safetensors"


def small_delta() -> Manifest:
    """Return a delta with one tensor of each kind: whole, xored, sparse, and the base's own."""
    full = small_manifest()
    names = {"w": (2, 3), "x": (4,), "s": (9,), "kept": ()}
    one = {name: ReleasedTensor(file="model.safetensors", dtype="float32", shape=shape, digest=f"sha256:{SHA}")
           for name, shape in names.items()}  # fmt: skip
    tensors = {
        "w": TensorDelta(codec="whole", base=None, parts=("w",)),
        "x": TensorDelta(codec="xor-zstd", base=f"sha256:{SHA}", parts=("x.xor",)),
        "s": TensorDelta(codec="sparse", base=f"sha256:{SHA}", parts=("s.at", "s.to")),
    }
    delta = DeltaFields(
        base=BaseRelease(version=Version("1.3.0"), sequence=6, digest=f"sha256:{SHA[::-1]}"),
        payload=PAYLOAD,
        tensors=tensors,
        files={"model.safetensors": FileEntry(size=500, digest=f"safetensors:{SHA}")},
        headers={"model.safetensors": "header:0"},
    )
    files = {"code/model.py": full.files["code/model.py"], PAYLOAD: FileEntry(size=200, digest=f"safetensors:{SHA}")}
    return replace(full, files=files, tensors=one, delta=delta)


@st.composite
def delta_manifests(draw: st.DrawFn) -> Manifest:
    """Draw a delta that the format can hold."""
    full = draw(manifests().filter(lambda one: one.weights is not None))
    files = {path: entry for path, entry in full.files.items() if entry.digest.startswith("safetensors:")}
    result = {
        path: replace(entry, size=100 + sum(one.nbytes for one in full.tensors.values() if one.file == path))
        for path, entry in files.items()
    }
    too_large = {path for path, entry in result.items() if entry.size >= 2**53}
    tensors = {name: one for name, one in full.tensors.items() if one.file not in too_large}
    result = {path: replace(entry, size=100) if path in too_large else entry for path, entry in result.items()}
    deltas = {}
    for name in draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else ():
        codec = draw(st.sampled_from(sorted(CODECS)))
        rule = CODECS[codec]
        parts = tuple(f"{name}:{number}" for number in range(rule.num_parts))
        deltas[name] = TensorDelta(codec=codec, base=f"sha256:{SHA}" if rule.has_base else None, parts=parts)
    delta = DeltaFields(
        base=BaseRelease(version=Version("0.9"), sequence=draw(st.integers(1, 99)), digest=f"sha256:{SHA}"),
        payload="d/delta.safetensors",
        tensors=deltas,
        files=result,
        headers={path: f"\u00a7{number}" for number, path in enumerate(result)},
    )
    kept = {path: entry for path, entry in full.files.items() if path not in files}
    payload = FileEntry(size=draw(st.integers(0, 2**40)), digest=f"safetensors:{SHA}")
    return replace(full, files=kept | {"d/delta.safetensors": payload}, tensors=tensors, delta=delta)
