"""Constructing models whose weights come afterwards: no values, no random numbers, no autograd mode of the caller's.

Rules this module keeps: what is skipped is the filling of parameters alone, and in this thread alone; buffers, which no
file may carry, get the values that their constructor gives them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["unfilled"]


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Construct models in the body without touching memory for their parameters."""
    with torch.inference_mode(mode=False), torch.enable_grad(), _SkipInitialisers():
        yield


_FILLS = frozenset(
    {"normal_", "uniform_", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "random_"}
    | {"kaiming_normal_", "kaiming_uniform_"}  # torch hides what these call from the mode
)
_DRAWS = frozenset({"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"})


class _SkipInitialisers(TorchFunctionMode):
    """Leaves parameters as they were allocated and draws the rest from its own generator, in this thread only.

    The service's generator must not move because a model is loaded (its dropout would change), and weights that are
    about to be filled from a source need no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        filled = args[0] if args else options.get("tensor")
        if name in _FILLS and isinstance(filled, nn.Parameter):
            return filled
        if args and name.removesuffix("_like") in _DRAWS - {name}:  # not every torch gives these a generator
            options = {"dtype": args[0].dtype, "device": args[0].device, **options}
            func, args = getattr(torch, name.removesuffix("_like")), (*args[1:], args[0].shape)
        elif name not in _FILLS | _DRAWS:
            return func(*args, **options)
        if options.get("generator") is None:
            options["generator"] = self._generator
        return func(*args, **options)
