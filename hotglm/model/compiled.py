"""Compiled modules: what `torch.compile` made is bound anew to each generation, so that all of them share its code.

Rules this module keeps:

- torch is asked, never patched. What is looked up inside it (the context of a compiled function) is looked for by
  name, and what is not found there is refused by name, never guessed.
- A compiled call knows its module weakly. The one that `nn.Module.compile` makes is a circle (module, call, bound
  method, module), and a circle would keep a generation's memory until the garbage collector comes by.
- Dynamo is imported by whoever compiles something; nothing here imports it.

[Note: one context, many modules]
Dynamo keys compiled code by code object, and the entries of a code object by guards and by the backend. The weights are
inputs of that code, guarded by what they are like (shape, dtype, requires_grad), not by who they are. So the same
context applied to another module of the same structure finds the entries that are there and compiles nothing
(tests/test_compiled_swaps.py counts). `torch.compile(module)` and `module.compile()` find the same entries, but for
torch's own containers (`nn.Sequential`), whose `forward` torch only compiles from inside a frame of its own; that is
why a part is bound the way it was compiled (`Recipe.is_wrapped`).
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, ClassVar, Protocol, TypeGuard

from torch import nn

from hotglm.errors import Problem, UnswappableError, shorten_repr
from hotglm.model.grad_mode import GradMode

__all__ = [
    "COMPILED_CALL",
    "Bindable",
    "CompiledCall",
    "Recipe",
    "adopt_compiled",
    "bind",
    "bind_twins",
    "compile_as",
    "find_calls",
    "find_modes",
    "find_recipe",
    "is_compiled",
    "is_freezing",
    "is_optimized",
    "rebind",
    "settle",
    "unwrap",
]

COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that `nn.Module.compile` sets and every call of the module looks at."""


class Recipe:
    """How something was compiled: torch's context, and the call that it makes for any module of one class."""

    __slots__ = ("_calls", "_frozen_in", "context", "is_wrapped", "modes")

    def __init__(self, context: Callable[[Any], Any], *, is_wrapped: bool) -> None:
        """Note the context, and whether torch compiled from inside a frame of its own."""
        self.context = context
        self.is_wrapped = is_wrapped
        self.modes: set[GradMode] = set()  # in which passes have had something compiled
        self._calls: dict[object, Callable[..., Any]] = {}
        self._frozen_in: int | None = None

    def note_compiling(self) -> None:
        """Note in which modes a pass has something compiled, in the thread that compiles."""
        self.modes.add(GradMode.current())
        if is_freezing():
            self._frozen_in = CompiledCall.epoch

    @property
    def is_frozen(self) -> bool:
        """Whether a pass has had something compiled under inductor's freezing that Dynamo has not forgotten since."""
        return self._frozen_in == CompiledCall.epoch

    def call_of(self, cls: type[nn.Module]) -> Callable[..., Any]:
        """Return the compiled call of modules of `cls`: a function of the module and its inputs."""
        plain = cls._call_impl
        known = self._calls.get(plain)
        if known is None:
            wrapped = _external("wrap_inline")(plain) if self.is_wrapped else plain
            known = self._calls[plain] = self.context(wrapped)
        return known


class Bindable(Protocol):
    """A call of one module, in the place of its compiled call, that can be made for another module as well."""

    def bind_to(self, module: nn.Module) -> Bindable:
        """Return a call of the same kind for `module`."""
        ...


class CompiledCall:
    """The compiled call of one module, put where `nn.Module.compile` puts its own.

    Attributes:
        recipe: how it was compiled.
        num_compiled: how often a pass through it had to compile something, since that was last set to 0.
        num_captured: how often torch recorded a device graph in one, likewise.
        hooks: the hooks below its module when the first pass came; None before.
    """

    __slots__ = ("_call", "_epoch", "_module", "hooks", "num_captured", "num_compiled", "recipe")
    epoch: ClassVar[int] = 0
    """Grows whenever Dynamo has forgotten all compiled code."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        """Bind `recipe` to `module`, weakly."""
        self.recipe = recipe
        self.num_compiled = 0
        self.num_captured = 0
        self.hooks: frozenset[object] | None = None
        self._epoch = 0
        self._module = weakref.ref(module)
        self._call = recipe.call_of(type(module))

    def bind_to(self, module: nn.Module) -> CompiledCall:
        """Return the call of another module, compiled as this one is."""
        return CompiledCall(module, self.recipe)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run one pass.

        Raises:
            ReferenceError: the module is gone, and only this was kept of it.
        """
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this compiled call is gone; keep the module, not its call")
        if self.hooks is None:
            self._epoch, self.hooks = CompiledCall.epoch, frozenset(find_hooks(module))
        return self._call(module, *args, **kwargs)

    @property
    def new_hooks(self) -> tuple[str, ...]:
        """Names of the parts below the module that got a hook after the first pass, which Dynamo may not see."""
        module = self._module()
        if module is None or self.hooks is None or self._epoch != CompiledCall.epoch:
            return ()
        return tuple(dict.fromkeys(path for path, *rest in find_hooks(module) if (path, *rest) not in self.hooks))


