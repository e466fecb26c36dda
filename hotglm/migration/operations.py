"""Operations on whole tensors: their names, and whether they are there at all.

Rules this module keeps: a name is free or taken, never overwritten; what leaves the state is named; what an inverse
cannot know (the value of a tensor that was dropped) is what the caller said it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hotglm.errors import ArgumentError, shorten_repr
from hotglm.migration.expression import Called, Expression, Filled, same
from hotglm.migration.initialisers import Constant, Copy, Initialiser, Normal, Zeros
from hotglm.migration.naming import NamePattern, NameTemplate, turn_round
from hotglm.migration.operation import Operation, Report, State, as_names, replace_by_name, verify_names
from hotglm.migration.origin import describe_function
from hotglm.migration.tensor_spec import DTYPE_NBITS, TensorSpec, holds_value
from hotglm.problem import describe_exception

__all__ = ["Add", "Apply", "Drop", "Rename", "SpecRule", "Tie", "Untie"]


@dataclass(frozen=True, slots=True)
class Rename(Operation):
    r"""Give every tensor that `pattern` matches the name that `replacement` says; all at once, so two may swap names.

    Invertible where `pattern` is literal text and groups that are not nested, and `replacement` uses each group once. A
    plan that goes down by the derived inverse verifies on the real names that going up again leads back.

    >>> Rename(r"encoder\.(.*)", r"backbone.\1").inverse()
    Rename(optional=False, pattern='backbone\\.(.*)', replacement='encoder.\\1')
    """

    pattern: str
    replacement: str

    def __post_init__(self) -> None:
        """Refuse what is no pattern or no template for it."""
        NameTemplate.parse(self.replacement, NamePattern.parse(self.pattern))

    def rewrite(self, state: State, report: Report) -> None:
        """Rename what matches."""
        pattern = NamePattern.parse(self.pattern)
        template = NameTemplate.parse(self.replacement, pattern)
        renamed = {name: pattern.expand(template, match) for name, match in self._find(self.pattern, state, report)}
        taken = {name: state.pop(name) for name in renamed}
        for old, new in renamed.items():
            if new in state:
                report.add(
                    "NAME_TAKEN",
                    f"Expected the name {shorten_repr(new)} for {shorten_repr(old)} to be free, got a tensor there.",
                    tensor=old,
                )
            state[new] = taken[old]

    def _invert(self) -> Operation | str:
        pattern = NamePattern.parse(self.pattern)
        turned = turn_round(pattern, [NameTemplate.parse(self.replacement, pattern)], anchor=0)
        return turned if isinstance(turned, str) else Rename(turned.pattern, turned.origin, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Tie(Operation):
    """Keep the first of `names` for tensors that are bitwise equal; that they are is verified when they are read.

    The first may be a pattern, the others are then templates over its groups. Invertible: `Untie` copies.
    """

    names: Sequence[str]

    def __post_init__(self) -> None:
        """Refuse fewer than two names."""
        _verify_templates(as_names(self, "names", least=2))

    def rewrite(self, state: State, report: Report) -> None:
        """Tie every group of tensors."""
        for names, _ in self._find_groups(self.names, state, report):
            tensors = [state[name] for name in names]
            for name, tensor in zip(names, tensors, strict=True):
                if tensor.spec != tensors[0].spec:
                    report.add(
                        "SPEC_DIFFERS",
                        f"Expected {shorten_repr(name)} as {tensors[0].spec}, which {shorten_repr(names[0])} is, "
                        f"got {tensor.spec}.",
                        tensor=name,
                    )
            replace_by_name(state, names, {names[0]: same(tensors)}, report)

    def _invert(self) -> Operation | str:
        return Untie(self.names, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Untie(Operation):
    """Copy the first of `names` under the others; the first may be a pattern. Invertible: `Tie` verifies and drops."""

    names: Sequence[str]

    def __post_init__(self) -> None:
        """Refuse fewer than two names."""
        _verify_templates(as_names(self, "names", least=2))

    def rewrite(self, state: State, report: Report) -> None:
        """Copy every tensor that the first name means."""
        pattern = NamePattern.parse(self.names[0])
        templates = [NameTemplate.parse(name, pattern) for name in self.names[1:]]
        for name, match in self._find(self.names[0], state, report):
            copies = {pattern.expand(template, match): state[name] for template in templates}
            replace_by_name(state, (), copies, report)

    def _invert(self) -> Operation | str:
        return Tie(self.names, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Add(Operation):
    r"""Add the tensor `name`, filled by `initialiser`. Invertible: it is dropped again.

    Attributes:
        name: of the new tensor; a template over the groups of `each`, where that is given.
        shape: of the new tensor; may be None for a `Copy`, which has that of what it copies.
        dtype: likewise.
        initialiser: what to fill it with.
        each: a pattern; one tensor is added for every tensor that it matches.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    initialiser: Initialiser = field(default_factory=Zeros)
    each: str | None = None

    def __post_init__(self) -> None:
        """Refuse a tensor without dtype or shape, and templates without a pattern."""
        NameTemplate.parse(self.name, self._each)
        if isinstance(self.initialiser, Copy):
            NameTemplate.parse(self.initialiser.name, self._each)
        elif self.shape is None or self.dtype is None:
            raise ArgumentError(
                f"Expected shape and dtype of the added tensor {shorten_repr(self.name)}, got {self.shape} and "
                f"{self.dtype}.",
                remedy="give both; only a Copy has them from what it copies.",
            )
        if not isinstance(self.initialiser, Initialiser):
            raise ArgumentError(
                f"Expected an initialiser for {shorten_repr(self.name)}, got {shorten_repr(self.initialiser)}.",
                remedy="use Zeros(), Ones(), Constant(value), Normal(std, seed) or Copy(name).",
            )
        if self.shape is not None:
            object.__setattr__(self, "shape", _verify_shape(self.shape))
        if self.dtype is not None and self.dtype not in DTYPE_NBITS:
            raise ArgumentError(
                f"Expected the name of a dtype, got {shorten_repr(self.dtype)}.",
                remedy=f"use one of {', '.join(sorted(DTYPE_NBITS))}.",
            )
        value = self.initialiser.value if isinstance(self.initialiser, Constant) else 0
        drawn = isinstance(self.initialiser, Normal) and self.dtype is not None and not holds_value(self.dtype, 0.5)
        if self.dtype is not None and (drawn or not holds_value(self.dtype, value)):
            raise ArgumentError(
                f"Expected values that {self.dtype} holds for {shorten_repr(self.name)}, got {self.initialiser}.",
                remedy="give another initialiser or dtype.",
            )

    @property
    def _each(self) -> NamePattern:
        return NamePattern.parse("alone" if self.each is None else self.each)  # no group in it to refer to

    def rewrite(self, state: State, report: Report) -> None:
        """Add every tensor."""
        replace_by_name(state, (), self.make(state, report), report)

    def make(self, state: State, report: Report) -> State:
        """Return the tensors that it adds to `state`."""
        found = [("", None)] if self.each is None else self._find(self.each, state, report)
        template = NameTemplate.parse(self.name, self._each)
        made: State = {}
        for _, match in found:
            name = self._each.expand(template, match)
            if name in made:
                report.add("NAME_TWICE", f"Expected to add {shorten_repr(name)} once, got it twice.", tensor=name)
            tensor: Expression | None
            if isinstance(self.initialiser, Copy):
                tensor = self._copy(
                    name, self._each.expand(NameTemplate.parse(self.initialiser.name, self._each), match), state, report
                )
            else:
                tensor = Filled(name, self.initialiser, TensorSpec(dtype=self.dtype or "", shape=self.shape or ()))
            if tensor is not None:
                made[name] = tensor
        return made

    def _copy(self, name: str, origin: str, state: State, report: Report) -> Expression | None:
        tensor = state.get(origin)
        if tensor is None:
            report.add(
                "TENSOR_MISSING",
                f"Expected a tensor {shorten_repr(origin)} to copy to {shorten_repr(name)}, got none.",
                tensor=origin,
            )
            return None
        wanted = TensorSpec(
            dtype=self.dtype or tensor.spec.dtype, shape=tensor.spec.shape if self.shape is None else self.shape
        )
        if tensor.spec != wanted:
            report.add(
                "SPEC_DIFFERS",
                f"Expected {shorten_repr(origin)} to be copied as {wanted}, got {tensor.spec}.",
                tensor=origin,
            )
        return tensor

    def _invert(self) -> Operation | str:
        turned = turn_round(self._each, [NameTemplate.parse(self.name, self._each)], anchor=0)
        return turned if isinstance(turned, str) else Drop(turned.pattern, restore=self, optional=self.optional)


