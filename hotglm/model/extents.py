"""Where the tensors of a module lie in memory, where they go in an arena, and what else lies in that memory.

Rules this module keeps: only metadata is read; the arithmetic on addresses is `weights/layout.py`'s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hotglm.model.inspection import StateEntry
from hotglm.model.references import is_a, is_array, is_fake
from hotglm.model.wrappers import find_memory, is_wrapper
from hotglm.weights import places
from hotglm.weights.arena import ALIGNMENT
from hotglm.weights.device import DEVICE_ALIGNMENT, Device
from hotglm.weights.layout import Extent, Layout, find_no_room, join_layouts, plan_layout

__all__ = ["Parts", "extent_nbytes", "lay_out", "overlaps_itself"]


def extent_nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes from the first to the last element of `tensor`, 0 if it has none."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of `tensor` share memory, as those of an expanded one do."""
    return extent_nbytes(tensor) < tensor.numel() * tensor.element_size()


def lay_out(
    entries: Iterable[StateEntry],
    *,
    like: Iterable[StateEntry] = (),
    find_room: Callable[[int], int] = find_no_room,
    is_on_host: bool = False,
) -> Layout:
    """Return where the tensors of a module go in an arena.

    Expanded tensors, whose elements share memory, get room for all of their elements. Addresses of devices and of the
    processor are one space, so nothing that is on one overlaps what is on another.

    Args:
        entries: the state of the module.
        like: the state of the module that it is to replace: each tensor goes where that has one of its name, and what
            it has none of where all of its tensors are, if that is one place; else a tensor stays where it is.
        find_room: see `join_layouts`.
        is_on_host: lay all of them out in one block of the processor's memory, wherever they are now.
    """
    homes = _Homes(like)
    groups: dict[str, tuple[Device | None, list[Extent]]] = {}
    for index, entry in enumerate(entries):
        expanded = overlaps_itself(entry.tensor)
        device = None if is_on_host else homes.find(entry)
        _, extents = groups.setdefault("" if device is None else device.name, (device, []))
        extents.append(
            Extent(
                name=entry.name,
                # An address of its own: negative, so that it meets no real one and no other.
                address=-(index + 1) << 48 if expanded else entry.tensor.data_ptr(),
                nbytes=entry.tensor.numel() * entry.tensor.element_size() if expanded else extent_nbytes(entry.tensor),
            )
        )
    if set(groups) <= {""}:
        return plan_layout(groups[""][1] if groups else (), alignment=ALIGNMENT)
    parts = [
        (device, plan_layout(extents, alignment=ALIGNMENT if device is None else DEVICE_ALIGNMENT))
        for device, extents in groups.values()
    ]
    return join_layouts(parts, alignment=DEVICE_ALIGNMENT, find_room=find_room)


class _Homes:
    """On which device each tensor of a module is to be."""

    def __init__(self, like: Iterable[StateEntry]) -> None:
        self._by_name = {entry.name: places.active.find(entry.tensor) for entry in like}
        self._by_address: dict[int, Device | None] = {}
        found = {id(device): device for device in self._by_name.values()}
        self._others = list(found.values()) if len(found) == 1 else []

    def find(self, entry: StateEntry) -> Device | None:
        address = entry.tensor.data_ptr()
        if address in self._by_address:  # one tensor under two names is on one device
            return self._by_address[address]
        if entry.name in self._by_name:
            device = self._by_name[entry.name]
        else:
            device = self._others[0] if self._others else places.active.find(entry.tensor)
        if address:
            self._by_address[address] = device
        return device


class Parts:
    """What belongs to a module: its submodules and registered tensors, what overlaps these, and weak references to all.

    Attributes:
        references: every weak reference or proxy to a part, with that part.
    """

    def __init__(self, root: nn.Module, entries: Iterable[StateEntry], layout: Layout) -> None:
        """Note the parts of `root`, whose state `entries` are; the caller keeps them alive."""
        self._layout = layout
        known = list(entries)
        tensors = {id(tensor): tensor for entry in known for tensor in (entry.tensor, entry.registered)}
        parts = [*root.modules(), *tensors.values()]
        self._ids = {id(part) for part in parts}
        self.references = [(reference, part) for part in parts for reference in weakref.getweakrefs(part)]
        self._reference_ids = {id(reference) for reference, _ in self.references}

    def has(self, value: object) -> bool:
        """Whether `value` is a part, lies in the memory of one, or refers to one weakly."""
        if id(value) in self._ids or id(value) in self._reference_ids:
            return True
        if is_a(value, torch.Tensor):
            return any(self.find_offset(tensor) is not None for tensor in find_memory(value))
        return is_array(value) and self._layout.find_offset(*_find_array_extent(value)) is not None

    def find_offset(self, tensor: torch.Tensor) -> int | None:
        """Return where the bytes of `tensor` go in the arena, or None if they are not those of a part."""
        if (
            is_fake(tensor)
            or is_wrapper(tensor)
            or tensor.layout is not torch.strided
            or tensor.is_meta
            or not places.active.supports(tensor)
        ):
            return None
        if overlaps_itself(tensor):
            return None
        return self._layout.find_offset(tensor.data_ptr(), extent_nbytes(tensor))


def _find_array_extent(array: Any) -> tuple[int, int]:
    """Return the lowest address of a numpy array's elements, and the bytes to the end of the highest."""
    if not array.size:
        return 0, 0
    reach = [(size - 1) * step for size, step in zip(array.shape, array.strides, strict=True)]
    below = sum(step for step in reach if step < 0)
    above = sum(step for step in reach if step > 0)
    return array.__array_interface__["data"][0] + below, above - below + array.itemsize
