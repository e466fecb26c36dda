"""The versions that torch's modules give their state (`nn.Module._version`), on their way into a file and back.

torch writes them beside a state dict (`state_dict()._metadata`), and `load_state_dict` gives each module the version
that its state was saved under, so that its `_load_from_state_dict` can bring older state up to date: `BatchNorm` adds
`num_batches_tracked`, which it has had since its version 2. Other formats lose them.

Rules this module keeps:

- `save_weights` writes those that are not 1, torch's default, under `hotglm.module_versions`; a file of a module that
  has no others holds an empty object, which says that all are 1. A file without the key says nothing, and then nothing
  is done for it: what does not fit is refused like any other tensor.
- Where a file is older than the code, the module's own `_load_from_state_dict` is asked what it would do, with
  placeholders that have no values, on a stand-in whose tensors have none either. What it renames, leaves out, or adds
  as a tensor of one value is done while loading. What it computes from values cannot be, and is refused with the
  module's path and both versions; so are modules with hooks that run before loading.
- The module that is asked is the code's own class, never anything that a file names (P6). Newer state than the code
  knows is left to the verdict, as torch leaves it to the shapes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hotglm.errors import ArgumentError, IncompatibleError, Problem, shorten_repr
from hotglm.migration.expression import Expression, Filled, TensorSpec, find_sources
from hotglm.migration.initialisers import Constant
from hotglm.problem import describe_exception
from hotglm.weights.dtypes import TORCH_DTYPES, dtype_name

__all__ = [
    "KEY",
    "MAX_MODULES",
    "Upgrade",
    "carry_module_versions",
    "find_module_versions",
    "format_module_versions",
    "plan_upgrade",
]

KEY = "hotglm.module_versions"
MAX_MODULES = 100_000
"""Most modules whose versions a file may tell."""

_DEFAULT = 1
_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    """What modules do to state that was saved under older versions of them.

    Attributes:
        outputs: every tensor afterwards.
        lines: what was done, one line for each module.
    """

    outputs: Mapping[str, Expression]
    lines: tuple[str, ...]


def find_module_versions(source: object) -> dict[str, int] | None:
    """Return path and version of every module whose version is not 1; None where the source does not tell.

    Args:
        source: a module, or what `state_dict()` returned. A plain mapping does not tell.
    """
    if isinstance(source, nn.Module):
        found = {path: part._version for path, part in source.named_modules(remove_duplicate=False)}
    else:
        metadata = getattr(source, "_metadata", None)
        if not isinstance(metadata, Mapping):
            return None
        found = {path: entry.get("version") for path, entry in metadata.items() if isinstance(entry, Mapping)}
    return {path: version for path, version in found.items() if isinstance(version, int) and version != _DEFAULT}


def format_module_versions(versions: Mapping[str, int]) -> str:
    """Return them as the text that stands in a file.

    Raises:
        ArgumentError: there are more than a file may hold.
    """
    if len(versions) > MAX_MODULES:
        raise ArgumentError(
            f"Expected versions of at most {MAX_MODULES} modules, got {len(versions)}.",
            remedy="save the state dict as a plain mapping, dict(model.state_dict()), which has none.",
        )
    return json.dumps(dict(versions))


def carry_module_versions(outputs: Mapping[str, Expression], versions: Mapping[str, int]) -> dict[str, int | None]:
    """Return the versions by the paths that modules have after a migration; None for a module that is new.

    A module's version is the newest of those its tensors come from; one without tensors of its own keeps its path.

    Args:
        outputs: every tensor after the migration.
        versions: by the paths before it; what is not named is of version 1.
    """
    found: dict[str, list[int]] = {}
    for name, expression in outputs.items():
        known = found.setdefault(name.rpartition(".")[0], [])
        known += [versions.get(source.rpartition(".")[0], _DEFAULT) for source in find_sources(expression)]
    return {**versions, **{path: max(known, default=None) for path, known in found.items()}}


def plan_upgrade(
    module: nn.Module, outputs: Mapping[str, Expression], versions: Mapping[str, int | None]
) -> Upgrade | None:
    """Return what the parts of `module` do to state that was saved under `versions`; None where nothing is to do.

    Args:
        module: the code; neither it nor its tensors are changed.
        outputs: every tensor that is offered, by the name it has for `module`.
        versions: path and version of every module whose version was not 1; None for one that needs nothing done.

    Raises:
        IncompatibleError: some part would compute with the values; all such parts are named.
    """
    if not any(_is_older(path, part, versions) for path, part in module.named_modules(remove_duplicate=False)):
        return None
    state = {name: _make_placeholder(expression.spec) for name, expression in outputs.items()}
    visit = _Visit(state, versions)
    after = visit.run(module, "", dict(state))
    visit.raise_if_any()
    names = {id(tensor): name for name, tensor in state.items()}
    upgraded = {
        name: outputs[names[id(tensor)]] if id(tensor) in names else _make_constant(name, tensor)
        for name, tensor in after.items()
    }
    return Upgrade(outputs=upgraded, lines=tuple(visit.lines)) if upgraded != outputs else None


def _is_older(path: str, part: nn.Module, versions: Mapping[str, int | None]) -> bool:
    found = versions.get(path, _DEFAULT)
    return isinstance(part._version, int) and found is not None and found < part._version


def _make_placeholder(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")


def _make_constant(name: str, tensor: torch.Tensor) -> Expression:
    spec = TensorSpec(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
    value = tensor.reshape(-1)[0].item() if tensor.numel() else 0
    return Filled(name, Constant(value), spec)


class _Visit:
    """One walk through a module, as `load_state_dict` makes it."""

    def __init__(self, placeholders: Mapping[str, torch.Tensor], versions: Mapping[str, int | None]) -> None:
        self.lines: list[str] = []
        self._known = {id(tensor) for tensor in placeholders.values()}
        self._versions = versions
        self._problems: list[Problem] = []

    def run(self, part: nn.Module, path: str, state: _Tensors) -> _Tensors:
        """Return `state`, all of whose names are below `path`, as `part` and its children leave it."""
        prefix = f"{path}." if path else ""
        if _is_older(path, part, self._versions):
            self._ask(part, path, prefix, state)
        for name, child in part._modules.items():
            if child is None:
                continue
            below = {key: tensor for key, tensor in state.items() if key.startswith(f"{prefix}{name}.")}
            for key in below:
                del state[key]
            state |= self.run(child, f"{prefix}{name}", below)
        return state

    def raise_if_any(self) -> None:
        """Raise what was found.

        Raises:
            IncompatibleError: with every part that cannot be brought up to date.
        """
        if self._problems:
            raise IncompatibleError(
                "Expected state of modules that can be brought up to date while it is loaded, got some that cannot.",
                problems=self._problems,
                remedy="load it once with torch's own load_state_dict and save it again with hotglm.save_weights, or "
                "write a migration that does what the module does.",
            )

    def _ask(self, part: nn.Module, path: str, prefix: str, state: _Tensors) -> None:
        found = self._versions.get(path, _DEFAULT)
        if part._load_state_dict_pre_hooks:
            self._refuse(part, path, found, "hooks run before it is loaded")
            return
        if type(part)._load_from_state_dict is nn.Module._load_from_state_dict:
            return
        before = dict(state)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # that copying to a tensor without values does nothing
                # By position, as torch does it: an override may call its arguments as it likes.
                _make_stand_in(part)._load_from_state_dict(state, prefix, {"version": found}, False, [], [], [])  # noqa: FBT003
        except Exception as error:  # noqa: BLE001 - whatever the module's own code does with tensors without values
            self._refuse(part, path, found, f"it raised {describe_exception(error)}")
            return
        if why := next(filter(None, (self._why_unknown(name, tensor) for name, tensor in state.items())), None):
            self._refuse(part, path, found, why)
        elif _identify(state) != _identify(before):
            label = f"{path or 'the model'} ({type(part).__name__})"
            self.lines.append(f"state of {label} brought from its version {found} to {part._version}")

    def _why_unknown(self, name: str, tensor: object) -> str | None:
        if id(tensor) in self._known:
            return None
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout is not torch.strided:
            return f"it computes {shorten_repr(name)} from values"
        if tensor.numel() and not bool((tensor == tensor.reshape(-1)[0]).all()):
            return f"it adds {shorten_repr(name)}, whose values are not all the same"
        self._known.add(id(tensor))
        return None

    def _refuse(self, part: nn.Module, path: str, found: int | None, why: str) -> None:
        self._problems.append(
            Problem(
                code="MODULE_VERSION",
                message=f"Expected state of {type(part).__name__} {shorten_repr(path)} of version {part._version}, got "
                f"version {found}, and {why}",
                expected=part._version,
                found=found,
            )
        )


def _identify(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in state.items()}


def _make_stand_in(part: nn.Module) -> nn.Module:
    """Return an object of the same class and attributes, whose tensors have no values and no hooks."""
    stand_in: nn.Module = object.__new__(type(part))
    stand_in.__dict__.update(part.__dict__)
    stand_in.__dict__["_parameters"] = dict(_empty_all(part._parameters))
    stand_in.__dict__["_buffers"] = dict(_empty_all(part._buffers))
    return stand_in


def _empty_all(tensors: Mapping[str, torch.Tensor | None]) -> Iterator[tuple[str, torch.Tensor | None]]:
    for name, tensor in tensors.items():
        if tensor is None:
            yield name, None
            continue
        empty = torch.empty_like(tensor, device="meta")
        yield name, nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
