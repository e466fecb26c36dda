"""Proof that a copied module does not lead back into the one it was copied from.

Rules this module keeps:

- Everything that can be reached from the copy is looked at (`references.walk`), whatever way it was copied: functions,
  classes made inside functions, caches and objects that return themselves from `__deepcopy__` come along as they are.
- What is a part of the old module is refused by the attribute that leads there. Tensors and arrays that come along are
  judged like any other state that no file carries, except those that hooks keep, which may be statistics.
- What is too large to be searched is refused, never taken for harmless.

[Note: code]
Classes made inside functions, and hooks, are code: only what leads back is refused there. Constructors of such classes,
their weak references and their caches (`lru_cache` on a method has the module itself in its keys) are left out, because
none of them makes a pass use the old module. Of classes that stand in a file, the attributes themselves are looked at.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hotglm.model.extents import Parts
from hotglm.model.findings import Findings
from hotglm.model.references import (
    TooManyObjectsError,
    holds,
    is_a,
    is_array,
    is_fake,
    is_local_class,
    leads_nowhere,
    walk,
    why_uncopyable,
)
from hotglm.model.wrappers import is_wrapper

__all__ = ["INSIDE", "TOO_LARGE", "Place", "Verifier", "name_tensor"]

TOO_LARGE = "it is too large to be searched for what leads back into the module"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An attribute that leads somewhere.

    Attributes:
        path: of the module that has it.
        name: its own name.
        owner: the module that has it, in the module that is copied.
    """

    path: str
    name: str
    owner: nn.Module

    @property
    def full_name(self) -> str:
        """The full dotted name."""
        return f"{self.path}.{self.name}" if self.path else self.name


INSIDE = "<inside>"
"""Name of the attribute of a module that copies itself, while it does so."""


def name_tensor(place: Place, tensor: torch.Tensor) -> str:
    """Return the full name of the attribute of the place's module that is `tensor`, or else of one that leads to it."""
    attributes = list(vars(place.owner).items())
    found = next((name for name, value in attributes if value is tensor), place.name)
    if found == INSIDE:
        registered = ("_parameters", "_buffers", "_modules")
        rest = ((name, value) for name, value in attributes if name not in registered)
        found = next((name for name, value in rest if holds(value, tensor)), INSIDE)
    return replace(place, name=found).full_name


class Verifier:
    """Looks through one copy, attribute by attribute; what several of them lead to is looked at once."""

    def __init__(
        self,
        *,
        parts: Parts,
        findings: Findings,
        made: Iterable[object],
        foreign: Iterable[torch.Tensor],
        known: Mapping[int, object],
        judge: Callable[[torch.Tensor, Place], None],
    ) -> None:
        """Prepare for one copy.

        Args:
            parts: of the old module.
            findings: where problems go.
            made: what the copy consists of: its modules, tensors and arrays.
            foreign: tensors whose memory is not the copy's, although some of `made` may lie there.
            known: objects by id that have been refused already.
            judge: what to do with other tensors.
        """
        self._parts = parts
        self._findings = findings
        self._made = list(made)
        self._ids = {id(item) for item in self._made}
        tensors = (item for item in self._made if is_a(item, torch.Tensor))
        self._addresses = {_find_address(tensor) for tensor in tensors} - {0, *map(_find_address, foreign)}
        self._judge = judge
        self._seen, self._seen_code = dict(known), dict(known)
        self._classes: set[type] = set()

    def verify(self, value: object, place: Place, *, is_code: bool = False, why: str = "") -> None:
        """Look at everything that `value` leads to, found in the copy at `place`.

        Args:
            value: the copied attribute.
            place: where the original of it is.
            is_code: whether tensors in it that are no part of the module are none of our business (hooks).
            why: what kept it from being copied, if something did.
        """
        seen = self._seen_code if is_code else self._seen
        is_end = self._is_end_of_code if is_code else self._is_end
        try:
            for item, function in walk(value, seen=seen, is_end=is_end):
                if is_local_class(item):
                    self._verify_class(item, place)
                elif self._leads_back(item, is_code=is_code):
                    self._findings.refuse(place.path, place.name, why or _explain(item, function))
                elif not is_code and id(item) not in self._ids:
                    self._look_at(item, place)
        except TooManyObjectsError:
            self._findings.refuse(place.path, place.name, TOO_LARGE)

    def verify_classes(self, module: nn.Module, path: str) -> None:
        """Look at the classes of `module`, which every copy of it shares."""
        for cls in type(module).__mro__:
            if cls is not nn.Module and cls not in self._classes:
                self._verify_class(cls, Place(path=path, name=cls.__name__, owner=module))

    def _verify_class(self, cls: Any, place: Place) -> None:
        if cls in self._classes:
            return
        self._classes.add(cls)
        if is_local_class(cls):
            for item in [value for name, value in vars(cls).items() if name not in ("__init__", "__new__")]:
                self.verify(item, place, is_code=True, why=f"the class {cls.__qualname__} leads back into the module")
            for base in cls.__bases__:
                self._verify_class(base, place)
        elif any(self._parts.has(value) for value in vars(cls).values()):
            self._findings.refuse(place.path, place.name, "the class has a part of the module in an attribute")

    def _leads_back(self, item: object, *, is_code: bool) -> bool:
        if id(item) in self._ids:
            return False
        if is_a(item, weakref.ref):
            return not is_code and self._parts.has(weakref.ref.__call__(item))
        return self._parts.has(item)

    def _look_at(self, item: object, place: Place) -> None:
        if is_a(item, torch.Tensor):
            if not is_fake(item) and _find_address(item) not in self._addresses and not item.is_meta:
                self._judge(item, place)
        elif is_array(item):
            self._findings.judge_array(place.full_name, item, owner=place.owner)
        elif why := why_uncopyable(item, self._parts.has):
            self._findings.refuse(place.path, place.name, why)

    def _is_end(self, item: object) -> bool:
        if is_a(item, type) or is_a(item, torch.Tensor) or leads_nowhere(item):
            return True
        return is_a(item, nn.Module) and (id(item) in self._ids or self._parts.has(item))

    def _is_end_of_code(self, item: object) -> bool:
        return is_a(item, functools._lru_cache_wrapper) or self._is_end(item)


def _find_address(tensor: torch.Tensor) -> int:
    """Return where the storage of `tensor` begins, 0 for one without memory."""
    if tensor.layout is not torch.strided or tensor.is_meta or is_wrapper(tensor):
        return 0
    return tensor.untyped_storage().data_ptr()


def _explain(item: object, function: Callable[..., Any] | None) -> str:
    if function is not None:
        label = getattr(function, "__qualname__", repr(function))
        return f"the function {label} has captured a part of the module it is attached to"
    if is_array(item):
        return "it is a numpy array over a weight, and arrays do not follow into a copy"
    return f"a copy of it still leads to a {type(item).__name__} of the old module"
