"""Five versions of one small transformer, with its checkpoints, its migrations, and a reference that knows neither.

What changed, version by version:

- 1.0: `encoder.layers.N` with separate q, k and v; the head is tied to the embedding; 10 words.
- 1.4: q, k and v are fused, and the encoder is called `backbone`.
- 2.0: the layers are called `blocks` and their norms by what they precede; in the config, `max_seq_len` is
  `max_length` and `use_fp16` is `amp`.
- 2.1: the vocabulary grew to 12 words; the new ones start at zero.
- 3.0: the head has weights of its own, and what comes out is scaled by a parameter `temper`.

`make_checkpoint(version)` gives weights of a version as its own code would have saved them. The reference is
`convert(state, old, new)`: plain torch, step by step. `MIGRATIONS` is what the library is given. The classes are
registered under `NAME`, all of them; a slot that is to stay with its own code is made with `migrations=MIGRATIONS`
(see `make_slot`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import hotglm

__all__ = [
    "CLASSES",
    "MIGRATIONS",
    "NAME",
    "VERSIONS",
    "convert",
    "make_checkpoint",
    "make_config",
    "make_input",
    "make_model",
    "make_slot",
]

NAME = "family"
VERSIONS = ("1.0", "1.4", "2.0", "2.1", "3.0")
WIDTH, DEPTH, HEADS, LENGTH = 8, 2, 2, 6
OLD_WORDS, NEW_WORDS = 10, 12

State = dict[str, torch.Tensor]


@dataclass
class OldConfig:
    """The config until 2.0."""

    max_seq_len: int = LENGTH
    use_fp16: bool = False
    words: int = OLD_WORDS
    width: int = WIDTH
    depth: int = DEPTH
    heads: int = HEADS


@dataclass
class NewConfig:
    """The config from 2.0 on."""

    max_length: int = LENGTH
    amp: bool = False
    words: int = OLD_WORDS
    width: int = WIDTH
    depth: int = DEPTH
    heads: int = HEADS


@dataclass
class UntiedConfig(NewConfig):
    """The config from 3.0 on."""

    temperature: str = "learned"


def _attend(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (part.reshape(*part.shape[:-1], heads, -1).transpose(-2, -3) for part in qkv.chunk(3, dim=-1))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)


class SplitLayer(nn.Module):
    """A layer of 1.0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln1(x)
        x = x + self.out(_attend(torch.cat([self.q(y), self.k(y), self.v(y)], dim=-1), self.heads))
        mixed: torch.Tensor = x + self.mlp(self.ln2(x))
        return mixed


class FusedLayer(nn.Module):
    """A layer of 1.4."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.out(_attend(self.qkv(self.ln1(x)), self.heads))
        mixed: torch.Tensor = x + self.mlp(self.ln2(x))
        return mixed


class Block(nn.Module):
    """A layer from 2.0 on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.out(_attend(self.qkv(self.norm_attention(x)), self.heads))
        mixed: torch.Tensor = x + self.mlp(self.norm_mlp(x))
        return mixed


def _stack(kind: Callable[[int, int], nn.Module], config: OldConfig | NewConfig) -> nn.ModuleList:
    return nn.ModuleList(kind(config.width, config.heads) for _ in range(config.depth))


class Tied(nn.Module):
    """What the versions share until 3.0: an embedding that is the head as well, and learned positions."""

    config: OldConfig | NewConfig

    def _make_ends(self, words: int, length: int, width: int) -> None:
        self.embed = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(length, width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def _layers(self) -> nn.ModuleList:
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[-1]]
        for layer in self._layers():
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


@hotglm.versioned(NAME, "1.0", reads=">=1", config=OldConfig)
class Family10(Tied):
    """Version 1.0."""

    def __init__(self, config: OldConfig) -> None:
        super().__init__()
        self.config = config
        self._make_ends(config.words, config.max_seq_len, config.width)
        self.encoder = nn.ModuleDict({"layers": _stack(SplitLayer, config)})

    def _layers(self) -> Any:
        return self.encoder["layers"]


