"""A release in shards, in the layout of Hugging Face: two files, their index and a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.bytes_maker import make_file, split_file
from support.universal import World

__all__ = ["write_sharded"]


def write_sharded(world: World, *, with_digests: bool = True) -> tuple[int, Path]:
    """Write the next version as a directory of two shards, an index and a config; return its number and path."""
    number, path = world.write(name="whole.tmp")
    header, data = split_file(path.read_bytes())
    whole: dict[str, Any] = json.loads(header)
    metadata = whole.pop("__metadata__")
    if not with_digests:
        del metadata["hotglm.digests"]
    directory = world.directory / "sharded"
    directory.mkdir(exist_ok=True)
    names = list(whole)
    weight_map: dict[str, str] = {}
    for shard, chosen in (("a.safetensors", names[:3]), ("b.safetensors", names[3:])):
        parts, start = [], 0
        entries: dict[str, object] = {"__metadata__": metadata}
        for name in chosen:
            first, last = whole[name]["data_offsets"]
            parts.append(data[first:last])
            entries[name] = {**whole[name], "data_offsets": [start, start + last - first]}
            start += last - first
            weight_map[name] = shard
        (directory / shard).write_bytes(make_file(entries, b"".join(parts)))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return number, directory
