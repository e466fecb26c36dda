"""Where each tensor of a module lies in an arena: pure arithmetic on addresses.

Rules this module keeps:

- Tensors that overlap in the module overlap in the same way in the arena: ties stay ties, and a view of a weight
  stays a view of it (`w.t()` kept in an attribute is right after a swap without anybody's help).
- Tensors that do not overlap do not share a cache line.
- The order is the order given, so the same module gives the same layout every time.
- Where tensors are on several devices, each device has a region of the layout, and its own block of memory behind it.
- A region of what will be exchanged in place has room behind it, to put aside what comes out of the live tensors.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from hotglm.weights.device import Device

__all__ = ["Extent", "Layout", "Region", "Span", "find_no_room", "join_layouts", "plan_layout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The bytes of one tensor where it lies now: `address` and the `nbytes` from its first to its last element."""

    name: str
    address: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A run of overlapping extents, which moves to the arena as one piece."""

    address: int
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A range of a layout that is on one device; None stands for the processor.

    Attributes:
        device: whose memory it is.
        start: its first byte in the layout.
        nbytes: of all of it.
        room_nbytes: of these, those at its end that nothing is laid out in.
        pinned_for: the device for which the processor's memory is pinned.
    """

    device: Device | None
    start: int
    nbytes: int
    room_nbytes: int = 0
    pinned_for: Device | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Arena offsets by name, and the spans they came from.

    Attributes:
        offsets: byte offset in the arena of the first element of each named tensor.
        spans: by ascending source address.
        nbytes: size of the arena that holds it all.
        regions: one for each device, back to back from 0; empty where all is the processor's.
    """

    offsets: Mapping[str, int]
    spans: tuple[Span, ...]
    nbytes: int
    regions: tuple[Region, ...] = ()

    def find_offset(self, address: int, nbytes: int) -> int | None:
        """Return where the bytes at a source address went, or None if they are not inside one span."""
        at = bisect.bisect_right(self.spans, address, key=lambda span: span.address) - 1
        if at < 0 or nbytes == 0:
            return None
        span = self.spans[at]
        inside = address + nbytes <= span.address + span.nbytes
        return span.offset + address - span.address if inside else None


def plan_layout(extents: Iterable[Extent], *, alignment: int) -> Layout:
    """Lay `extents` out one after the other, keeping overlaps.

    Args:
        extents: in registration order; several may overlap; empty ones take no room.
        alignment: a power of two; a span of one tensor starts at a multiple of it, one of several that begin at
            different places keeps its address modulo this, so that each stays as aligned to its items as it was.

    Returns:
        The layout, `nbytes` being a multiple of `alignment`.
    """
    given = list(extents)
    clusters = _find_clusters([extent for extent in given if extent.nbytes])
    owner = {extent.name: cluster for cluster in clusters for extent in cluster}
    offsets: dict[str, int] = {}
    spans: dict[int, Span] = {}
    end = 0
    for extent in given:
        cluster = owner.get(extent.name)
        if cluster is None:
            offsets[extent.name] = 0
            continue
        span = spans.get(id(cluster))
        if span is None:
            start = cluster[0].address
            nbytes = max(member.address + member.nbytes for member in cluster) - start
            # Members that begin later keep their distance, so the span keeps its phase: what was aligned stays so.
            phase = start % alignment if any(member.address != start for member in cluster) else 0
            span = spans[id(cluster)] = Span(address=start, nbytes=nbytes, offset=end + phase)
            end += -(-(phase + nbytes) // alignment) * alignment
        offsets[extent.name] = span.offset + extent.address - span.address
    ordered = sorted(spans.values(), key=lambda span: span.address)
    return Layout(offsets=offsets, spans=tuple(ordered), nbytes=end)


def find_no_room(nbytes: int) -> int:
    """Return 0: two arenas that take turns need no room."""
    del nbytes
    return 0


def join_layouts(
    parts: Iterable[tuple[Device | None, Layout]],
    *,
    alignment: int,
    find_room: Callable[[int], int] = find_no_room,
) -> Layout:
    """Return one layout over several devices, a region for each; every region has room for at least `alignment` bytes.

    Args:
        parts: the layout of each device's tensors; no two have a name or an address in common.
        alignment: the widest that they were planned with.
        find_room: how much room a region of so many bytes on a device is to have behind it; a multiple of `alignment`.
    """
    offsets: dict[str, int] = {}
    spans: list[Span] = []
    regions: list[Region] = []
    end = 0
    for device, part in parts:
        nbytes = max(part.nbytes, alignment)  # so that an empty tensor, too, has an offset on its own device
        room = 0 if device is None else find_room(nbytes)
        nbytes += room
        regions.append(Region(device=device, start=end, nbytes=nbytes, room_nbytes=room))
        offsets |= {name: end + offset for name, offset in part.offsets.items()}
        spans += [replace(span, offset=end + span.offset) for span in part.spans]
        end += nbytes
    spans.sort(key=lambda span: span.address)
    return Layout(offsets=offsets, spans=tuple(spans), nbytes=end, regions=tuple(regions))


def _find_clusters(extents: list[Extent]) -> list[list[Extent]]:
    clusters: list[list[Extent]] = []
    reach = 0
    for extent in sorted(extents, key=lambda extent: (extent.address, -extent.nbytes)):
        stop = extent.address + extent.nbytes
        if clusters and extent.address < reach:
            clusters[-1].append(extent)
            reach = max(reach, stop)
        else:
            clusters.append([extent])
            reach = stop
    return clusters
