"""One release as one HTML page: what it says, where its bytes are, and what a delta changes.

Rules this module keeps: those of `hotglm.commands.page`.
"""

from __future__ import annotations

from collections.abc import Iterator

from hotglm.commands.delta_changes import Changes, TensorChange
from hotglm.commands.page import make_page, show_bar, show_text, show_tiles, size_of
from hotglm.commands.release_text import show_time
from hotglm.commands.tensor_tree import Node, grow_tree
from hotglm.manifest_fields import Manifest
from hotglm.release.directory import Release

__all__ = ["make_show_page"]

_MAX_ROWS = 1000
_NUM_COLORS = 8
_OPEN_DEPTH = 2


def make_show_page(release: Release, changes: Changes | None, *, is_verified: bool) -> str:
    """Return the page of an open release.

    Args:
        release: the release.
        changes: what it changes, where it is a delta.
        is_verified: whether every byte was read and compared.
    """
    manifest = release.manifest
    tiles: list[tuple[object, object]] = [
        (size_of(manifest.total_nbytes), "carried" if changes is not None else "in all files"),
        (len(manifest.tensors), "tensor" if len(manifest.tensors) == 1 else "tensors"),
        (len(manifest.files), "file" if len(manifest.files) == 1 else "files"),
        ("verified" if is_verified else "not read", "every byte is the one that was promised" if is_verified else
         "names, sizes and headers fit; give --verify to read every byte"),
    ]  # fmt: skip
    body = [show_tiles(tiles), *_show_changes(changes, manifest), *_show_tree(manifest), _show_files(manifest)]
    return make_page(
        brand=f"hotglm release, {'a delta' if changes is not None else manifest.kind}",
        headline=f"{manifest.name} {manifest.version}",
        sub=release.path,
        body="\n".join([*body[:1], _show_facts(release), *body[1:]]),
    )


def _show_facts(release: Release) -> str:
    manifest, made_in = release.manifest, release.manifest.created_in
    facts: list[tuple[str, object]] = [
        ("number", manifest.sequence),
        ("digest", release.digest),
        ("created", show_time(manifest.created_at)),
        ("expires", "never" if manifest.expires_at is None else show_time(manifest.expires_at)),
        ("made with", "unknown" if made_in is None else
         ", ".join([f"python {made_in.python}", *(f"{name} {one}" for name, one in sorted(made_in.packages.items()))])),
    ]  # fmt: skip
    if manifest.requires:
        facts.append(("requires", ", ".join(manifest.requires)))
    if manifest.capabilities:
        facts.append(("can", ", ".join(sorted(manifest.capabilities))))
    if manifest.code is not None:
        facts.append(("code", f"{manifest.code.entry} in {len(manifest.code.files)} files, which is not loaded"))
    rows = "".join(f"<tr><th>{name}</th><td class='name'>{show_text(fact)}</td></tr>" for name, fact in facts)
    return f"<section><div class='card'><table class='facts'><tbody>{rows}</tbody></table></div></section>"


def _show_changes(changes: Changes | None, manifest: Manifest) -> Iterator[str]:
    if changes is None or manifest.delta is None:
        return
    base = manifest.delta.base
    share = changes.carried_nbytes / changes.nbytes if changes.nbytes else 0
    kinds = "".join(
        f"<span class='chip {kind}'>{num} {kind}</span>" for kind, num in sorted(changes.count_kinds().items())
    )
    unknown = "" if changes.has_base else " The base is not here: what it had more is not known."
    yield f"<section><h2>Changed against {show_text(base.version)} <span class='soft'>#{base.sequence}</span></h2>"
    yield f"<p>{kinds}<span class='chip kept'>{changes.num_kept} kept</span><span class='soft'>{unknown}</span></p>"
    yield (
        f"<div class='card'><div class='pair'><span>carried</span>"
        f"{show_bar(changes.carried_nbytes, max(changes.nbytes, changes.carried_nbytes), 'delta')}"
        f"<b>{size_of(changes.carried_nbytes)} ({share:.1%})</b><span>tensors</span>"
        f"{show_bar(changes.nbytes, max(changes.nbytes, changes.carried_nbytes))}<b>{size_of(changes.nbytes)}</b></div>"
    )
    if changes.tensors:
        yield "<table><thead><tr><th>change</th><th>tensor</th><th>codec</th><th class='number'>size</th>"
        yield "<th class='number'>carried</th><th></th></tr></thead><tbody>"
        most = max(one.carried_nbytes for one in changes.tensors)
        yield from (_show_change(one, most) for one in changes.tensors[:_MAX_ROWS])
        yield "</tbody></table>"
    yield "</div>"
    if len(changes.tensors) > _MAX_ROWS:
        yield f"<p class='legend'>and {len(changes.tensors) - _MAX_ROWS} more</p>"
    yield "</section>"


