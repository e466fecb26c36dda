"""Models from transformers: checkpoints are converted as `from_pretrained` does it, tensor by tensor into the spare.

The tensors of a checkpoint may have other names and shapes than the model's: one per expert in the file, all experts
stacked in the module. transformers keeps a registry of what is to be done. Here its own code is run on names and
shapes (`plan_conversion`), and what it does to them is written down as expressions, which the slot then streams.

Rules this module keeps:

- transformers decides: which conversions belong to a model, which name goes where, what a converter does. Nothing of
  its tables is copied here.
- Names that fit the model as they are stay as they are.
- A converter that computes something is run by itself, on the tensors it needs; one that needs their values to know
  the shapes is refused by name. `Class.from_pretrained(path)` as a source is always left, with a second copy in memory.
- A directory of another model, of another architecture, or of quantised weights is refused by what its config says,
  before a byte of a tensor is read. Of the config of the live model nothing is changed: one that says something else
  about how the model computes is refused, too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hotglm.breakage import DtypeChanged
from hotglm.comparison import find_unfilled
from hotglm.contract import Contract
from hotglm.errors import MigrationStepError, Problem, shorten_repr
from hotglm.integrations.extras import missing_transformers
from hotglm.integrations.tracing import Tracer
from hotglm.integrations.transformers_config import is_of_transformers, verify_computes_the_same, verify_same_model
from hotglm.integrations.transformers_names import from_transformers, to_transformers
from hotglm.migration.expression import Called, Expression, Source, convert
from hotglm.migration.plan import StatePlan
from hotglm.migration.tensor_spec import TensorSpec, is_widening
from hotglm.model.inspection import find_state
from hotglm.problem import describe_exception
from hotglm.slot.source import Migration, Offer
from hotglm.weights.dtypes import dtype_name

try:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        dot_natural_key,
        rename_source_key,
    )
except ImportError as error:
    raise missing_transformers(describe_exception(error)) from error

__all__ = ["convert_offer", "from_transformers", "plan_conversion", "to_transformers"]

_REMEDY = "stage the module instead: slot.update(Class.from_pretrained(path)); it needs a second copy in memory."

_IGNORED_UNEXPECTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""What old checkpoints have and `from_pretrained` drops where the model has a buffer of that name (`endswith`)."""


@dataclass(slots=True, kw_only=True)
class _Group:
    """Tensors of the file that one conversion takes together.

    Attributes:
        target: name of the first tensor of the model that it makes.
        converter: what makes it; None where one tensor only gets another name.
        names: names in the file by the converter's source pattern, in the order in which it takes them.
    """

    target: str
    converter: Any
    names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def all_names(self) -> list[str]:
        """The names in the file, in order."""
        return [name for names in self.names.values() for name in names]


def convert_offer(offer: Offer, *, module: PreTrainedModel, contract: Contract) -> Offer:
    """Return `offer` in the names and shapes of `module`; the offer itself where it has these already.

    Called by the slot for every source of tensors for a model from transformers.

    Raises:
        IncompatibleError: its config is of another model, of quantised weights, or computes something else.
        MigrationStepError: a converter of the registry cannot be planned.
    """
    config = offer.config if offer.files is not None and is_of_transformers(offer.config) else None
    if config is not None:
        verify_same_model(config, module, label=offer.label)
    if not _fits(contract, offer):
        offer = _with_conversion(offer, module)
    if config is not None and _fits(contract, offer):
        verify_computes_the_same(config, module, label=offer.label)
    return offer


def _fits(contract: Contract, offer: Offer) -> bool:
    """Tell whether names and shapes fit; dtypes are a matter of the stage's policy."""
    return all(isinstance(misfit, DtypeChanged) for misfit in find_unfilled(contract, offer.contract))