def is_freezing() -> bool:
    """Whether inductor would make constants of the weights of what the calling thread compiles now."""
    return bool(getattr(sys.modules.get("torch._inductor.config"), "freezing", False))


def find_hooks(module: nn.Module) -> Iterator[tuple[str, str, int, int]]:
    """Yield path, kind, key and identity of every hook of a pass on the parts below `module`, itself left out.

    Hooks of the compiled module itself run outside of the compiled code, or are guarded.
    """
    for path, part in module.named_modules():
        if not path:
            continue
        for kind in _PASS_HOOKS:
            for key, hook in list(vars(part).get(kind, {}).items()):
                yield path, kind, key, id(hook)


_PASS_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_optimized(module: object) -> bool:
    """Whether `module` is what `torch.compile(module)` returns."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def find_recipe(compiled: object) -> Recipe | None:
    """Return how `compiled` (a compiled function or call, or an optimized module) was made; None if torch did not."""
    if isinstance(compiled, CompiledCall):
        return compiled.recipe
    if is_optimized(compiled):
        original = getattr(vars(compiled).get("forward"), "_torchdynamo_orig_callable", None)
        return _recipe(compiled.dynamo_ctx, original)  # type: ignore[attr-defined]
    original = getattr(compiled, "_torchdynamo_orig_callable", None)
    return None if original is None else _recipe(_find_context(compiled), original)


def _recipe(context: object, original: object) -> Recipe | None:
    if not callable(context):
        return None
    wrapped = _external("wrap_inline")
    is_wrapped = getattr(original, "__code__", None) is wrapped(len).__code__
    return Recipe(context, is_wrapped=is_wrapped)


def _external(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(sys.modules["torch._dynamo.external_utils"], name)
    return found


def _find_context(compiled: Any) -> object:
    """Return the context that made a compiled function: the `self` that its code refers to."""
    code, cells = getattr(compiled, "__code__", None), getattr(compiled, "__closure__", None) or ()
    names = code.co_freevars if code is not None else ()
    found = dict(zip(names, cells, strict=True)).get("self")
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    kind = getattr(dynamo, "_TorchDynamoContext", None)
    context = None if found is None else found.cell_contents
    return context if kind is not None and isinstance(context, kind) else None


def bind(compiled: object, module: nn.Module) -> Bindable | None:
    """Return the call of `module` that is made as `compiled` is; None if that was made by neither torch nor hotglm."""
    if _is_bindable(compiled):
        return compiled.bind_to(module)
    recipe = find_recipe(compiled)
    return None if recipe is None else CompiledCall(module, recipe)


def _is_bindable(compiled: object) -> TypeGuard[Bindable]:
    """Whether `compiled` is a call of hotglm's own; asks its class, because an optimized module answers for a model."""
    return hasattr(type(compiled), "bind_to") and not isinstance(compiled, nn.Module)


def bind_twins(modules: Sequence[tuple[str, nn.Module]], memo: Mapping[int, Any]) -> Iterator[str]:
    """Compile every twin as its module is compiled; yield the paths of those whose call torch has not made.

    Args:
        modules: paths and modules, compiled or not.
        memo: the twin of each by its id, as `copy.deepcopy` keeps them.
    """
    for path, module in modules:
        compiled, twin = vars(module).get(COMPILED_CALL), memo.get(id(module))
        if compiled is None or twin is None or twin is module:
            continue
        call = vars(twin)[COMPILED_CALL] = bind(compiled, twin)
        if call is None:
            yield path


def rebind(function: object, find_twin: Callable[[object], object]) -> object | None:
    """Return a compiled bound method for the twin of the module it is bound to; None if `function` is no such thing.

    Args:
        function: anything that a module keeps.
        find_twin: returns the twin of a part, or None for what is no part.
    """
    original = getattr(function, "_torchdynamo_orig_callable", None)
    if not inspect.isfunction(function) or not isinstance(original, MethodType):
        return None
    twin, context = find_twin(original.__self__), _find_context(function)
    if twin is None or not callable(context):
        return None
    bound: object = context(MethodType(original.__func__, twin))
    return bound


def find_calls(module: nn.Module) -> Iterator[tuple[str, CompiledCall]]:
    """Yield path and call of every part of `module` that was compiled and bound here, by graphs or not."""
    for path, part in module.named_modules():
        call = vars(part).get(COMPILED_CALL)
        call = getattr(call, "inner", call)
        if isinstance(call, CompiledCall):
            yield path, call


