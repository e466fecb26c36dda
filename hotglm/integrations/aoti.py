"""AOTInductor packages in a slot: each generation is a container of the package's code over that generation's weights.

Rules this module keeps:

- A package is code: loading one runs machine code in this process. It is named by the host, never by a release, and
  only its weights are swapped.
- The weights of a generation lie in the slot's arena; its container is told where (`user_managed`) and keeps no copy
  of its own. So passes, sessions, rollback and verification are those of any other model. The container's own double
  buffer is used once, to get rid of the weights that the package was built with.
- Everything that the package computes with is either a weight that was named, or a constant that was never one. A
  package that has put weights into its code is refused (`[Note: inlined weights]`).

[Note: inlined weights]
Unless told otherwise, inductor writes small constants into the code: biases, scales. They are then in no list of the
package's constants, and an update leaves them what they were, without a word: half of the old model in the new one.
That a name is missing is only seen by whoever knows the names, which is why `load_package` asks for the weights of the
model that was exported.

[Note: handles]
A container never gives back the tensors that it was told to use (seen in torch 2.13: they stay after it is gone). So it
is told of tensors that own nothing, and whoever computes keeps the real ones (`_Container`); and a container is made
once for each set of addresses, not for each swap.

[Note: torch's names]
`torch._C._aoti.AOTIModelContainerRunnerCpu` is what `torch._inductor.aoti_load_package` stands on. That one neither
swaps its buffers nor tells shapes. Both names are private; versions of torch without them, or without `user_managed`
(before 2.8), are refused by name.
"""

from __future__ import annotations

import ctypes
import fnmatch
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export._tree_utils import reorder_kwargs
from torch.utils import _pytree as pytree

from hotglm.errors import ArgumentError, Problem, TensorValueError, UnswappableError, shorten_repr
from hotglm.model.derived import refresh
from hotglm.problem import describe_exception

__all__ = ["PackageModule", "load_package"]

_RUNNER = "AOTIModelContainerRunnerCpu"
_MAX_RUNNERS = 8
"""Containers kept for addresses that may come again: those of a slot's arenas, and some to spare."""

_FROZEN = "_frozen_param"
_REBUILD = (
    "build the package with torch._inductor.aoti_compile_and_package(..., "
    'inductor_configs={"always_keep_tensor_constants": True}), without freezing; name what the model does not use in '
    "`unused`."
)


def load_package(
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, torch.Tensor],
    unused: Sequence[str] = (),
    num_runners: int = 1,
) -> PackageModule:
    """Load an AOTInductor package (`.pt2`) as a module that a slot can hold.

    Loading runs the package's machine code: trust its origin as you trust your own code.

    Args:
        path: what `torch._inductor.aoti_compile_and_package` has written, for the CPU.
        weights: the state dict of the model that was exported, by the names it had then; copied. These are the names
            that later versions bring, and the values that are served first.
        unused: patterns (`fnmatch`) of names that the exported graph does not use, and the package therefore lacks,
            such as `*.num_batches_tracked` of a batch norm that does not train.
        num_runners: how many passes may compute at the same time, at least 1; others wait for their turn inside torch.

    Returns:
        The module. `module(*args, **kwargs)` is called as the exported model was.

    Raises:
        UnswappableError: the package has weights in its code, or this torch cannot give it others.
        TensorValueError: `weights` has not the names, shapes and dtypes that the package takes.
        ArgumentError: the file is no such package, or `num_runners` is not positive.
    """
    if num_runners < 1:
        raise ArgumentError(f"Expected at least 1 runner, got {num_runners}.", remedy="pass num_runners=1 or more.")
    code = _PackageCode(os.fspath(path), num_runners=num_runners)
    _verify_weights(code, weights, unused=unused)
    return PackageModule(code, weights)


