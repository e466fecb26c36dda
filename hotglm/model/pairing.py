"""Which tensors of a module are exchanged with which of its twin, when the module stays and its weights change.

Rules this module keeps:

- Each byte is in one pair at most: of tensors that share memory the one that covers the others stands for all, so ties
  are written once and views follow.
- Derived state is exchanged like weights: it was recomputed in the twin, and the module must come to hold it.
- What an exchange of bytes would leave stale is refused by name, all at once: a number, or a tensor of another shape,
  that a refresh has put in an attribute; a tensor inside an object that is not a plain container.
- Nothing is written here.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hotglm.errors import Problem, UnswappableError, shorten_repr
from hotglm.model.extents import extent_nbytes, overlaps_itself
from hotglm.model.inspection import StateEntry, find_state
from hotglm.weights.exchange import Pair, is_dense

__all__ = ["Addresses", "find_moved", "pair_states", "read_addresses"]

Addresses = Mapping[str, tuple[int, int, int]]
"""For each name of a tensor its address, and the address and size in bytes of its storage."""

_SIMPLE = (int, float, complex, bool, str, bytes, type(None))
_OWN_NAMES = frozenset(vars(nn.Module()))


def read_addresses(module: nn.Module) -> Addresses:
    """Return where every parameter and buffer of `module` lies."""
    found = {}
    for entry in find_state(module):
        storage = entry.tensor.untyped_storage()
        found[entry.name] = (entry.tensor.data_ptr(), storage.data_ptr(), storage.nbytes())
    return found


def find_moved(before: Addresses, after: Addresses) -> tuple[str, ...]:
    """Return the names that are not where they were, in one of the two only, or in a storage of another size."""
    return tuple(name for name in {**before, **after} if before.get(name) != after.get(name))


def pair_states(
    live: nn.Module, twin: nn.Module, *, was_refreshed: bool, loose: Iterable[torch.Tensor] = ()
) -> tuple[Pair, ...]:
    """Return what is to be exchanged so that `live` becomes what `twin` is.

    Args:
        live: the module whose tensors must not move.
        twin: its structural copy, loaded, and refreshed if `was_refreshed`.
        was_refreshed: whether any code has recomputed derived state in the twin; else only what files carry differs.
        loose: tensors of `live` that are neither parameters nor buffers nor views of them.

    Raises:
        UnswappableError: something would keep its old value, or cannot be written where it is; all of it is named.
    """
    pairing = _Pairing(was_refreshed=was_refreshed)
    pairing.pair_registered(list(find_state(live)), {entry.name: entry.tensor for entry in find_state(twin)})
    if was_refreshed:
        pairing.pair_attributes(live, twin)
        pairing.verify_reached(loose)
    if pairing.problems:
        raise UnswappableError(
            "Expected a version that differs in the bytes of its tensors alone, got more.",
            problems=pairing.problems,
            remedy="keep derived state in buffers and write them in place, or use swap=hotglm.Flip().",
        )
    return tuple(pairing.pairs)


@dataclass(slots=True, kw_only=True)
class _Pairing:
    """Pairs and problems found so far, and which memory they cover."""

    was_refreshed: bool
    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _stops: list[int] = field(default_factory=list)
    _reached: set[int] = field(default_factory=set)

    def pair_registered(self, entries: list[StateEntry], twins: Mapping[str, torch.Tensor]) -> None:
        """Pair parameters and buffers; one pair for each run of memory."""
        for cluster in _find_clusters(entries):
            if not self.was_refreshed and not any(entry.persistent for entry in cluster):
                continue  # it has been carried over from where it would be written to
            chosen = _choose_cover(cluster)
            derived = not any(entry.persistent for entry in cluster)
            self._pair(chosen.name, chosen.tensor, twins.get(chosen.name), is_derived=derived)
            if not is_dense(chosen.tensor) and len({_identify(entry.tensor) for entry in cluster}) > 1:
                self._refuse(chosen.name, "Expected one that covers what it overlaps without gaps")
            self._starts.append(chosen.tensor.data_ptr())
            self._stops.append(max(e.tensor.data_ptr() + extent_nbytes(e.tensor) for e in cluster))

    def pair_attributes(self, live: nn.Module, twin: nn.Module) -> None:
        """Pair the tensors in plain attributes, and compare the plain values."""
        twins = dict(twin.named_modules())
        for path, module in live.named_modules():
            own, others = dict(vars(module)), dict(vars(twins[path]))
            new = {name for name, value in others.items() if name not in own and isinstance(value, _SIMPLE)}
            for name in (*own, *sorted(new)):
                if name not in _OWN_NAMES:
                    full = f"{path}.{name}" if path else name
                    self._compare(full, own[name] if name in own else _find_default(module, name), others.get(name))

    def verify_reached(self, loose: Iterable[torch.Tensor]) -> None:
        """Note the tensors that a refresh may have recomputed where nobody looked."""
        for tensor in loose:
            if id(tensor) not in self._reached and tensor.numel() and not self._covers(tensor):
                what = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
                self._refuse(what, "Expected derived tensors in attributes or plain containers, got one in an object")

    def _compare(self, name: str, value: object, other: object) -> None:
        if isinstance(value, torch.Tensor):
            self._reached.add(id(value))
            if value.numel() and not self._covers(value):
                self._pair(name, value, other if isinstance(other, torch.Tensor) else None, is_derived=True)
        elif isinstance(value, _SIMPLE):
            if type(value) is not type(other) or repr(value) != repr(other):  # NaN is itself
                message = f"Expected the value to stay {shorten_repr(value)}, got {shorten_repr(other)} for the new"
                self._refuse(name, message)
        elif isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
            self._compare_items(name, dict(enumerate(value)), dict(enumerate(other)))
        elif isinstance(value, dict) and isinstance(other, dict):
            self._compare_items(name, value, other)

    def _compare_items(self, name: str, values: Mapping[object, object], others: Mapping[object, object]) -> None:
        if values.keys() != others.keys():
            self._refuse(name, f"Expected {len(values)} items as before, got {len(others)} or others")
            return
        for key, value in values.items():
            self._compare(f"{name}[{shorten_repr(key)}]", value, others[key])

    def _pair(self, name: str, live: torch.Tensor, image: torch.Tensor | None, *, is_derived: bool) -> None:
        self._reached.add(id(live))
        if image is None or image.shape != live.shape or image.dtype is not live.dtype:
            found = "none" if image is None else f"{list(image.shape)} of {image.dtype}"
            self._refuse(name, f"Expected {list(live.shape)} of {live.dtype}, got {found}")
        elif overlaps_itself(live):
            self._refuse(name, "Expected memory for each element, got an expanded tensor, which cannot be written")
        elif live.is_conj() or live.is_neg() or (live.is_inference() and not is_dense(live)):
            self._refuse(name, "Expected a tensor that is its memory, got a conjugated, negated or strided view")
        elif not _lies_alike(live, image):
            self._refuse(name, f"Expected strides {list(live.stride())}, got {list(image.stride())}")
        else:
            self.pairs.append(Pair(name=name, live=live, image=image, is_derived=is_derived))

    def _covers(self, tensor: torch.Tensor) -> bool:
        order = sorted(zip(self._starts, self._stops, strict=True))
        at = bisect.bisect_right(order, tensor.data_ptr(), key=lambda span: span[0]) - 1
        return at >= 0 and tensor.data_ptr() < order[at][1]

    def _refuse(self, name: str, message: str) -> None:
        self.problems.append(Problem(code="CANNOT_SWAP", message=message, tensor=name))


def _find_default(module: nn.Module, name: str) -> object:
    """Return what passes see of an attribute that a module does not have: what its class has, or nothing."""
    default = getattr(type(module), name, None)
    return default if isinstance(default, _SIMPLE) else None


def _identify(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _find_clusters(entries: list[StateEntry]) -> Iterator[list[StateEntry]]:
    """Yield runs of entries whose memory overlaps; those without memory are left out."""
    reach, cluster = 0, list[StateEntry]()
    filled = [entry for entry in entries if entry.tensor.numel()]
    for entry in sorted(filled, key=lambda e: (e.tensor.data_ptr(), -extent_nbytes(e.tensor))):
        if cluster and entry.tensor.data_ptr() >= reach:
            yield cluster
            cluster, reach = [], 0
        cluster.append(entry)
        reach = max(reach, entry.tensor.data_ptr() + extent_nbytes(entry.tensor))
    if cluster:
        yield cluster


def _choose_cover(cluster: list[StateEntry]) -> StateEntry:
    """Return the entry that reaches furthest; of those the one without gaps."""
    return max(cluster, key=lambda entry: (extent_nbytes(entry.tensor), is_dense(entry.tensor)))


def _lies_alike(live: torch.Tensor, image: torch.Tensor) -> bool:
    """Whether elements follow each other in memory in the same order; the step of a single one means nothing."""
    if live.is_contiguous() and image.is_contiguous():
        return True
    steps = zip(live.shape, live.stride(), image.stride(), strict=True)
    return all(mine == other for size, mine, other in steps if size > 1)
