"""What every state operation has in common: it rewrites a state, says what is wrong, and knows its way back.

Rules this module keeps:

- An operation is data: frozen, comparable, without a reference to a model class or a tensor.
- It is checked on names, dtypes and shapes alone, before anything is read; all its problems are reported at once.
- An operation that names tensors must find them, unless it is `optional`: a step that silently does nothing is a wrong
  step.
- The inverse is derived without seeing a state. An operation without one says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hotglm.errors import ArgumentError, MigrationStepError, Problem, shorten_repr
from hotglm.migration.expression import Expression
from hotglm.migration.naming import Match, NamePattern, NameTemplate
from hotglm.migration.origin import format_call
from hotglm.migration.tensor_spec import normalise_dim

__all__ = [
    "Operation",
    "Report",
    "State",
    "as_names",
    "find_dim",
    "replace_by_name",
    "verify_names",
    "verify_number",
    "verify_whole",
]

State = dict[str, Expression]
"""The tensors of a state, while operations rewrite it."""

_NUM_NAMES_SHOWN = 3


@dataclass(slots=True)
class Report:
    """What is wrong with one operation on one state.

    Attributes:
        problems: in the order in which they were found.
        step: the step that the operation belongs to, for texts; empty where it runs by itself.
    """

    problems: list[Problem] = field(default_factory=list)
    step: str = ""

    def add(self, code: str, message: str, *, tensor: str | None = None) -> None:
        """Note one problem."""
        self.problems.append(Problem(code=code, message=message, tensor=tensor))


@dataclass(frozen=True, slots=True)
class Operation:
    """A step from one state to the next.

    Attributes:
        optional: whether it may find none of the tensors that it names; it then does nothing.
    """

    optional: bool = field(default=False, kw_only=True)

    def apply(self, state: Mapping[str, Expression]) -> State:
        """Return the state after the operation; `state` stays as it is.

        Raises:
            MigrationStepError: it does not fit the state; the problems name every tensor concerned.
        """
        report, rewritten = Report(), dict(state)
        self.rewrite(rewritten, report)
        if report.problems:
            error = MigrationStepError(
                f"Expected {self} to fit the state, got tensors that it does not fit.",
                problems=report.problems,
                remedy="correct the operation, or the version that it starts from.",
            )
            error.operation = str(self)
            raise error
        return rewritten

    def rewrite(self, state: State, report: Report) -> None:
        """Rewrite `state` in place and note in `report` what is wrong; afterwards a faulty state means nothing."""
        raise NotImplementedError

    def inverse(self) -> Operation | None:
        """Return the operation that leads back bit for bit, or None; `why_not` then says why."""
        found = self._invert()
        return found if isinstance(found, Operation) else None

    def why_not(self) -> str:
        """Return why there is no inverse; empty when there is one."""
        found = self._invert()
        return found if isinstance(found, str) else ""

    def _invert(self) -> Operation | str:
        raise NotImplementedError

    def __str__(self) -> str:
        """Format as it is written in code, without what is left at its default."""
        return format_call(self)

    def _find(self, text: str, state: State, report: Report) -> list[tuple[str, Match]]:
        """Return the tensors that `text` means; none is a problem unless the operation is optional."""
        found = NamePattern.parse(text).find_in(state)
        if not found and not self.optional:
            report.add(
                "TENSOR_MISSING", f"Expected a tensor {shorten_repr(text)}, got {describe_nearest(text, state)}."
            )
        return found

    def _find_groups(
        self, texts: Sequence[str], state: State, report: Report
    ) -> Iterator[tuple[tuple[str, ...], Match]]:
        """Yield the tensors that belong together: what the first text means, and the rest by its groups."""
        pattern = NamePattern.parse(texts[0])
        templates = [NameTemplate.parse(text, pattern) for text in texts[1:]]
        if not (found := pattern.find_in(state)):
            if not (pattern.literal is not None and any(t.literal in state for t in templates)):
                self._find(texts[0], state, report)
                return
            found = [(pattern.literal, None)]
        taken: set[str] = set()
        for name, match in found:
            names = (name, *(pattern.expand(template, match) for template in templates))
            if twice := taken.intersection(names):
                report.add(
                    "TENSOR_TWICE",
                    f"Expected {shorten_repr(min(twice))} in one group, got it again with {shorten_repr(name)} (make a "
                    "copy for each group first: Add(..., initialiser=Copy(...), each=...)).",
                    tensor=min(twice),
                )
                continue
            taken.update(names)
            missing = [other for other in names if other not in state]
            for other in missing:
                report.add(
                    "TENSOR_MISSING",
                    f"Expected a tensor {shorten_repr(other)} beside {shorten_repr(name)}, got none.",
                    tensor=other,
                )
            if len(set(names)) < len(names):
                report.add("NAME_TWICE", f"Expected different tensors, got {shorten_repr(names)}.", tensor=name)
            elif not missing:
                yield names, match


def replace_by_name(state: State, old: Sequence[str], new: Mapping[str, Expression], report: Report) -> None:
    """Take the tensors `old` out of `state` and put `new` in; a name that is taken by another is a problem."""
    for name in old:
        state.pop(name, None)
    for name, expression in new.items():
        if name in state:
            report.add(
                "NAME_TAKEN", f"Expected the name {shorten_repr(name)} to be free, got a tensor there.", tensor=name
            )
        state[name] = expression


def find_dim(dim: int, tensor: Expression, name: str, report: Report) -> int | None:
    """Return `dim` counted from the front; a tensor that has none such is a problem."""
    found = normalise_dim(dim, len(tensor.spec.shape))
    if found is None:
        report.add(
            "NO_DIMENSION", f"Expected {shorten_repr(name)} to have a dimension {dim}, got {tensor.spec}.", tensor=name
        )
    return found


def verify_names(names: object, what: str, *, least: int = 1) -> tuple[str, ...]:
    """Return `names` as a tuple.

    Raises:
        ArgumentError: it is not a sequence of at least `least` different texts.
    """
    given = tuple(names) if isinstance(names, Sequence) and not isinstance(names, str) else None
    if given is None or len(given) < least or not all(isinstance(n, str) and n for n in given):
        raise ArgumentError(
            f"Expected {what} as a sequence of at least {least} names, got {shorten_repr(names)}.",
            remedy="give a tuple of names.",
        )
    if len(set(given)) < len(given):
        raise ArgumentError(
            f"Expected {what} without repetition, got {shorten_repr(names)}.", remedy="give each name once."
        )
    return given


def as_names(operation: Operation, field_name: str, *, least: int = 1) -> tuple[str, ...]:
    """Verify the field `field_name` of an operation that is being constructed, store it as a tuple, and return it."""
    names = verify_names(getattr(operation, field_name), f"{type(operation).__name__}.{field_name}", least=least)
    object.__setattr__(operation, field_name, names)
    return names


def verify_whole(operation: Operation, *field_names: str, may_lack: Sequence[str] = ()) -> None:
    """Refuse an operation that is being constructed with something else than whole numbers in these fields.

    Raises:
        ArgumentError: naming them; those of `may_lack` may be None.
    """
    given = {name: getattr(operation, name) for name in (*field_names, *may_lack)}
    wrong = {n: v for n, v in given.items() if type(v) is not int and not (v is None and n in may_lack)}
    if wrong:
        raise ArgumentError(
            f"Expected whole numbers in {type(operation).__name__}, got {shorten_repr(wrong)}.",
            remedy="give dimensions, places and sizes as int.",
        )


def verify_number(operation: Operation, field_name: str) -> None:
    """Refuse an operation that is being constructed with something else than a number in this field.

    Raises:
        ArgumentError: it is not an int or float.
    """
    value = getattr(operation, field_name)
    if not isinstance(value, int | float):
        raise ArgumentError(
            f"Expected a number as {field_name} of {type(operation).__name__}, got {shorten_repr(value)}.",
            remedy="give an int or float.",
        )


def describe_nearest(text: str, state: Mapping[str, object]) -> str:
    """Return what a reader needs to see when `text` is not in `state`: the names nearest to it, at most three."""
    if not state:
        return "no tensors at all"
    words = set(_find_words(text))
    similar: Callable[[str], tuple[int, int]] = lambda name: (-len(words & set(_find_words(name))), len(name))  # noqa: E731
    names = sorted(state, key=similar)[:_NUM_NAMES_SHOWN]
    return f"none among {len(state)} (nearest: {', '.join(shorten_repr(name) for name in names)})"


def _find_words(text: str) -> list[str]:
    return [word for word in text.replace("\\", ".").split(".") if word]