@hotglm.versioned(NAME, "1.4", reads=">=1", config=OldConfig)
class Family14(Tied):
    """Version 1.4."""

    def __init__(self, config: OldConfig) -> None:
        super().__init__()
        self.config = config
        self._make_ends(config.words, config.max_seq_len, config.width)
        self.backbone = nn.ModuleDict({"layers": _stack(FusedLayer, config)})

    def _layers(self) -> Any:
        return self.backbone["layers"]


@hotglm.versioned(NAME, "2.0", reads=">=1", config=NewConfig)
class Family20(Tied):
    """Version 2.0."""

    def __init__(self, config: NewConfig) -> None:
        super().__init__()
        self.config = config
        self._make_ends(config.words, config.max_length, config.width)
        self.backbone = nn.ModuleDict({"blocks": _stack(Block, config)})

    def _layers(self) -> Any:
        return self.backbone["blocks"]


@hotglm.versioned(NAME, "2.1", reads=">=1", config=NewConfig)
class Family21(Family20):
    """Version 2.1: more words."""


@hotglm.versioned(NAME, "3.0", reads=">=1", config=UntiedConfig)
class Family30(Family20):
    """Version 3.0: a head of its own."""

    def __init__(self, config: UntiedConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.width, config.words, bias=False)
        self.temper = nn.Parameter(torch.ones(config.words))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.temper


CLASSES: Mapping[str, Callable[..., nn.Module]] = {
    "1.0": Family10,
    "1.4": Family14,
    "2.0": Family20,
    "2.1": Family21,
    "3.0": Family30,
}

MIGRATIONS = hotglm.migrations_of(NAME)
MIGRATIONS.state(
    "1.0",
    "1.4",
    [
        hotglm.Concatenate(
            (
                r"encoder\.layers\.(\d+)\.q\.(weight|bias)",
                r"encoder.layers.\1.k.\2",
                r"encoder.layers.\1.v.\2",
            ),
            r"encoder.layers.\1.qkv.\2",
        ),
        hotglm.Rename(r"encoder\.(.*)", r"backbone.\1"),
    ],
)
MIGRATIONS.config(
    "1.4", "2.0", [hotglm.RenameField("max_seq_len", "max_length"), hotglm.RenameField("use_fp16", "amp")]
)
MIGRATIONS.state(
    "1.4",
    "2.0",
    [
        hotglm.Rename(r"backbone\.layers\.(\d+)\.ln1\.(.*)", r"backbone.layers.\1.norm_attention.\2"),
        hotglm.Rename(r"backbone\.layers\.(\d+)\.ln2\.(.*)", r"backbone.layers.\1.norm_mlp.\2"),
        hotglm.Rename(r"backbone\.layers\.(.*)", r"backbone.blocks.\1"),
    ],
)
MIGRATIONS.config(
    "2.0",
    "2.1",
    [hotglm.MapField("words", up=lambda words: NEW_WORDS, down=lambda words: OLD_WORDS)],
)
MIGRATIONS.state("2.0", "2.1", [hotglm.Pad("embed.weight", dim=0, after=NEW_WORDS - OLD_WORDS)])
MIGRATIONS.config("2.1", "3.0", [hotglm.AddField("temperature", "learned")])
MIGRATIONS.state(
    "2.1",
    "3.0",
    [
        hotglm.Untie(("embed.weight", "head.weight")),
        hotglm.Add("temper", shape=(NEW_WORDS,), dtype="float32", initialiser=hotglm.Ones()),
    ],
)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def make_config(version: str) -> dict[str, Any]:
    """Return the config of a version, as its checkpoints carry it."""
    makers: Mapping[str, Callable[[], Any]] = {"1.0": OldConfig, "1.4": OldConfig, "3.0": UntiedConfig}
    config = asdict(makers.get(version, NewConfig)())
    return {**config, "words": NEW_WORDS if version in ("2.1", "3.0") else OLD_WORDS}


