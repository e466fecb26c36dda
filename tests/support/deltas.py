"""Deltas to test with: manifests in which every part of a delta is there, and releases of odd tensors on disk."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hotglm.delta_fields import CODECS, BaseRelease, DeltaFields, TensorDelta
from hotglm.file_entry import FileEntry, combine_pieces
from hotglm.manifest_fields import MANIFEST_NAME, Manifest, ReleasedTensor
from hotglm.release.packing import pack
from hotglm.version import Version
from support.bytes_maker import NBITS, layout, make_file, split_file
from support.releases import SHA, manifests, small_manifest

__all__ = [
    "Part",
    "State",
    "change_state",
    "delta_manifests",
    "draw_state",
    "edit_delta",
    "pack_state",
    "read_tree",
    "small_delta",
    "write_state",
]

Part = tuple[str, tuple[int, ...], bytes]
"""A tensor of a payload: dtype as the format has it, shape, bytes."""

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


# -- on disk -----------------------------------------------------------------------------------------------------------

State = dict[str, tuple[str, tuple[int, ...], bytes]]
"""What a file of weights holds: name -> dtype as the format has it, shape, bytes."""

DTYPES = ("BOOL", "U8", "I16", "BF16", "F16", "U32", "F32", "I64", "F64", "C64", "F8_E4M3", "F8_E5M2FNUZ")


def draw_state(rng: random.Random, num: int = 6) -> State:
    """Return tensors of odd dtypes and shapes: empty, without dimensions, of one byte."""
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (3, 0, 2), (1, 1), (7, 5), (300,), (2, 3, 4)]
    state: State = {}
    for number in range(num):
        dtype, shape = rng.choice(DTYPES), rng.choice(shapes)
        state[f"layer.{number}"] = (dtype, shape, rng.randbytes(math.prod(shape) * NBITS[dtype] // 8))
    return state


def change_state(rng: random.Random, state: State) -> State:
    """Return the next version: tensors kept, changed a little, a lot, in dtype or shape, dropped and added."""
    changed: State = {}
    for name, (dtype, shape, data) in state.items():
        way = rng.random()
        if way < 0.3:
            changed[name] = (dtype, shape, data)
        elif way < 0.5 and data:
            at = rng.randrange(len(data))
            changed[name] = (dtype, shape, data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1 :])
        elif way < 0.6:
            changed[name] = (dtype, shape, bytes(byte ^ (rng.random() < 0.3) for byte in data))
        elif way < 0.8:
            changed[name] = (dtype, shape, rng.randbytes(len(data)))
        elif way < 0.9:
            changed[name] = (dtype, (*shape, 1), data)
    return changed | {f"new.{number}": one for number, one in enumerate(draw_state(rng, rng.randint(0, 2)).values())}


def write_state(directory: Path, state: State, *, num_files: int = 1, note: str = "") -> Path:
    """Write weights as Hugging Face has them, with a config beside them; `note` stands in the headers."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"note": note}))
    files = [f"model-{number}.safetensors" for number in range(num_files)] if num_files > 1 else ["model.safetensors"]
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files):
        names = list(state)[number::num_files]
        header, _ = layout({name: state[name][:2] for name in names})
        header["__metadata__"] = {"note": note}
        (directory / file).write_bytes(make_file(header, b"".join(state[name][2] for name in names)))
        weight_map |= dict.fromkeys(names, file)
    if num_files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def pack_state(directory: Path, number: int, state: State, *, num_files: int = 1) -> Path:
    """Make a full release `full-NUMBER` of version NUMBER.0 in `directory`, and return where it is."""
    source = write_state(directory / f".source-{number}", state, num_files=num_files, note=f"version {number}")
    path = directory / f"full-{number}"
    pack(source, path, name="ranker", version=f"{number}.0", sequence=number).close()
    return path


def read_tree(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a directory, by path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit_delta(
    path: Path, edit: Callable[[dict[str, Any]], object] | None = None, parts: Mapping[str, Part | None] | None = None
) -> None:
    """Change a delta and make its manifest promise what is there then, as somebody with ill will can.

    Args:
        path: its directory.
        edit: changes its manifest.
        parts: replaces parts of its payload: dtype, shape and bytes; None takes one away.
    """
    manifest = json.loads((path / MANIFEST_NAME).read_bytes())
    payload = path / manifest["delta"]["payload"]
    text, data = split_file(payload.read_bytes())
    found = json.loads(text)
    held: dict[str, Part | None] = {
        name: (one["dtype"], tuple(one["shape"]), data[slice(*one["data_offsets"])]) for name, one in found.items()
    }
    held |= parts or {}
    kept = {name: one for name, one in held.items() if one is not None}
    header, _ = layout({name: one[:2] for name, one in kept.items()})
    file = make_file(header, b"".join(one[2] for one in kept.values()))
    payload.chmod(0o644)
    payload.write_bytes(file)
    head = file[: len(file) - sum(len(one[2]) for one in kept.values())]
    digests = [hashlib.sha256(part).hexdigest() for part in (head, *(one[2] for one in kept.values()))]
    manifest["files"][manifest["delta"]["payload"]] = {"digest": combine_pieces(digests), "size": len(file)}
    if edit is not None:
        edit(manifest)
    (path / MANIFEST_NAME).chmod(0o644)
    (path / MANIFEST_NAME).write_bytes(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode() + b"\n")