def is_compiled(module: nn.Module) -> bool:
    """Whether any part of `module` is compiled and bound here."""
    return next(find_calls(module), None) is not None


def find_modes(module: nn.Module) -> tuple[GradMode, ...]:
    """Return the modes in which passes through `module`, and those it was copied from, had something compiled."""
    found = {mode for _, call in find_calls(module) for mode in call.recipe.modes}
    return tuple(sorted(found, key=repr))


def compile_as(module: nn.Module, recipe: Recipe) -> None:
    """Compile `module` in place, by `recipe`."""
    vars(module)[COMPILED_CALL] = CompiledCall(module, recipe)


def adopt_compiled(module: nn.Module, live: nn.Module) -> None:
    """Compile every part as the live part of that name is compiled, unless it is compiled in its own way already."""
    calls = {path: call for path, part in live.named_modules() if (call := vars(part).get(COMPILED_CALL)) is not None}
    for path, part in module.named_modules() if calls else ():
        own = vars(part).get(COMPILED_CALL)
        is_bare = isinstance(own, CompiledCall) and not isinstance(calls.get(path), CompiledCall)  # without its graphs
        if path in calls and (own is None or is_bare) and (bound := bind(calls[path], part)) is not None:
            vars(part)[COMPILED_CALL] = bound


def settle(module: nn.Module) -> nn.Module:
    """Return a module that a slot takes over, with everything that is compiled in it bound weakly.

    What `torch.compile(part)` returned is replaced by the part itself, compiled in place: names of tensors are then
    those of the model (no `_orig_mod.`), and the code that was compiled before is found again.

    Raises:
        UnswappableError: something compiled calls another module than the one it stands for; everything is named.
    """
    if not isinstance(module, nn.Module):
        return module
    problems = list(_find_misbound(module))
    if problems:
        raise UnswappableError(
            "Expected compiled parts that call the module they stand for.",
            problems=problems,
            remedy="compile the module that is to be served again: torch.compile(module), or module.compile(); "
            "to change the weights, update the slot.",
        )
    root = _take_out(module)
    for part in list(root.modules()):
        for name, child in list(part._modules.items()):
            if is_optimized(child):
                part._modules[name] = _take_out(child)
    for part in root.modules():
        compiled = vars(part).get(COMPILED_CALL)
        if compiled is not None and not _is_bindable(compiled):
            vars(part)[COMPILED_CALL] = bind(compiled, part)
    return root


def unwrap(module: Any) -> nn.Module:
    """Return what stands behind an optimized module, as it is; another module is returned itself."""
    while is_optimized(module):
        module = module._orig_mod
    found: nn.Module = module
    return found


def _take_out(module: Any) -> nn.Module:
    """Return what stands behind an optimized module, compiled in place as that was."""
    while is_optimized(module):
        part = module._orig_mod
        if not is_optimized(part):
            vars(part)[COMPILED_CALL] = bind(module, part)
        module = part
    found: nn.Module = module
    return found


def _find_misbound(root: nn.Module) -> Iterator[Problem]:
    for path, part in _walk(root):
        where = shorten_repr(path or type(part).__name__)
        if is_optimized(part):
            called = _find_module_behind(vars(part).get("forward"))
            if called is not part._orig_mod:
                yield _problem(f"Expected the compiled call at {where} to be of its `_orig_mod`, got one of another")
        compiled = vars(part).get(COMPILED_CALL)
        if compiled is not None and not _is_bindable(compiled):
            if find_recipe(compiled) is None:
                yield _problem(f"Expected a call made by torch.compile at {where}, got {shorten_repr(compiled)}")
            elif _find_module_behind(compiled) is not part:
                yield _problem(f"Expected the compiled call at {where} to be its own, got that of another module")


def _problem(message: str) -> Problem:
    return Problem(code="CANNOT_SWAP_COMPILED", message=message)


def _find_module_behind(compiled: object) -> object:
    """Return the module whose `__call__` or `_call_impl` a compiled function was made from."""
    original = getattr(compiled, "_torchdynamo_orig_callable", None)
    if isinstance(original, MethodType):
        return original.__self__
    inner = getattr(original, "__wrapped__", None)  # torch's own frame around a module
    return inner.__self__ if isinstance(inner, MethodType) else inner


def _walk(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every part once, those behind optimized modules included; refuse a part that contains itself.

    Raises:
        UnswappableError: an optimized module stands inside the module that it was made from.
    """
    for path, part in root.named_modules():
        yield path, part
        if is_optimized(part):
            inside = [name for name, below in part._orig_mod.named_modules() if below is part]
            if inside:
                raise UnswappableError(
                    f"Expected no compiled module inside the module that it was made from, got one at "
                    f"{shorten_repr(inside[0])}.",
                    remedy="compile in place instead: module.compile().",
                )