@dataclass(frozen=True, slots=True)
class Drop(Operation):
    """Leave out every tensor that `pattern` matches.

    Invertible where `restore` says how they come back. That they come back bit for bit is then the caller's claim: it
    holds where what was dropped is what `restore` makes, as for position ids, masks and copies of other tensors. A
    `restore` that would not make exactly the names, dtypes and shapes that were dropped is refused.
    """

    pattern: str
    restore: Add | None = None

    def __post_init__(self) -> None:
        """Refuse what is no pattern or no `Add`."""
        NamePattern.parse(self.pattern)
        if self.restore is not None and not isinstance(self.restore, Add):
            raise ArgumentError(
                f"Expected restore as an Add, got {shorten_repr(self.restore)}.",
                remedy="give Add(name, shape, dtype, initialiser), with each=pattern for one tensor per layer.",
            )

    def rewrite(self, state: State, report: Report) -> None:
        """Drop what matches."""
        dropped = {name: state.pop(name) for name, _ in self._find(self.pattern, state, report)}
        if self.restore is None or not dropped:
            return
        made = self.restore.make(state, report)
        for name in {**dropped, **made}:
            was, back = dropped.get(name), made.get(name)
            if was is None or back is None or was.spec != back.spec:
                report.add(
                    "RESTORE_DIFFERS",
                    f"Expected restore to make {shorten_repr(name)} as the {was.spec if was else 'nothing'} that is "
                    f"dropped, got {back.spec if back else 'nothing'}.",
                    tensor=name,
                )

    def _invert(self) -> Operation | str:
        return self.restore or "nothing says what the dropped tensors were (give `restore`)"