class _PackageCode:
    """The shared library of a package, unpacked; shared by all generations, and gone with the last of them."""

    __hotglm_slot__ = True  # a copy of a module refers to the same code

    def __init__(self, path: str, *, num_runners: int) -> None:
        self._num_runners = num_runners
        self._runners: dict[tuple[int, ...], Any] = {}
        self._directory = tempfile.mkdtemp(prefix="hotglm-aoti-")
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        try:
            self._library = _unpack(path, self._directory)
            runner = self.start()
            self.names: dict[str, str] = runner.get_constant_names_to_original_fqns()
            self.constants: dict[str, torch.Tensor] = runner.extract_constants_map(False)  # noqa: FBT003 - of the active buffer; takes no names
            self._runner = runner  # its memory is what `constants` are views of, until `keep_only`
            in_spec, out_spec = runner.get_call_spec()
        except (OSError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
            raise ArgumentError(
                f"Expected an AOTInductor package for the CPU at {path!a}, got {describe_exception(error)}.",
                remedy="write it with torch._inductor.aoti_compile_and_package, with this version of torch.",
            ) from error
        self.in_spec, self.out_spec = pytree.treespec_loads(in_spec), pytree.treespec_loads(out_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackageCode:
        """Return itself: code is shared."""
        return self

    def keep_only(self, names: set[str]) -> None:
        """Copy the constants that are no weights, and let go of the container that came with all of them."""
        self.constants = {name: t.clone() for name, t in self.constants.items() if name not in names}
        del self._runner

    def start(self) -> Any:
        """Return a new container of the code, with the weights that the package was built with."""
        kind = getattr(getattr(torch._C, "_aoti", None), _RUNNER, None)
        if kind is None or "user_managed" not in (kind.update_constant_buffer.__doc__ or ""):
            raise UnswappableError(
                f"Expected a torch that can give a package other weights, got {torch.__version__}.",
                remedy="use torch 2.8 or newer.",
            )
        return kind(self._library, self._num_runners)

    def bind(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """Return a container that computes with what lies where `weights` lie, for as long as the caller keeps them.

        Arenas take turns, so the same addresses come again, and so do their containers (`[Note: handles]`).
        """
        key = tuple(tensor.data_ptr() for tensor in weights.values())
        runner = self._runners.pop(key, None)
        if runner is None:
            runner = self._start_over(weights)
        self._runners[key] = runner  # the latest last
        for old in list(self._runners)[:-_MAX_RUNNERS]:
            self._runners.pop(old, None)
        return runner

    def _start_over(self, weights: Mapping[str, torch.Tensor]) -> Any:
        runner = self.start()
        aliases = {name: _alias(tensor) for name, tensor in weights.items()}
        values = {name: aliases.get(full, self.constants.get(full)) for name, full in self.names.items()}
        runner.update_constant_buffer(values, use_inactive=True, validate_full_updates=True, user_managed=True)
        runner.swap_constant_buffer()
        runner.free_inactive_constant_buffer()
        return runner


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory, which does not keep it."""
    if tensor.numel() == 0:
        return tensor
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = (ctypes.c_char * (extent * tensor.element_size())).from_address(tensor.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent)
    return flat.as_strided(tuple(tensor.shape), tensor.stride())


def _unpack(path: str, directory: str) -> str:
    """Copy the package's one shared library into `directory`, under a name of our own; return where."""
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if name.endswith(".so")]
        if len(found) != 1:
            raise ValueError(f"{len(found)} shared libraries in it")
        target = os.path.join(directory, "package.so")
        with archive.open(found[0]) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    return target


class _Container:
    """The container of one generation, and the weights it computes with; a copy of it is none yet."""

    __hotglm_slot__ = True  # not looked into by whoever copies the module: `PackageModule` makes a new one

    __slots__ = ("__weakref__", "_runner", "_weights")

    def __init__(self, code: _PackageCode, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = tuple(weights.values())  # their memory must outlive the container
        self._runner = code.bind(weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return nothing: a copy of the module has weights of its own, and binds itself to them in its first pass."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one pass."""
        found: list[torch.Tensor] = self._runner.run(list(inputs))
        return found


class _Names(nn.Module):
    """A part of the names of a package's weights."""


class PackageModule(nn.Module):
    """An AOTInductor package as a module: its weights are parameters, its code is the package's.

    Made by `load_package`. Inference only: outputs have no gradient.
    """

    def __init__(self, code: _PackageCode, weights: Mapping[str, torch.Tensor]) -> None:
        """Register `weights`, and bind the code to them."""
        super().__init__()
        self._code = code
        tied: dict[object, nn.Parameter] = {}
        for name, tensor in weights.items():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
            parameter = tied.setdefault(key, nn.Parameter(tensor.detach().clone(), requires_grad=False))
            _register(self, name, parameter)
        code.keep_only(set(weights))
        self._container: _Container | None = None
        self._bind()

    @refresh("_container")
    def _refresh_container(self) -> None:
        """Compute with this generation's own weights from now on."""
        self._bind()

    def _bind(self) -> _Container:
        container = _Container(self._code, dict(self.named_parameters(remove_duplicate=False)))
        self._container = container
        return container

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass, with the arguments and outputs of the model that was exported."""
        container = self._container or self._bind()  # none: a copy that was not made by a slot
        ordered = reorder_kwargs(kwargs, self._code.in_spec)
        inputs = [leaf for leaf in pytree.tree_leaves((args, ordered)) if isinstance(leaf, torch.Tensor)]
        return pytree.tree_unflatten(container.run(inputs), self._code.out_spec)


def _register(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner = root
    *path, leaf = name.split(".")
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, _Names())
        owner = owner.get_submodule(part)
    owner.register_parameter(leaf, parameter)


def _verify_weights(code: _PackageCode, weights: Mapping[str, torch.Tensor], *, unused: Sequence[str]) -> None:
    """Refuse a package with weights in its code, and weights that are not the package's.

    Raises:
        UnswappableError: naming the weights that are not among the package's constants.
        TensorValueError: naming those of another shape, dtype or layout.
    """
    present = {weights[name].data_ptr() for name in code.constants if name in weights}
    missing = [name for name, tensor in weights.items() if name not in code.constants]
    missing = [name for name in missing if not weights[name].numel() or weights[name].data_ptr() not in present]
    missing = [name for name in missing if not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)]
    frozen = [name for name in code.constants if name.startswith(_FROZEN)]
    if missing or frozen:
        gone = "Expected it among the package's constants, got none: it is written into the code, or not used"
        held = "Expected a weight under its own name, got one that freezing has made"
        raise UnswappableError(
            "Expected a package that takes all of its weights from outside.",
            problems=[
                *(Problem(code="CANNOT_SWAP_INLINED", message=gone, tensor=name) for name in missing),
                *(Problem(code="CANNOT_SWAP_FROZEN", message=held, tensor=name) for name in frozen),
            ],
            remedy=_REBUILD,
        )
    problems = []
    for name, constant in code.constants.items():
        tensor = weights.get(name)
        if tensor is not None and _describe(tensor) != _describe(constant):
            message = f"Expected {_describe(constant)}, got {shorten_repr(_describe(tensor))}"
            problems.append(Problem(code="BAD_TENSOR", message=message, tensor=name))
    if problems:
        raise TensorValueError(
            "Expected the weights of the model that was exported.",
            problems=problems,
            remedy="pass the state dict of that model.",
        )


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
