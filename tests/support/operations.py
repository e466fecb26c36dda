"""Hypothesis strategies that draw states, and operations that fit them and can be undone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from hypothesis import strategies as st

import hotglm
from hotglm.migration.expression import Expression, Source, TensorSpec
from hotglm.migration.initialisers import Initialiser
from hotglm.migration.operation import Operation

__all__ = ["DTYPES", "draw_operation", "make_sources", "make_tensors", "specs"]

DTYPES = ("float32", "float16", "bfloat16", "int64", "uint8", "bool")
_LAYERS = ("0", "1")
_INITIALISERS: tuple[Initialiser, ...] = (hotglm.Zeros(), hotglm.Ones(), hotglm.Constant(3), hotglm.Normal(0.5, 7))
_PARTS = ("a", "b", "c.d")
_WIDER = {
    "bfloat16": "float32",
    "float16": "float64",
    "float32": "float64",
    "uint8": "int16",
    "bool": "uint8",
}


@st.composite
def specs(draw: st.DrawFn) -> dict[str, TensorSpec]:
    """Draw a state: two layers with tensors of equal specs, and one tensor beside them."""
    one = st.builds(
        lambda dtype, shape: TensorSpec(dtype=dtype, shape=tuple(shape)),
        st.sampled_from(DTYPES),
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=3),
    )
    parts = draw(st.dictionaries(st.sampled_from(_PARTS), one, min_size=1))
    state = {f"layers.{layer}.{part}": spec for layer in _LAYERS for part, spec in parts.items()}
    return {**state, "head": draw(one)}


def make_sources(state: Mapping[str, TensorSpec]) -> dict[str, Expression]:
    """Return each tensor as itself."""
    return {name: Source(name, spec) for name, spec in state.items()}


def make_tensors(state: Mapping[str, TensorSpec], seed: int) -> dict[str, torch.Tensor]:
    """Return random tensors; floating-point ones are normal numbers, a few of them zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in state.items():
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            drawn = torch.randn(spec.shape, generator=generator)
            tensors[name] = torch.where(drawn.abs() < 0.2, torch.copysign(torch.zeros(()), drawn), drawn).to(dtype)
        else:
            tensors[name] = torch.randint(0, 2 if dtype == torch.bool else 200, spec.shape, generator=generator).to(
                dtype
            )
    return tensors


def draw_operation(draw: st.DrawFn, state: Mapping[str, TensorSpec]) -> Operation:  # noqa: C901, PLR0911, PLR0912
    """Draw an operation that fits `state` and has an inverse, on all layers where they are alike; one case a kind."""
    name = draw(st.sampled_from(sorted(state)))
    target = _Target(name, state)
    spec = state[name]
    rank = len(spec.shape)
    kinds = ["rename", "reshape", "untie", "add"]
    if rank:
        kinds += ["split", "pad", "permute", "transpose", *(["unstack"] if all(spec.shape) else [])]
    if spec.dtype in _WIDER:
        kinds.append("cast")
    if spec.dtype.startswith(("float", "bfloat")):
        kinds.append("scale")
    if partners := target.find_partners():
        kinds += ["stack", "concatenate"] if rank else ["stack"]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(-rank, rank - 1)) if rank else 0
    match kind:
        case "rename":
            return hotglm.Rename(target.pattern, target.fresh(0))
        case "reshape":
            return hotglm.Reshape(
                target.pattern, draw(st.sampled_from([(-1,), (1, -1, 1), (math.prod(spec.shape),)])), spec.shape
            )
        case "untie":
            return hotglm.Untie((target.pattern, target.fresh(0), target.fresh(1)))
        case "add":
            each = target.pattern if target.is_general else None
            return hotglm.Add(target.fresh(0), (2, 3), "float32", draw(st.sampled_from(_INITIALISERS)), each=each)
        case "split":
            size = spec.shape[dim]
            cut = draw(st.integers(1, size - 1)) if size > 1 else 1
            sizes = (cut, size - cut) if size > 1 else (1,)
            return hotglm.Split(target.pattern, tuple(map(target.fresh, range(len(sizes)))), dim, sizes)
        case "unstack":
            return hotglm.Unstack(target.pattern, tuple(map(target.fresh, range(spec.shape[dim]))), dim)
        case "pad":
            value = 1 if spec.dtype in ("bool", "uint8", "int64", "int16") else draw(st.sampled_from([0.0, -1.5]))
            return hotglm.Pad(target.pattern, dim, draw(st.integers(0, 2)), draw(st.integers(0, 2)), value)
        case "permute":
            return hotglm.Permute(target.pattern, draw(st.permutations(range(rank))))
        case "transpose":
            return hotglm.Transpose(target.pattern, dim, draw(st.integers(-rank, rank - 1)))
        case "cast":
            return hotglm.Cast(target.pattern, _WIDER[spec.dtype], was=spec.dtype)
        case "scale":
            return hotglm.Scale(target.pattern, draw(st.sampled_from([0.5, 2.0, -4.0])))
        case "stack":
            names = (target.pattern, target.place(draw(st.sampled_from(partners))))
            return hotglm.Stack(names, target.fresh(0), draw(st.integers(-rank - 1, rank)))
        case _:
            names = (target.pattern, target.place(draw(st.sampled_from(partners))))
            return hotglm.Concatenate(names, target.fresh(0), dim)


class _Target:
    """One tensor, or the same one in all layers: how patterns and templates name it and those beside it."""

    def __init__(self, name: str, state: Mapping[str, TensorSpec]) -> None:
        self.name, self.state = name, state
        found = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        self.part = found[2] if found else ""
        self.is_general = bool(found) and self._is_alike(self.part)
        self.pattern = rf"layers\.(\d+)\.{re.escape(self.part)}" if self.is_general else name

    def _is_alike(self, part: str) -> bool:
        return {self.state.get(f"layers.{layer}.{part}") for layer in _LAYERS} == {self.state[self.name]}

    def place(self, part: str) -> str:
        """Return the template of a tensor beside it, or its name."""
        return rf"layers.\1.{part}" if self.is_general else part

    def fresh(self, number: int) -> str:
        """Return the template of a name that is free in all layers."""
        taken = {name.rpartition(".")[2] for name in self.state}
        return self.place([free for k in range(9999) if (free := f"n{k}") not in taken][number])

    def find_partners(self) -> list[str]:
        """Return what may be put beside it: other tensors of the same spec."""
        if not self.is_general:
            return sorted(n for n, s in self.state.items() if n != self.name and s == self.state[self.name])
        parts = {name.split(".", 2)[2] for name in self.state if name.startswith("layers.")}
        return sorted(part for part in parts if part != self.part and self._is_alike(part))
