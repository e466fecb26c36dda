"""What the `config.json` of a checkpoint says against the live model: another model, quantised weights, other numbers.

Rules this module keeps:

- The config is data: it is compared, by the live config's own class, and changes nothing.
- What decides is what a pass computes. Fields that only say how weights were made, saved or started, or what a pass
  returns beside its answer by default, may differ.
- A config that says nothing about a matter is not taken to contradict.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hotglm.errors import IncompatibleError, Problem, shorten_repr
from hotglm.problem import describe_exception

__all__ = ["is_of_transformers", "verify_computes_the_same", "verify_same_model"]

REMEDY = "stage the module that brings its own config: slot.update(Class.from_pretrained(path))."

_BOOKKEEPING = re.compile(
    r"_.*|architectures|auto_map|dtype|torch_dtype|transformers_version|name_or_path|initializer_.*|.*dropout.*"
    r"|.*layerdrop|use_cache|output_attentions|output_hidden_states|return_dict|router_aux_loss_coef|problem_type"
)
"""Fields whose value no pass in inference depends on."""


def is_of_transformers(config: Mapping[str, Any] | None) -> bool:
    """Tell whether `config` is one of transformers': it names a kind of model or its classes."""
    return config is not None and ("model_type" in config or "architectures" in config)


def verify_same_model(config: Mapping[str, Any], model: Any, *, label: str) -> None:
    """Refuse a checkpoint of another model, of another architecture, or of quantised weights, by its config alone.

    Raises:
        IncompatibleError: all that is wrong is named.
    """
    problems = list(_find_other_model(config, model))
    if problems:
        raise IncompatibleError(
            f"Expected a checkpoint for {type(model).__name__}, got another in {label}.",
            problems=problems,
            remedy="give the directory of a checkpoint of this class; for any other, "
            "stage the module that it is loaded into: slot.update(Class.from_pretrained(path)).",
        )


def _find_other_model(config: Mapping[str, Any], model: Any) -> Iterator[Problem]:
    own = getattr(model.config, "model_type", None)
    kind = config.get("model_type")
    if kind is not None and own and kind != own:
        message = f"Expected model_type {shorten_repr(own)}, got {shorten_repr(kind)}"
        yield Problem(code="MODEL_TYPE_MISMATCH", message=message, expected=own, found=kind)
    names = config.get("architectures")
    classes = [cls.__name__ for cls in type(model).__mro__]
    if isinstance(names, list) and names and not set(map(str, names)) & set(classes):
        message = f"Expected architecture {classes[0]!r}, got {', '.join(shorten_repr(name) for name in names)}"
        yield Problem(code="ARCHITECTURE_MISMATCH", message=message, expected=classes[0], found=tuple(names))
    for path, method in _find_quantised(config):
        message = f"Expected weights as they are, got {path} for {shorten_repr(method)}"
        yield Problem(code="QUANTIZED", message=message, expected=None, found=method)


def _find_quantised(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method", "an unnamed method") if isinstance(value, dict) else value
            yield f"{path}{key}", method
        elif isinstance(value, dict) and key.endswith("config"):
            yield from _find_quantised(value, f"{path}{key}.")


def verify_computes_the_same(config: Mapping[str, Any], model: Any, *, label: str) -> None:
    """Refuse a config under which the same weights would give other answers than in the live model.

    Raises:
        IncompatibleError: every field that differs is named.
    """
    own, live = type(model.config), model.config.to_dict()
    try:
        offered = own.from_dict(own._decode_special_floats(copy.deepcopy(dict(config)))).to_dict()
        # Some classes fill in what they were not given only when they read a config: both count as the live one.
        again = own.from_dict(copy.deepcopy(live)).to_dict()
    except Exception as error:
        problem = Problem(code="BAD_CONFIG", message=f"Expected a {own.__name__}, got {describe_exception(error)}")
        raise IncompatibleError(f"Expected a usable config in {label}.", problems=[problem], remedy=REMEDY) from error
    problems = [
        Problem(
            code="CONFIG_CHANGED",
            message=f"Expected {name} {shorten_repr(live.get(name))}, got {shorten_repr(offered.get(name))}",
            expected=live.get(name),
            found=offered.get(name),
        )
        for name in sorted({*live, *offered})
        if not _BOOKKEEPING.fullmatch(name)
        and _strip(offered.get(name)) not in (_strip(live.get(name)), _strip(again.get(name)))
    ]
    if problems:
        raise IncompatibleError(
            f"Expected the config that the live {type(model).__name__} was built from, got another in {label}.",
            problems=problems,
            remedy=REMEDY,
        )


def _strip(value: Any) -> Any:
    """Return a value without the bookkeeping in nested configs, and without what JSON changes."""
    if isinstance(value, Mapping):
        return {str(k): _strip(v) for k, v in value.items() if not _BOOKKEEPING.fullmatch(str(k))}
    if isinstance(value, (list, tuple)):
        return [_strip(item) for item in value]
    return "NaN" if value != value else value  # noqa: PLR0124 - which is not equal to itself
