"""Refuses compiled code that a swap would not reach, before anything is read or copied.

Rules this module keeps: everything found is named at once, with what to do instead; each hazard is shown to be one in
`tests/test_compiled_hazards.py`.

[Note: freezing]
Under inductor's freezing the weights become constants of the code. Each generation is then compiled for itself, until
Dynamo gives up and runs it eagerly for ever; and a write in place reaches nothing. torch reads the setting when it
compiles, and a context remembers what it was when `torch.compile` was called, so both are asked; and what it was when
a pass of the slot had something compiled is noted then (`Recipe.note_compiling`). Passes before there was a slot are
not seen.

[Note: late hooks]
Dynamo looks at the hooks of the parts below a compiled module once, when it compiles, and does not guard them
(`skip_nnmodule_hook_guards`). A hook that is registered after that never runs, in no generation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from hotglm.errors import Problem, UnswappableError, shorten_repr
from hotglm.model.captured import verify_uncaptured
from hotglm.model.compiled import Recipe, find_calls, find_recipe, is_freezing
from hotglm.model.graphed import verify_graphs

__all__ = ["verify_swappable"]


def verify_swappable(module: nn.Module, *, is_fixed: bool = False) -> None:
    """Refuse a module whose compiled or captured code holds weights, or ignores what the module has.

    Args:
        module: that a slot holds, or is to hold.
        is_fixed: whether its tensors stay where they are.

    Raises:
        UnswappableError: naming every part.
    """
    if not is_fixed:
        verify_uncaptured(module)
    verify_graphs(module)
    problems = [*_find_frozen(module), *_find_late_hooks(module)]
    if problems:
        raise UnswappableError(
            "Expected compiled code that takes its weights and hooks from the module, got some that does not.",
            problems=problems,
            remedy="compile without inductor's freezing; register hooks before the first pass, or call "
            "torch._dynamo.reset() after, or set torch._dynamo.config.skip_nnmodule_hook_guards = False.",
        )


def _find_frozen(module: nn.Module) -> Iterator[Problem]:
    is_on = is_freezing()
    for where, recipe in _find_recipes(module):
        settings: Any = getattr(recipe.context, "compiler_config", None)
        if settings is not None and (is_on or recipe.is_frozen or settings.get("freezing", False)):
            message = f"Expected {shorten_repr(where)} to be compiled without freezing, got constants for weights"
            yield Problem(code="CANNOT_SWAP_FROZEN", message=message)


def _find_recipes(module: nn.Module) -> Iterator[tuple[str, Recipe]]:
    for path, call in find_calls(module):
        yield path or type(module).__name__, call.recipe
    for path, part in module.named_modules():
        for name, value in list(vars(part).items()):
            if hasattr(type(value), "__code__") and (recipe := find_recipe(value)) is not None:  # functions
                yield f"{path}.{name}" if path else name, recipe


def _find_late_hooks(module: nn.Module) -> Iterator[Problem]:
    dynamo = sys.modules.get("torch._dynamo.config")
    if dynamo is None or not getattr(dynamo, "skip_nnmodule_hook_guards", False):
        return
    for path, call in find_calls(module):
        for name in call.new_hooks:
            where = f"{path}.{name}" if path else name
            message = f"Expected the hooks that {shorten_repr(where)} had in the first pass, got a later one"
            yield Problem(code="CANNOT_SWAP_HOOKED", message=message)
