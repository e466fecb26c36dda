"""Who still holds an old generation: passes with their stacks, sessions with their places, and everything else by kind.

Rules this module keeps:

- Looking costs the one who looks, never a pass: passes are found in the interpreter's frames, not in a list they keep.
- Nothing found here is kept; a report is text and numbers.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from hotglm.errors import shorten_repr
from hotglm.slot.generation import Generation, Retired

if TYPE_CHECKING:
    pass

__all__ = ["Holder", "find_passes", "find_references"]

_PASS_CODES = frozenset({nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One thing that keeps an old generation's memory in use.

    Attributes:
        kind: a pass that is running, a session that is open, or a module or tensor that somebody refers to.
        number: the generation it holds.
        description: one line that says what and where.
        stack: the Python stack of a pass, empty for others.
    """

    kind: Literal["pass", "session", "module", "tensor"]
    number: int
    description: str
    stack: str = ""

    def __str__(self) -> str:
        """Return the description, with the stack under it."""
        return self.description + (f"\n{self.stack}" if self.stack else "")


def find_passes(module: nn.Module, number: int) -> tuple[Holder, ...]:
    """Return one holder for each thread that is running code of `module` or a part of it now, with its stack."""
    parts = {id(part) for part in module.modules()}
    codes = _PASS_CODES | {code for cls in {type(part) for part in module.modules()} for code in _find_codes(cls)}
    found: list[Holder] = []
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    # One of the frames is this one: left in a local variable it would keep itself, and `module` with it, until the next
    # garbage collection. So they stay in the dictionary, which is emptied.
    tops = sys._current_frames()
    try:
        for ident in tops:
            if _runs(tops[ident], parts, codes):
                stack = "".join(traceback.format_stack(tops[ident], limit=12))
                name = names.get(ident, str(ident))
                found.append(Holder(kind="pass", number=number, description=f"pass in thread {name!r}", stack=stack))
    finally:
        tops.clear()
    return tuple(found)


def _find_codes(cls: type) -> Iterator[types.CodeType]:
    """Yield the code of the methods of a class; decorated ones by what they wrap."""
    for base in cls.__mro__[:-1]:
        if base is not nn.Module:
            for value in list(vars(base).values()):
                function = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
                if isinstance(function, types.FunctionType):
                    yield function.__code__


def _runs(frame: types.FrameType | None, parts: set[int], codes: AbstractSet[types.CodeType]) -> bool:
    # Only frames of the module's own code are looked into: reading `f_locals` makes Python 3.11 keep a copy of them.
    while frame is not None:
        code = frame.f_code
        if code in codes and code.co_argcount and id(frame.f_locals.get(code.co_varnames[0])) in parts:
            return True
        frame = frame.f_back
    return False


def find_references(retired: Retired) -> Iterator[Holder]:
    """Yield what refers to the module of a generation that is gone, or to tensors in its memory, by kind of referrer.

    Walks every object the garbage collector knows, with the GIL held: for diagnosis, not for a serving thread.
    """
    found = list(_find_module_holders(retired)) or list(_find_tensor_holders(retired))
    if not found and not retired.is_free:
        # Local variables are not looked up in frames: reading `f_locals` makes Python 3.11 keep a copy of them.
        description = "a local variable of a running function, an autograd graph, or an object that is not Python's"
        found = [Holder(kind="tensor", number=retired.number, description=description)]
    yield from found


def _find_module_holders(retired: Retired) -> Iterator[Holder]:
    roots = [retired.module] if retired.module is not None else _find_modules(retired)
    tree = [entry for root in roots for entry in root.named_modules()]
    own = {id(roots), id(tree), *map(id, tree), *(id(part._modules) for _, part in tree)}
    for entry in tree:
        label = shorten_repr(entry[0] or type(entry[1]).__name__)
        for keeper in _find_keepers(entry[1], own):
            yield Holder(kind="module", number=retired.number, description=f"module {label}, kept by {keeper}")


def _find_modules(retired: Retired) -> list[nn.Module]:
    """Return the modules that are left of a generation whose own module is gone."""
    tensors = {id(tensor) for tensor in _find_tensors(retired)}
    modules = [item for item in gc.get_objects() if issubclass(type(item), nn.Module) and "_parameters" in vars(item)]
    return [
        module
        for module in modules
        if any(id(part) in tensors for part in (*module._parameters.values(), *module._buffers.values()))
    ]


def _find_tensor_holders(retired: Retired) -> Iterator[Holder]:
    tensors = _find_tensors(retired)
    for tensor in tensors:
        for referrer in gc.get_referrers(tensor):
            if referrer is tensors or _is_internal(referrer):
                continue
            description = f"tensor of shape {list(tensor.shape)}, kept by {_describe(referrer)}"
            yield Holder(kind="tensor", number=retired.number, description=description)


def _find_tensors(retired: Retired) -> list[torch.Tensor]:
    if not retired.address:
        return retired.find_tensors()
    kinds = (torch.Tensor, nn.Parameter)
    return [
        item for item in gc.get_objects() if type(item) in kinds and _lies_in(item, retired.address, retired.nbytes)
    ]


def _lies_in(tensor: torch.Tensor, address: int, nbytes: int) -> bool:
    try:
        return address <= tensor.data_ptr() < address + nbytes
    except RuntimeError:  # a tensor without storage of its own: meta, sparse, functional
        return False


def _find_keepers(held: object, own: set[int]) -> Iterator[str]:
    """Yield what refers to `held` from outside the module's own tree; for a generation, what refers to that."""
    referrers = gc.get_referrers(held)
    own = {*own, id(referrers)}
    for referrer in referrers:
        if isinstance(referrer, Generation):
            yield from (f"its Generation, kept by {keeper}" for keeper in _find_keepers(referrer, own))
        elif id(referrer) not in own and not _is_internal(referrer):
            yield _describe(referrer)


def _is_internal(referrer: object) -> bool:
    if isinstance(referrer, types.FrameType):
        return referrer.f_code.co_filename == __file__ or referrer.f_code in _PASS_CODES
    if isinstance(referrer, types.GeneratorType):
        return referrer.gi_code.co_filename == __file__
    if isinstance(referrer, types.MethodType):
        return isinstance(referrer.__func__, types.FunctionType) and referrer.__func__.__code__ in _PASS_CODES
    return False


def _describe(referrer: object) -> str:
    if isinstance(referrer, types.FrameType):
        return f"a local variable of {referrer.f_code.co_qualname} ({referrer.f_code.co_filename}:{referrer.f_lineno})"
    if isinstance(referrer, types.MethodType):
        return f"the bound method {referrer.__func__.__qualname__}"
    if isinstance(referrer, dict):
        name = referrer.get("__name__")
        return (
            f"a global of module {name}" if name else f"a dict with keys {shorten_repr(sorted(map(str, referrer))[:5])}"
        )
    return f"a {type(referrer).__qualname__}"
