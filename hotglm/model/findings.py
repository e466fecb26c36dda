"""What speaks against a copy of a module, collected until all of it is known.

Rules this module keeps: everything found is named once, by the full name of the attribute that leads there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hotglm.errors import Problem, StaleStateError, UncopyableError, UnswappableError, shorten_repr
from hotglm.model.derived import Marks, find_refreshed_names, may_carry_over
from hotglm.model.references import CAPTURED, PACKAGE, SCRIPT

__all__ = ["Findings"]

_CODES = {SCRIPT: "CANNOT_SWAP_COMPILED", PACKAGE: "CANNOT_SWAP_COMPILED", CAPTURED: "CANNOT_SWAP_CAPTURED"}


class Findings:
    """The problems of one copy, and what it carries over."""

    def __init__(self, *, constants: Sequence[str]) -> None:
        """Begin with nothing; `constants` are the patterns of names that the user vouches for."""
        self._constants = constants
        self._carried: dict[str, None] = {}
        self._stale: dict[str, Problem] = {}
        self._uncopyable: dict[tuple[str, str], Problem] = {}

    @property
    def carried(self) -> tuple[str, ...]:
        """Names of unregistered or non-persistent state that keeps the value it had."""
        return tuple(self._carried)

    def judge(
        self, name: str, tensor: torch.Tensor, *, owner: nn.Module, marks: Marks | None, is_buffer: bool = False
    ) -> None:
        """Take note of `tensor`, which no file carries: it may keep its value, is recomputed, or is refused."""
        leaf = name.rpartition(".")[2]
        constants = self._constants
        if may_carry_over(name, tensor, owner=owner, constants=constants, marks=marks, is_buffer=is_buffer):
            if leaf not in find_refreshed_names(owner):
                self._carried[name] = None
            return
        what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        message = (
            f"Expected a declaration for {shorten_repr(name)} ({what}), which no file carries and which "
            f"{type(owner).__name__}, or a pass, may have computed from weights, got none"
        )
        self._stale.setdefault(message, Problem(code="STALE_STATE", message=message, tensor=name))

    def judge_array(self, name: str, array: Any, *, owner: nn.Module) -> None:
        """Judge a numpy array as a tensor of its shape and dtype is judged."""
        dtype = getattr(torch, array.dtype.name, torch.float64)  # those that torch does not have are no indices either
        like = torch.empty(array.shape, dtype=dtype, device="meta")
        self.judge(name, like, owner=owner, marks=None)

    def refuse(self, path: str, name: str, why: str) -> None:
        """Take note that the attribute `name` of the module at `path` cannot be carried over, and why."""
        where = f"{path}.{name}" if path else name
        message = f"Cannot carry over {shorten_repr(where)}: {why}"
        code = _CODES.get(why, "UNCOPYABLE")
        self._uncopyable.setdefault((where, why), Problem(code=code, message=message))

    def refuse_hooks(self, name: str, tensor: torch.Tensor) -> None:
        """Take note of hooks of the parameter or buffer `name` itself."""
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            self.refuse("", name, "it has hooks of its own (register_hook), which torch does not copy")

    def raise_if_any(self) -> None:
        """Raise all problems as one error.

        Raises:
            StaleStateError: state that is neither declared nor right for any weights; other problems come with it.
            UnswappableError: compiled code that has weights of its own; other problems come with it.
            UncopyableError: other problems only.
        """
        uncopyable = tuple(self._uncopyable.values())
        if self._stale:
            raise StaleStateError(
                "Expected all derived state to be declared, got some that would keep its old value after a swap.",
                problems=[*self._stale.values(), *uncopyable],
                remedy="recompute it in a method marked @hotglm.refresh(<attribute>), make it a persistent buffer, "
                "or vouch for it with ModuleSlot(..., constants=[<pattern>]).",
            )
        if any(problem.code != "UNCOPYABLE" for problem in uncopyable):
            raise UnswappableError(
                "Expected code that takes its weights from the module, got some that has its own.",
                problems=uncopyable,
                remedy="keep the module that the named part was made from instead; an AOTInductor package goes into a "
                "slot of its own, by hotglm.integrations.aoti; see hotglm.integrations.cuda_graphs for device graphs.",
            )
        if uncopyable:
            raise UncopyableError(
                "Expected a module that can be copied structurally.",
                problems=uncopyable,
                remedy="make the named attributes or hooks refer to `self` instead of to captured modules or tensors; "
                "keep what is too large to be searched, or shared with the rest of the service, out of the module.",
            )