def _with_conversion(offer: Offer, model: PreTrainedModel) -> Offer:
    before = offer.migration
    specs = {name: TensorSpec(dtype=spec.dtype, shape=spec.shape) for name, spec in offer.contract.state.items()}
    state = _as_state(specs) if before is None else before.plan.outputs
    sources = specs if before is None else before.plan.sources
    outputs = _convert_state(model, state)
    plan = StatePlan(sources=sources, outputs=outputs, path="" if before is None else before.plan.path)
    if plan.is_identity:
        return offer
    num_made = sum(not isinstance(expression, Source) for expression in outputs.values())
    line = (
        f"converted by transformers' registry for {type(model).__name__}: {len(state)} tensors of a checkpoint to "
        f"{len(outputs)}, of which {num_made} are made of several or of parts"
    )
    tensors = {name: (spec.dtype, spec.shape) for name, spec in plan.specs.items()}
    migration = Migration(plan=plan, lines=(*(() if before is None else before.lines), line))
    return replace(offer, contract=Contract.of_tensors(tensors), migration=migration)


def _as_state(specs: Mapping[str, TensorSpec]) -> dict[str, Expression]:
    return {name: Source(name, spec) for name, spec in specs.items()}


def plan_conversion(model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> StatePlan:
    """Return what each tensor of `model` is made of, from tensors of a checkpoint with these names.

    Pure: nothing is read, the model and the registry are only looked at. What the model has no place for stands under
    its own name in the plan, as the verdict is to name it, unless the model's class says to ignore it.

    Args:
        model: the model that the checkpoint is for.
        specs: dtype and shape of every tensor of the checkpoint.

    Raises:
        MigrationStepError: a converter cannot be planned from shapes, or two tensors are for one place; all are named.
    """
    return StatePlan(sources=dict(specs), outputs=_convert_state(model, _as_state(specs)))


def _convert_state(model: PreTrainedModel, state: Mapping[str, Expression]) -> dict[str, Expression]:
    places = {entry.name: entry.tensor for entry in find_state(model) if entry.persistent}
    problems: list[Problem] = []
    groups, unplaced = _find_groups(model, state, places)
    outputs = {name: state[name] for name in unplaced}
    for group in groups:
        try:
            made = _trace(group, model=model, state=state)
        except Exception as error:  # noqa: BLE001 - a converter is anybody's code
            problems.append(_describe_failure(group, error))
            continue
        for name in made.keys() & outputs.keys():
            message = f"Expected one source, got two, of which one is {shorten_repr(group.all_names[0])}"
            problems.append(Problem(code="TWO_SOURCES", message=message, tensor=name))
        outputs |= made
    if problems:
        raise MigrationStepError(
            f"Expected the checkpoint to be converted by transformers' registry for {type(model).__name__}.",
            problems=problems,
            remedy=_REMEDY,
        )
    return _widen(model, outputs, places)


def _find_groups(
    model: PreTrainedModel, names: Iterable[str], places: Mapping[str, torch.Tensor]
) -> tuple[list[_Group], list[str]]:
    """Return what is converted together, and the names that the model has no place for and does not ignore.

    The order of names and the second try without renaming are those of transformers'
    `convert_and_load_state_dict_in_model`.
    """
    transforms = _find_transforms(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    ignored = _find_ignored(model)
    prefix = model.base_model_prefix
    groups: dict[tuple[str, int], _Group] = {}
    unplaced: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, places)
        if renamed not in places and name in places:
            renamed, pattern = rename_source_key(name, [], [], prefix, places)
        if renamed not in places:
            if ignored is None or not ignored.search(renamed):
                unplaced.append(name)
            continue
        # Without a converter each name is a group of its own, so that two for one place are seen (TWO_SOURCES).
        converter = None if pattern is None else by_pattern[pattern]
        key = (renamed, len(groups) if converter is None else id(converter))
        group = groups.setdefault(key, _Group(target=renamed, converter=converter))
        group.names.setdefault(pattern or name, []).append(name)
    return list(groups.values()), unplaced


def _find_transforms(model: PreTrainedModel) -> list[Any]:
    """Return the conversions of `model`: those it was loaded with by `key_mapping`, then those of the registry."""
    registered = get_model_conversion_mapping(model)
    known = {_identify(transform) for transform in registered}
    own = [t for t in getattr(model, "_weight_conversions", None) or () if _identify(t) not in known]
    return [*copy.deepcopy(own), *registered]


def _identify(transform: Any) -> tuple[object, ...]:
    patterns = (tuple(transform.source_patterns), tuple(transform.target_patterns))
    return (type(transform).__name__, *patterns, transform.scope_prefix)


def _find_ignored(model: PreTrainedModel) -> re.Pattern[str] | None:
    """Return what names in the model's terms are dropped where it has no place for them; as `from_pretrained` does."""
    buffers = [name for name, _ in model.named_buffers()]
    moved = [pattern for end, pattern in _IGNORED_UNEXPECTED.items() if any(name.endswith(end) for name in buffers)]
    patterns = [*moved, *(model._keys_to_ignore_on_load_unexpected or ())]
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _trace(group: _Group, *, model: PreTrainedModel, state: Mapping[str, Expression]) -> dict[str, Expression]:
    """Return what the group makes, by name in the model."""
    names = group.all_names
    if group.converter is None:
        return {group.target: state[names[0]]}
    tracer = Tracer()
    tensors = {name: tracer.make_tensor(state[name]) for name in names}
    made = _convert(group, tensors, model=model)
    found = {name: tracer.find(tensor) for name, tensor in made.items()}
    known = {name: expression for name, expression in found.items() if expression is not None}
    return known if len(known) == len(made) else _call(group, made, model=model, state=state)


def _convert(group: _Group, tensors: Mapping[str, torch.Tensor], *, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Run the group's converter on `tensors`, by name in the file; return what it made, by name in the model."""
    converter = copy.deepcopy(group.converter)  # it collects what it is given
    for pattern, names in group.names.items():
        for name in names:
            converter.add_tensor(group.target, name, pattern, tensors[name])
    made = converter.convert(group.target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _call(
    group: _Group, made: Mapping[str, torch.Tensor], *, model: PreTrainedModel, state: Mapping[str, Expression]
) -> dict[str, Expression]:
    """Return the outputs of a converter that computes, as a call of that converter."""
    names = group.all_names

    def run_converter(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return _convert(group, tensors, model=model)

    called = Called(
        function=run_converter,
        operands=tuple(state[name] for name in names),
        reads=tuple(names),
        writes=tuple((name, _spec_of(tensor)) for name, tensor in made.items()),
        index=0,
        label=_describe(group),
    )
    return {name: replace(called, index=index) for index, name in enumerate(made)}


def _spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def _describe(group: _Group) -> str:
    converter = group.converter
    operations = ", ".join(type(operation).__name__ for operation in converter.operations)
    return f"{type(converter).__name__}({converter.source_patterns} -> {converter.target_patterns}: {operations})"


def _describe_failure(group: _Group, error: Exception) -> Problem:
    what = _describe(group)
    return Problem(
        code="UNPLANNABLE_CONVERTER",
        message=f"Expected to plan {what} from shapes alone, got {describe_exception(error)}",
        tensor=group.target,
    )


def _widen(
    model: PreTrainedModel, outputs: dict[str, Expression], places: Mapping[str, torch.Tensor]
) -> dict[str, Expression]:
    """Convert what the model's class keeps in float32 and the checkpoint has in half precision, which loses nothing."""
    widened = dict(outputs)
    for dtype in (torch.float16, torch.bfloat16):
        kept = list(model._get_dtype_plan(dtype))
        if not kept:
            continue
        pattern, *_ = build_glob_alternation(kept)
        for name, expression in outputs.items():
            place = places.get(name)
            if place is None or expression.spec.dtype != dtype_name(dtype) or not pattern.search(name):
                continue
            if is_widening(expression.spec.dtype, dtype_name(place.dtype)):
                widened[name] = convert(expression, dtype_name(place.dtype))
    return widened
