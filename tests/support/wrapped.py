"""Tensor subclasses that wrap others, like those of quantisation libraries, and models that have them."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

WIDTH = 8
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)

aten = torch.ops.aten


class Wrapper(torch.Tensor):
    """What is common to wrappers: computes on the plain value, keeps its kind through `detach` and `clone`."""

    INNER: ClassVar[tuple[str, ...]]
    block: int

    @staticmethod
    def __new__(cls, *parts: torch.Tensor, block: int) -> Self:
        """Wrap `parts`, of which the first has the outer shape."""
        make: Any = torch.Tensor._make_wrapper_subclass
        found: Self = make(cls, parts[0].shape, dtype=torch.float32)
        for name, part in zip(cls.INNER, parts, strict=True):
            setattr(found, name, part)
        found.block = block
        return found

    def __init__(self, *parts: torch.Tensor, block: int) -> None:
        """Everything is in `__new__`."""

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        """Show no values: the compiler prints what has none."""
        return f"{type(self).__name__}(block={self.block})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Name the inner tensors, and what else there is."""
        return list(self.INNER), {"block": self.block}

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, size: Any, stride: Any) -> Self:
        """Make it again."""
        return cls(*(parts[name] for name in cls.INNER), **context)

    def to_plain(self) -> torch.Tensor:
        """Return the value."""
        raise NotImplementedError

    def rewrap(self, function: Any) -> Self:
        """Return the same over other tensors."""
        return type(self)(*(function(getattr(self, name)) for name in self.INNER), block=self.block)

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute on plain values, but for what keeps the kind."""
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return args[0].rewrap(func)
        plain = pytree.tree_map_only(Wrapper, lambda one: one.to_plain(), (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Blocked(Wrapper):
    """Integers with a scale for each block of a row."""

    INNER: ClassVar[tuple[str, ...]] = ("qdata", "scale")
    qdata: torch.Tensor
    scale: torch.Tensor

    def to_plain(self) -> torch.Tensor:
        """Return the value."""
        blocks = self.qdata.float().reshape(len(self.qdata), -1, self.block) * self.scale.float().unsqueeze(2)
        return blocks.reshape(self.qdata.shape)


class Outer(Wrapper):
    """A wrapper around a wrapper, and a shift."""

    INNER: ClassVar[tuple[str, ...]] = ("core", "shift")
    core: torch.Tensor
    shift: torch.Tensor

    def to_plain(self) -> torch.Tensor:
        """Return the value."""
        core: Any = self.core
        plain: torch.Tensor = core.to_plain() + self.shift
        return plain


class Copying(Blocked):
    """One that is over copies when it is made again."""

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, size: Any, stride: Any) -> Self:
        """Make it of copies."""
        return cls(parts["qdata"].clone(), parts["scale"].clone(), **context)


def quantise(weight: torch.Tensor, *, block: int = 4, kind: type[Wrapper] = Blocked) -> Wrapper:
    """Return `weight` in integers."""
    weight = weight.detach()
    scale = weight.reshape(len(weight), -1, block).abs().amax(2) / 127
    data = (weight / scale.repeat_interleave(block, 1)).round().to(torch.int8)
    if kind is Outer:
        return Outer(Blocked(data, scale, block=block), weight.mean(1, keepdim=True), block=block)
    return kind(data, scale, block=block)


def make_plain(seed: int) -> Any:
    """Return the model before it is quantised; its weights are those of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).eval()


def make(seed: int, *, block: int = 4, kind: type[Wrapper] = Blocked, is_tied: bool = False) -> Any:
    """Return a quantised model."""
    model = make_plain(seed)
    quantise_layers(model, block=block, kind=kind)
    if is_tied:
        model[2].weight = model[0].weight
    return model


def quantise_layers(model: Any, *, block: int = 4, kind: type[Wrapper] = Blocked) -> None:
    """Put integers in the place of the weights of a model."""
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(quantise(layer.weight, block=block, kind=kind), requires_grad=False)
        layer.bias.requires_grad_(False)
