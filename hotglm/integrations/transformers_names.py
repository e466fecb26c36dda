r"""Our renames as entries of transformers' registry, and its entries as ours.

Rules this module keeps:

- The same names come out on either side, and the way back there (what `save_pretrained` does) is the way back here.
  What cannot be said exactly is refused by name, never approximated.
- An entry of the registry matches part of a name and may match nothing; a `Rename` matches a whole name. So one made of
  an entry is optional, and has groups for what stands before and after the part.
- `from_transformers(to_transformers(renames)) == renames`, for renames that are optional.

[Note: entries]
What transformers makes of an entry, as far as it shows here: the source is searched for in the name and the first place
is replaced by the target; one group at most, `\1` in the target; `^` and lookaheads are taken out of a target, which
is how `(?!.)`, the end of a name, can stand in both and survive the way back; a source that ends in a letter or
digit ends at a word's end; `*.` stands for anything and a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from packaging.version import Version

from hotglm.errors import MigrationStepError, Problem, shorten_repr
from hotglm.integrations.extras import TRANSFORMERS, missing_transformers
from hotglm.migration.naming import NamePattern, NameTemplate
from hotglm.migration.operation import Operation
from hotglm.migration.operations import Rename
from hotglm.problem import describe_exception

try:
    from transformers import __version__
    from transformers.core_model_loading import WeightRenaming, WeightTransform
except ImportError as error:
    raise missing_transformers(describe_exception(error)) from error

if Version(__version__) < Version(TRANSFORMERS):
    raise missing_transformers(__version__)

__all__ = ["from_transformers", "to_transformers"]

_END = "(?!.)"
_WORD_END = r"(|\W.*)"
_ENDS_IN_WORD = re.compile(r"[a-zA-Z0-9]$")
_PLAIN = re.compile(r"[\w.\-/:]*")
_STATEFUL = ("GroupWeightRename", "Inkling2IndexOffsetWeightRename")


def to_transformers(operations: Iterable[Operation], *, names: Sequence[str] = ()) -> list[WeightRenaming]:
    r"""Return renames as entries for `register_checkpoint_conversion_mapping`, or for `from_pretrained` to use.

    Args:
        operations: `Rename` alone; in their order.
        names: names of a checkpoint; with them, a rename that the registry cannot express as a pattern becomes one
            entry for each name that it changes.

    Raises:
        MigrationStepError: some operation cannot be expressed there; each is named with the reason.

    >>> to_transformers([Rename(r"encoder\.(.*)", r"backbone.\1")])
    [WeightRenaming(source_patterns=['^encoder\\.(.*)(?!.)'], target_patterns=['backbone.\\1'])]
    """
    entries: list[WeightRenaming] = []
    problems: list[Problem] = []
    now = list(names)
    for operation in operations:
        if not isinstance(operation, Rename):
            problems.append(_refusal(operation, "it is no Rename"))
            continue
        pattern = NamePattern.parse(operation.pattern)
        template = NameTemplate.parse(operation.replacement, pattern)
        found = _express(pattern, template)
        if isinstance(found, str) and not now:
            problems.append(_refusal(operation, found))
        else:
            changed = {name: pattern.expand(template, match) for name, match in pattern.find_in(dict.fromkeys(now))}
            singles = [(_escape(old) + _END, _escape(new) + _END) for old, new in changed.items()]
            pairs = singles if isinstance(found, str) else [found]
            entries += [WeightRenaming(f"^{source}", f"^{target}") for source, target in pairs]
            now = [changed.get(name, name) for name in now]
    _raise_if_any(problems, "entries of transformers' registry")
    return entries


def from_transformers(entries: Iterable[WeightTransform]) -> list[Operation]:
    r"""Return entries of the registry, or of `model._weight_conversions`, as renames that do the same.

    Raises:
        MigrationStepError: some entry is more than a rename; each is named. `plan_conversion` takes these as they are.

    >>> [str(operation) for operation in from_transformers([WeightRenaming(".gamma", ".weight")])]
    ["Rename('(.*?).gamma(|\\\\W.*)', '\\\\1.weight\\\\2', optional=True)"]
    """
    operations: list[Operation] = []
    problems: list[Problem] = []
    for entry in entries:
        kinds = {cls.__name__ for cls in type(entry).__mro__}
        if not isinstance(entry, WeightRenaming):
            problems.append(_refusal(entry, "it makes other tensors; plan_conversion(model, specs) expresses that"))
        elif kinds & set(_STATEFUL):
            problems.append(_refusal(entry, "what it does depends on more than the name"))
        elif len(entry.source_patterns) > 1 and any("(" in source for source in entry.source_patterns):
            problems.append(_refusal(entry, "it has several sources with groups"))
        else:
            operations.append(_as_rename(entry))
    _raise_if_any(problems, "renames")
    return operations


def _express(pattern: NamePattern, template: NameTemplate) -> tuple[str, str] | str:
    """Return source and target, without `^`, of the entry that does the same; or why there is none."""
    if pattern.parts is None:
        return pattern.why_not
    parts = [part if isinstance(part, str) else f"({part.body})" for part in pattern.parts]
    groups = [part for part in parts if part.startswith("(")]
    if [reference.group for reference in template.references] != list(range(1, len(groups) + 1)):
        return "it does not use each group once, in their order"
    texts = [part for part in (*parts, *template.parts) if isinstance(part, str) and not part.startswith("(")]
    if not all(_PLAIN.fullmatch(text) for text in texts):
        return "its text has characters that mean something else there"
    made: list[str] = [_escape(part) if isinstance(part, str) else groups[part.group - 1] for part in template.parts]
    source = [part if part.startswith("(") else _escape(part) for part in parts]
    if "*." in "".join((*source, *made)):
        return "'*.' has another meaning there"
    if len(groups) <= 1:
        return "".join(source) + _END, "".join(r"\1" if part in groups else part for part in made) + _END
    return _express_middle(source, made)


def _express_middle(source: list[str], made: list[str]) -> tuple[str, str] | str:
    """Return an entry for a rename of something between groups, where one group can stand for all before it."""
    common = 0
    while common < min(len(source), len(made)) and source[common] == made[common]:
        common += 1
    before, old, new = source[:common], source[common:], made[common:]
    has_rest = bool(old and new) and old[-1] == new[-1] == "(.*)" and len(old) == len(new) == 2
    is_apart = has_rest and old[0].endswith(r"\.")
    if not is_apart or any("|" in part for part in before):
        return "the registry has one group, and this rename needs several"
    head = "".join(part[1:-1] if part.startswith("(") else part for part in before)
    return f"({head}){old[0]}", rf"\1{new[0]}"


def _as_rename(entry: Any) -> Rename:
    r"""Return one rename for a `WeightRenaming`: `head source tail` -> `\head target \tail`."""
    sources = sorted(entry.source_patterns, key=len, reverse=True)
    target = entry.target_patterns[0]
    head = _find_head(entry, is_anchored=all(source.startswith("^") for source in sources))
    if len(sources) == 1 and not head and sources[0].endswith(_END):
        pattern = sources[0][1 : -len(_END)]
        is_plain = _PLAIN.fullmatch(pattern.replace(r"\.", ".")) is not None
        return Rename(pattern.replace(r"\.", ".") if is_plain else pattern, _as_template(target, 0), optional=True)
    bodies = [source.removeprefix("^").replace("*.", r".*\.") for source in sources]
    if len(bodies) == 1:
        body = bodies[0]
        tail = _WORD_END if _ENDS_IN_WORD.search(body) else "" if body.endswith((_END, "(.+)")) else "(.*)"
    else:
        body = "|".join(rf"{body}(?!\w)" if _ENDS_IN_WORD.search(body) else body for body in bodies)
        body, tail = f"(?:{body})", "(.*)"
    num_groups = len(re.findall(r"(?<!\\)\((?!\?)", head + body))
    replacement = ("\\1" if head else "") + _as_template(target, 1 if head else 0)
    if tail:
        replacement += f"\\g<{num_groups + 1}>"
    return Rename(head + body.removesuffix(_END) + tail, _shorten(replacement), optional=True)


def _find_head(entry: Any, *, is_anchored: bool) -> str:
    """Return the group for what stands before the part that the entry replaces; empty where nothing does."""
    rest = "" if is_anchored else ".*?"
    prefix = entry.scope_prefix
    if prefix is None:
        return f"({rest})" if rest else ""
    scope = _escape(f"{prefix}.") if prefix else ""
    base = _escape(f"{entry.base_model_prefix}.") if entry.base_model_prefix else ""
    return f"({base}{scope}{rest}|{scope}{rest})"


def _as_template(target: str, shift: int) -> str:
    r"""Return a target as a template whose `\1` is the group number 1 + `shift`."""
    return _shorten(target.replace(r"\1", f"\\g<{1 + shift}>"))


def _shorten(template: str) -> str:
    return re.sub(r"\\g<(\d)>(?!\d)", r"\\\1", template)


def _escape(text: str) -> str:
    return text.replace(".", r"\.")


def _refusal(what: object, why: str) -> Problem:
    return Problem(code="NOT_EXPRESSIBLE", message=f"Cannot express {shorten_repr(str(what))}: {why}")


def _raise_if_any(problems: Sequence[Problem], what: str) -> None:
    if problems:
        raise MigrationStepError(
            f"Expected operations that can be expressed as {what}, got {len(problems)} that cannot.",
            problems=problems,
            remedy="write the named ones by hand, or pass names=... of a checkpoint to have them one by one.",
        )
