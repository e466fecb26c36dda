"""One swap of a model of any kind, and the model that a cold start would have made, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

import hotglm
from hotglm.errors import HotglmError

__all__ = ["Model", "build", "make_class", "refused", "same_bits", "same_state", "swap"]


class Model(nn.Module):
    """One linear layer, and whatever a test does to it in `prepare`; the test may take another way through it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


Class = TypeVar("Class", bound=nn.Module)


class build(Generic[Class]):  # noqa: N801 - reads as the verb it is
    """A maker of models of one class, with the given arguments, whose weights are those of a seed."""

    def __init__(self, make: Callable[..., Class], *args: Any, **kwargs: Any) -> None:
        self._make, self._args, self._kwargs = make, args, kwargs

    def __call__(self, seed: int) -> Class:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self._make(*self._args, **self._kwargs)


def make_class(
    prepare: Callable[[Any], object], forward: Callable[[Any, torch.Tensor], Any] | None = None
) -> type[Model]:
    """Return a subclass of `Model` that runs `prepare(self)` at the end of its constructor."""

    class Prepared(Model):
        def __init__(self) -> None:
            super().__init__()
            prepare(self)

    if forward is not None:
        Prepared.forward = forward  # type: ignore[method-assign, assignment]
    return Prepared


def swap(make: Callable[[], nn.Module], **options: Any) -> tuple[hotglm.ModuleSlot, nn.Module]:
    """Hold one model in a slot and update it to another; return the slot and that other, started cold."""
    maker = build(make)
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0", **options)
    state = maker(2).state_dict()
    slot.update(state, version="1.0.1")
    cold = maker(3)
    cold.load_state_dict(state)
    return slot, cold


def refused(make: Callable[[], nn.Module], error: type[HotglmError], **options: Any) -> HotglmError:
    """Return the error that refuses an update of such a model, having seen that what was live still serves."""
    maker = build(make)
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0", **options)
    x = torch.arange(4.0).reshape(2, 2)
    before = slot(x)
    try:
        slot.update(maker(2).state_dict(), version="1.0.1")
    except error as refusal:
        assert same_bits(slot(x), before)
        assert (str(slot.version), slot.live.number, len(slot.history)) == ("1.0.0", 1, 1)
        return refusal
    raise AssertionError(f"expected {error.__name__}, got an update")


def same_bits(one: Any, other: Any) -> bool:
    """Tell whether two outputs are equal to the last bit, and in dtype and shape."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype is other.dtype and one.shape == other.shape
        return same and torch.equal(_bits(one), _bits(other))
    if isinstance(one, Mapping):
        return set(one) == set(other) and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same_bits(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two modules have the same state dicts and buffers, those that are not persistent included."""
    return same_bits(dict(one.state_dict()), dict(other.state_dict())) and same_bits(
        dict(one.named_buffers(remove_duplicate=False)), dict(other.named_buffers(remove_duplicate=False))
    )
