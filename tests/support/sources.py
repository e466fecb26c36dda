"""Sources of releases: directories of a few bytes as Hugging Face has them, written without torch or Hypothesis."""

from __future__ import annotations

import json
from pathlib import Path

from support.bytes_maker import layout, make_file

__all__ = ["write_source"]

SHAPES = {"w": ("F32", (2, 3)), "b": ("BF16", (3,)), "empty": ("I8", (0, 4)), "scalar": ("I64", ())}


def write_source(directory: Path, *, seed: int = 0, shards: bool = False) -> Path:
    """Write a directory as Hugging Face has it: weights that differ by `seed`, config, tokenizer in a folder."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"hidden_size": 3, "eps": 1e-05}')
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (directory / ".gitattributes").write_text("hidden")
    parts = [["w", "empty"], ["b", "scalar"]] if shards else [list(SHAPES)]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        header, nbytes = layout({name: SHAPES[name] for name in names})
        header["__metadata__"] = {"format": "pt"}
        file = f"model-{number}.safetensors" if shards else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        data = seed.to_bytes(4, "little") + bytes((number * 7 + at) % 251 for at in range(nbytes - 4))
        (directory / file).write_bytes(make_file(header, data))
    if shards:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