def make_checkpoint(version: str, *, seed: int = 0) -> State:
    """Return weights of a version, as a file of it holds them: every value drawn by `seed`, ties under one name.

    What going down needs is kept true of later versions: words that 2.0 does not know are zero, the head of 3.0 equals
    the embedding, and its `temper` is one.
    """
    base = _draw_oldest(seed)
    return convert(base, "1.0", version)


def _draw_oldest(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Family10(OldConfig()).state_dict().items()}
    del shapes["head.weight"]  # tied: a file has it once
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# -- the reference -----------------------------------------------------------------------------------------------------


def convert(state: Mapping[str, torch.Tensor], old: str, new: str) -> State:
    """Return `state` of version `old` in the layout of `new`, by plain torch; shares no memory with it."""
    found = {name: tensor.clone() for name, tensor in state.items()}
    start, stop = VERSIONS.index(old), VERSIONS.index(new)
    for index in range(start, stop):
        found = _UP[index](found)
    for index in range(start, stop, -1):
        found = _DOWN[index - 1](found)
    return found


def _fuse(state: State) -> State:
    fused: State = {}
    for name, tensor in state.items():
        new = name.replace("encoder.", "backbone.", 1)
        if not re.search(r"\.[qkv]\.(weight|bias)$", name):
            fused[new] = tensor
        elif ".q." in name:
            parts = [state[name.replace(".q.", f".{part}.")] for part in "qkv"]
            fused[new.replace(".q.", ".qkv.")] = torch.cat(parts)
    return fused


def _split(state: State) -> State:
    split: State = {}
    for name, tensor in state.items():
        new = name.replace("backbone.", "encoder.", 1)
        if ".qkv." not in name:
            split[new] = tensor
            continue
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            split[new.replace(".qkv.", f".{part}.")] = piece.clone()
    return split


_NAMES = (("backbone.layers.", "backbone.blocks."), (".ln1.", ".norm_attention."), (".ln2.", ".norm_mlp."))


def _rename(state: State) -> State:
    return {_replace(name, _NAMES): tensor for name, tensor in state.items()}


def _rename_back(state: State) -> State:
    return {_replace(name, [(new, old) for old, new in _NAMES]): tensor for name, tensor in state.items()}


def _replace(name: str, pairs: Any) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _grow(state: State) -> State:
    embed = torch.zeros(NEW_WORDS, WIDTH)
    embed[:OLD_WORDS] = state["embed.weight"]
    return {**state, "embed.weight": embed}


def _shrink(state: State) -> State:
    return {**state, "embed.weight": state["embed.weight"][:OLD_WORDS].clone()}


def _untie(state: State) -> State:
    return {**state, "head.weight": state["embed.weight"].clone(), "temper": torch.ones(NEW_WORDS)}


def _tie(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name not in ("head.weight", "temper")}


_UP: tuple[Callable[[State], State], ...] = (_fuse, _rename, _grow, _untie)
_DOWN: tuple[Callable[[State], State], ...] = (_split, _rename_back, _shrink, _tie)


def make_model(version: str, state: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Return a model of a version, cold: loaded with `state` by torch's own `load_state_dict`."""
    makers: Mapping[str, Callable[..., Any]] = {"1.0": OldConfig, "1.4": OldConfig, "3.0": UntiedConfig}
    model = CLASSES[version](makers.get(version, NewConfig)(**make_config(version))).eval()
    missing, unexpected = model.load_state_dict(
        dict(make_checkpoint(version) if state is None else state), strict=False
    )
    assert set(missing) <= {"head.weight"}, missing  # tied to the embedding
    assert not unexpected, unexpected
    return model


def make_slot(version: str, **options: Any) -> hotglm.ModuleSlot:
    """Return a slot that runs a version and stays with its code: what arrives is migrated to it."""
    return hotglm.ModuleSlot(make_model(version), migrations=MIGRATIONS, accept="major", **options)


def make_input() -> torch.Tensor:
    """Return word numbers that every version knows."""
    return torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 0]])