def _show_change(one: TensorChange, most: int) -> str:
    carried = size_of(one.carried_nbytes) if one.kind != "removed" else ""
    return (
        f"<tr><td><span class='chip {one.kind}'>{one.kind}</span></td>"
        f"<td class='name'><code>{show_text(one.name)}</code></td>"
        f"<td class='soft'>{show_text(one.codec or '')}</td><td class='number'>{size_of(one.nbytes)}</td>"
        f"<td class='number'>{carried}</td><td class='wide'>{show_bar(one.carried_nbytes, most, 'delta')}</td></tr>"
    )


def _show_tree(manifest: Manifest) -> Iterator[str]:
    if not manifest.tensors:
        return
    root = grow_tree(manifest.tensors)
    largest = sorted(root.children, key=lambda node: -node.nbytes)
    shown = largest if len(largest) <= _NUM_COLORS else largest[: _NUM_COLORS - 1]
    parts = [(show_text(node.name), node.nbytes) for node in shown]
    if len(shown) < len(largest):
        parts.append((f"{len(largest) - len(shown)} others", root.nbytes - sum(node.nbytes for node in shown)))
    yield "<section><h2>Where the bytes are</h2><div class='parts'>"
    yield from (f'<i class="s{at}" style="flex:{nbytes}"></i>' for at, (_, nbytes) in enumerate(parts) if nbytes)
    yield "</div><ul class='key'>"
    for at, (name, nbytes) in enumerate(parts):
        yield f'<li><i class="s{at}"></i><code>{name}</code> {size_of(nbytes)}</li>'
    yield "</ul></section><section><h2>Tensors</h2><div class='card'><div class='tree'>"
    left = [_MAX_ROWS]
    for node in root.children:
        yield from _show_node(node, root.nbytes, depth=0, left=left)
    yield "</div></div>"
    if left[0] < 0:
        yield f"<p class='legend'>and {-left[0]} lines more, which `hotglm show --all` lists</p>"
    yield "</section>"


def _show_node(node: Node, whole: int, *, depth: int, left: list[int]) -> Iterator[str]:
    left[0] -= 1
    is_shown = left[0] >= 0
    if is_shown:
        one = node.tensor
        spec = "" if one is None else f"{one.dtype} {list(one.shape)}"
        alike = f" <span class='soft'>{node.num_alike} alike</span>" if node.num_alike > 1 else ""
        line = (
            f"<span><code>{show_text(node.name)}</code>{alike}</span>"
            f"<span class='soft'>{show_text(spec, limit=40)}</span>"
            f"<span class='number'>{size_of(node.nbytes)}</span>{show_bar(node.nbytes, whole)}"
        )
        if not node.children:
            yield f"<div class='leaf'>{line}</div>"
            return
        yield f"<details{' open' if depth < _OPEN_DEPTH else ''}><summary>{line}</summary>"
    for child in node.children:
        yield from _show_node(child, whole, depth=depth + 1, left=left)
    if is_shown:
        yield "</details>"


def _show_files(manifest: Manifest) -> str:
    largest = max((entry.size for entry in manifest.files.values()), default=0)
    rows = "".join(
        f"<tr><td class='name'><code>{show_text(name)}</code></td><td class='name soft'><code>{show_text(entry.digest)}"
        f"</code></td><td class='number'>{size_of(entry.size)}</td>"
        f"<td class='wide'>{show_bar(entry.size, largest)}</td></tr>"
        for name, entry in list(manifest.files.items())[:_MAX_ROWS]
    )
    more = len(manifest.files) - _MAX_ROWS
    return (
        "<section><h2>Files</h2><div class='card'><table><thead><tr><th>file</th><th>digest</th>"
        f"<th class='number'>size</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"{f'<p class=legend>and {more} more</p>' if more > 0 else ''}</section>"
    )
