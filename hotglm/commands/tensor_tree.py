"""The tensors of a release as a tree over the parts of their names, with layers that are alike as one.

Rules this module keeps: pure. Names come from files: nothing here prints them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hotglm.manifest_fields import ReleasedTensor

__all__ = ["Node", "grow_tree"]

_MAX_DEPTH = 12
"""A name of more parts has the rest of them in its last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A tensor, or what tensors have in common at the front of their names.

    Attributes:
        name: the part of the name; of several that are alike, the first and the last: `0..11`.
        nbytes: size of all tensors below, in bytes.
        num_tensors: how many there are.
        num_alike: how many neighbours of equal layout this stands for.
        tensor: the tensor that has just this name, or the first of those that are alike.
        children: what is below; of those that are alike, below the first.
    """

    name: str
    nbytes: int
    num_tensors: int
    num_alike: int = 1
    tensor: ReleasedTensor | None = None
    children: tuple[Node, ...] = ()


@dataclass(slots=True)
class _Branch:
    tensor: ReleasedTensor | None = None
    branches: dict[str, _Branch] = field(default_factory=dict)


def grow_tree(tensors: Mapping[str, ReleasedTensor]) -> Node:
    """Return the tree; its root has no name.

    >>> one = ReleasedTensor(file="f", dtype="float32", shape=(2,), digest="")
    >>> tree = grow_tree({"block.0.w": one, "block.1.w": one, "head": one})
    >>> [(node.name, node.num_alike, node.nbytes) for node in tree.children]
    [('block.0..1.w', 2, 16), ('head', 1, 8)]
    """
    root = _Branch()
    for name, tensor in tensors.items():
        branch = root
        for part in name.split(".", _MAX_DEPTH - 1):
            branch = branch.branches.setdefault(part, _Branch())
        branch.tensor = tensor
    return _make_node("", root)


def _make_node(name: str, branch: _Branch) -> Node:
    children = _join_alike([_make_node(part, branch.branches[part]) for part in sorted(branch.branches, key=_order)])
    if name and branch.tensor is None and len(children) == 1:
        return replace(children[0], name=f"{name}.{children[0].name}")
    own = 0 if branch.tensor is None else branch.tensor.nbytes
    return Node(
        name=name,
        nbytes=own + sum(child.nbytes for child in children),
        num_tensors=(branch.tensor is not None) + sum(child.num_tensors for child in children),
        tensor=branch.tensor,
        children=tuple(children),
    )


def _order(part: str) -> tuple[int, int, str]:
    is_number = _is_number(part)
    return (0 if is_number else 1, int(part) if is_number else 0, part)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10


def _join_alike(nodes: Sequence[Node]) -> list[Node]:
    joined: list[tuple[Node, Node, tuple[object, ...]]] = []  # what it is now, its first one, and the layout of that
    for node in nodes:
        layout = _layout(node)
        head = node.name.partition(".")[0]
        if joined and _is_number(head) and _is_number(joined[-1][1].name.partition(".")[0]) and joined[-1][2] == layout:
            whole, first, _ = joined[-1]
            start, _, rest = first.name.partition(".")
            both = f"{start}..{head}{'.' if rest else ''}{rest}"
            whole = replace(
                whole,
                name=both,
                nbytes=whole.nbytes + node.nbytes,
                num_tensors=whole.num_tensors + node.num_tensors,
                num_alike=whole.num_alike + 1,
            )
            joined[-1] = (whole, first, layout)
        else:
            joined.append((node, node, layout))
    return [whole for whole, _, _ in joined]


def _layout(node: Node) -> tuple[object, ...]:
    own = None if node.tensor is None else (node.tensor.dtype, node.tensor.shape)
    rest = node.name.partition(".")[2] if _is_number(node.name.partition(".")[0]) else node.name
    return (rest, own, node.num_alike, tuple(_layout(child) for child in node.children))