SpecRule = TensorSpec | Callable[[dict[str, TensorSpec]], TensorSpec]
"""Dtype and shape of what a free function returns, or a function that tells them from those of what it reads."""


@dataclass(frozen=True, slots=True)
class Apply(Operation):
    r"""Replace the tensors `reads` by what `function` makes of them.

    `function` gets a dict of tensors by the keys of `reads` and returns one by the names in `writes`, both as they are
    written here, also where they are patterns and templates. It must not write into what it gets. What it returns must
    have the dtypes and shapes that `writes` declares; that is verified when it runs.

    Attributes:
        function: see above; module-level, so that whoever reads the plan can find it.
        reads: names, or names by the key that the function finds each under; the first may be a pattern, the others are
            templates over its groups.
        writes: dtype and shape, or a function that tells them, by name (templates likewise).
        down: the operation that leads back, if there is one; that it does bit for bit is the caller's claim.
    """

    function: Callable[[dict[str, Any]], Mapping[str, Any]]
    reads: Sequence[str] | Mapping[str, str]
    writes: Mapping[str, SpecRule]
    down: Operation | None = None

    def __post_init__(self) -> None:
        """Store reads and writes as dicts of its own; refuse what is no function, name or spec."""
        if (
            not callable(self.function)
            or not isinstance(self.function, Hashable)
            or not isinstance(self.writes, Mapping)
            or not self.writes
        ):
            raise ArgumentError(
                f"Expected a hashable function and what it writes, got {shorten_repr(self.function)} and "
                f"{shorten_repr(self.writes)}.",
                remedy="give writes={name: TensorSpec(dtype=..., shape=...)}.",
            )
        if self.down is not None and not isinstance(self.down, Operation):
            raise ArgumentError(
                f"Expected the way back of an Apply as an operation, got {shorten_repr(self.down)}.",
                remedy="give down=Apply(function, reads, writes).",
            )
        reads = self.reads if isinstance(self.reads, Mapping) else {name: name for name in self.reads}
        _verify_templates(verify_names(tuple(reads.values()), "Apply.reads"))
        pattern = NamePattern.parse(next(iter(reads.values())))
        for name, rule in self.writes.items():
            NameTemplate.parse(name, pattern)
            if not (isinstance(rule, TensorSpec) or callable(rule)):
                raise ArgumentError(
                    f"Expected a TensorSpec, or a function that returns one, for {shorten_repr(name)}, got "
                    f"{shorten_repr(rule)}.",
                    remedy="give TensorSpec(dtype='float32', shape=(4, 8)).",
                )
        object.__setattr__(self, "reads", dict(reads))
        object.__setattr__(self, "writes", dict(self.writes))

    def __hash__(self) -> int:
        """Hash the function and the names."""
        return hash((self.function, tuple(self._reads.items()), tuple(self.writes), self.down, self.optional))

    @property
    def label(self) -> str:
        """What the function is called in texts."""
        return describe_function(self.function)

    @property
    def _reads(self) -> Mapping[str, str]:
        return self.reads if isinstance(self.reads, Mapping) else {name: name for name in self.reads}

    def rewrite(self, state: State, report: Report) -> None:
        """Replace every group of tensors."""
        reads = self._reads
        pattern = NamePattern.parse(next(iter(reads.values())))
        templates = {key: NameTemplate.parse(key, pattern) for key in self.writes}
        for names, match in list(self._find_groups(tuple(reads.values()), state, report)):
            operands = tuple(state[name] for name in names)
            specs = {key: operand.spec for key, operand in zip(reads, operands, strict=True)}
            writes = tuple((key, spec) for key in self.writes if (spec := self._tell_spec(key, specs, report)))
            made = {
                pattern.expand(templates[key], match): Called(
                    self.function, operands, tuple(reads), writes, index, self.label, report.step
                )
                for index, (key, _) in enumerate(writes)
            }
            if len(made) < len(writes):
                report.add(
                    "NAME_TWICE", f"Expected different tensors, got {shorten_repr(tuple(made))}.", tensor=names[0]
                )
            replace_by_name(state, names, made, report)

    def _tell_spec(self, key: str, specs: Mapping[str, TensorSpec], report: Report) -> TensorSpec | None:
        rule = self.writes[key]
        if isinstance(rule, TensorSpec):
            return rule
        try:
            spec = rule(dict(specs))
        except Exception as error:  # noqa: BLE001 - the rule is the caller's own code
            got = describe_exception(error)
        else:
            if isinstance(spec, TensorSpec):
                return spec
            got = shorten_repr(spec)
        report.add(
            "SPEC_RULE", f"Expected the rule for {shorten_repr(key)} to tell a TensorSpec, got {got}.", tensor=key
        )
        return None

    def _invert(self) -> Operation | str:
        return self.down or f"{self.label} is a free function (give `down`)"

    def __str__(self) -> str:
        """Format with the function's name in place of its address."""
        return f"Apply({self.label}, {shorten_repr(tuple(self._reads.values()))}, {shorten_repr(tuple(self.writes))})"


def _verify_shape(shape: object) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else (-1,)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ArgumentError(
            f"Expected a shape, got {shorten_repr(shape)}.", remedy="give a tuple of sizes of 0 or more."
        )
    return sizes


def _verify_templates(names: Sequence[str]) -> None:
    pattern = NamePattern.parse(names[0])
    for name in names[1:]:
        NameTemplate.parse(name, pattern)
