"""The proofs that a staged generation has to give before it may be committed.

Rules this module keeps:

- A check passes only if it says so: one that raises, answers something else than None or True, or does not end in time
  has failed.
- Every check runs, and all failures of one kind of check are named at once.
- Passes run in the grad mode of the caller of `stage`, because that is the mode the service runs in, and because caches
  and compiled code are keyed by it. Where code is compiled, the modes are known in which the service's own passes had
  it compiled; warm-up then runs in those instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hotglm import seam
from hotglm.contract import Contract
from hotglm.errors import ArgumentError, CallableCheckError, GoldenMismatchError, Problem, WarmUpError, shorten_repr
from hotglm.model.compiled import find_modes
from hotglm.model.grad_mode import GradMode
from hotglm.model.recording import call_with
from hotglm.model.wrappers import find_memory
from hotglm.output_spec import OutputSpec
from hotglm.problem import describe_exception
from hotglm.quantity import is_count, is_limit
from hotglm.verdict import Finding
from hotglm.weights.digest import tensor_bytes
from hotglm.weights.yielding import Yielding

__all__ = ["COMPILES_LATER", "Golden", "Inputs", "StagePolicy", "find_differences", "promise_outputs", "run_checks"]

Inputs = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Arguments of one pass: one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """Inputs and the outputs that a version must give for them.

    Attributes:
        inputs: arguments of the pass.
        outputs: a tensor, or a tuple, list, mapping or dataclass-like output of tensors, compared part by part.
        rtol: relative tolerance, 0 or more.
        atol: absolute tolerance, 0 or more; with both 0 the outputs must be equal bit for bit (NaN equals NaN).
        name: what to call it in an error.
    """

    inputs: Inputs
    outputs: Any
    rtol: float = 1e-5
    atol: float = 1e-6
    name: str = "golden"

    def __post_init__(self) -> None:
        """Refuse tolerances that cannot be meant.

        Raises:
            ArgumentError: one is negative or NaN.
        """
        if not (self.rtol >= 0 and self.atol >= 0):
            raise ArgumentError(
                f"Expected tolerances of 0 or more, got rtol={self.rtol}, atol={self.atol}.",
                remedy="use 0 for both to compare bit for bit.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePolicy:
    """How a version is staged and what it must prove.

    Attributes:
        finite: refuse NaN and infinity in the weights.
        digest: hash every tensor while it is loaded; without, receipts carry no digests and unversioned sources need
            an explicit version.
        warm_up: inputs to run once in the spare.
        goldens: outputs to compare; their layout is what the version promises, and is compared by the verdict.
        checks: callables that get the staged module and return None or True when it is good.
        reuse: copy what the live version has by the digests that a source promises, held against a fingerprint of it,
            and read the rest; without, every byte of a full source is read and hashed.
        convert_dtypes: convert floating-point tensors to the module's dtype instead of refusing them.
        num_threads: threads that read and hash; None means all cores but one, at least 1, at most 4, and 1 with a pace.
        nice: how much the threads that read, copy and hash lower their priority, 0 to 19; 0 leaves it alone.
        max_bytes_per_s: most bytes that a load moves in a second, to leave memory bus and copy engines to the service;
            None means all that is there.
        pace: `Yielding()` to leave the service alone: work in pieces, in a share of the time that shrinks when somebody
            else wants the machine; see docs/quiet-loading.md. None means to take what is there at low priority.
        timeout_s: give up a stage after this time, in seconds; None means never.
    """

    finite: bool = True
    digest: bool = True
    warm_up: tuple[Inputs, ...] = ()
    goldens: tuple[Golden, ...] = ()
    checks: tuple[Callable[[nn.Module], object], ...] = ()
    reuse: bool = True
    convert_dtypes: bool = False
    num_threads: int | None = None
    nice: int = 10
    max_bytes_per_s: float | None = None
    pace: Yielding | None = None
    timeout_s: float | None = field(default=None)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ArgumentError: naming the fields.
        """
        for name in ("warm_up", "goldens", "checks"):
            value = getattr(self, name)
            if isinstance(value, (list, Iterator)):  # an iterator would be used up by its first reader
                object.__setattr__(self, name, tuple(value))
        wrong = [
            *(["num_threads"] if self.num_threads is not None and not is_count(self.num_threads) else []),
            *(["nice"] if not (is_count(self.nice, least=0) and self.nice <= 19) else []),
            *(["max_bytes_per_s"] if not is_limit(self.max_bytes_per_s) else []),
            *(["pace"] if self.pace is not None and not isinstance(self.pace, Yielding) else []),
            *(["timeout_s"] if not is_limit(self.timeout_s) else []),
            *(["checks"] if not _is_tuple_of(self.checks, callable) else []),
            *(["goldens"] if not _is_tuple_of(self.goldens, lambda item: isinstance(item, Golden)) else []),
            *(["warm_up"] if not isinstance(self.warm_up, tuple) else []),
        ]
        if wrong:
            raise ArgumentError(
                f"Expected a stage policy that can be meant, got bad {', '.join(wrong)}.",
                remedy="see StagePolicy: warm_up and checks are tuples, nice is 0 to 19, the rest is positive.",
            )


COMPILES_LATER = Finding(
    code="COMPILES_LATER",
    message="New code is compiled like the code that serves, and there are no inputs to compile it with in staging; "
    "the first pass will compile it",
    refuses=False,
    remedy="pass StagePolicy(warm_up=(inputs,)) with inputs like those of the service, or goldens.",
)


def _is_tuple_of(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and all(test(item) for item in value)


def promise_outputs(contract: Contract, policy: StagePolicy, *, live: Contract | None) -> Contract:
    """Return the contract of code that must give the golden outputs of `policy`; known before anything is read (P7).

    Args:
        contract: what the code promises otherwise.
        policy: whose golden outputs it must give.
        live: contract of the live version, where that has the same code: what it gives back was promised already, and
            golden outputs of other shapes then mean that shapes follow the values. None for other code.
    """
    promised = OutputSpec.of((golden.inputs, golden.outputs) for golden in policy.goldens)
    known = None if live is None else live.outputs
    return replace(contract, outputs=known if promised is None else promised.joined(known))


def run_checks(module: nn.Module, *, policy: StagePolicy, mode: GradMode) -> tuple[str, ...]:
    """Warm `module` up, compare golden outputs and ask the user's checks; return what was proved, in words.

    Raises:
        WarmUpError: a warm-up pass raised.
        GoldenMismatchError: outputs differ.
        CallableCheckError: a check raised, or did not answer None or True.
    """
    if policy.warm_up or policy.goldens or policy.checks:
        with _unchanged(module):
            for passes in find_modes(module) or (mode,):
                with passes.applied():
                    _run_warm_up(module, policy.warm_up)
            with mode.applied():
                _compare_goldens(module, policy.goldens)
            _ask(module, policy.checks)
    return (
        *(
            [f"{len(policy.warm_up)} warm-up {'pass' if len(policy.warm_up) == 1 else 'passes'}"]
            if policy.warm_up
            else []
        ),
        *(f"golden {golden.name!r}" for golden in policy.goldens),
        *(f"check {_name(check)}" for check in policy.checks),
    )


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Undo what passes in the body do to buffers (running statistics), and refuse a body that writes parameters.

    What goes live must be what was loaded and hashed: a cold load has run no pass (P12).

    Raises:
        CallableCheckError: the body wrote parameters.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        buffers = list(_find_buffers(module))
        values = [(tensor, tensor.clone()) for _, _, buffer in buffers for tensor in find_memory(buffer)]
    versions = {name: (parameter, _read_versions(parameter)) for name, parameter in module.named_parameters()}
    yield
    # All of them: batch norm writes its statistics without counting a change.
    with torch.inference_mode(mode=False), torch.no_grad():
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for tensor, value in values:
            tensor.copy_(value)
    now = dict(module.named_parameters())
    changed = [name for name, (p, before) in versions.items() if now.get(name) is not p or _read_versions(p) != before]
    if changed:
        raise CallableCheckError(
            "Expected checks that only look, got some that wrote weights.",
            problems=[Problem(code="GATE_FAILED", message="A check or pass wrote it", tensor=name) for name in changed],
            remedy="run the check on a copy (copy.deepcopy(module)), or make it stop training what it is given.",
        )


def _read_versions(parameter: torch.Tensor) -> list[int]:
    return [tensor._version for tensor in find_memory(parameter)]


def _find_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield owner, name, buffer


def _run_warm_up(module: nn.Module, warm_up: tuple[Inputs, ...]) -> None:
    for index, inputs in enumerate(warm_up):
        try:
            seam.active.reach("warm_up")
            call_with(module, inputs)
        except Exception as error:
            raise WarmUpError(
                f"Expected warm-up pass {index} to run, got {describe_exception(error)}.",
                remedy="run the new version on the same inputs by hand; its code or config does not take them.",
            ) from error


def _compare_goldens(module: nn.Module, goldens: tuple[Golden, ...]) -> None:
    problems: list[Problem] = []
    for golden in goldens:
        try:
            found = call_with(module, golden.inputs)
        except Exception as error:  # noqa: BLE001 - the model's code may raise anything
            message = f"{golden.name}: expected an output, got {describe_exception(error)}"
            problems.append(Problem(code="GOLDEN_MISMATCH", message=message))
            continue
        for where, message in find_differences(golden.outputs, found, golden):
            problems.append(Problem(code="GOLDEN_MISMATCH", message=f"{golden.name}{where}: {message}"))
    if problems:
        raise GoldenMismatchError(
            "Expected the golden outputs, got others.",
            problems=problems,
            remedy="if the new outputs are right, record new golden outputs; else fix the release.",
        )


def find_differences(expected: Any, found: Any, golden: Golden, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield where `found` differs from `expected` by more than the tolerances of `golden`, and how."""
    if isinstance(expected, torch.Tensor):
        if message := _describe_difference(expected, found, golden):
            yield where, message
    elif isinstance(expected, Mapping):
        yield from _find_in_mapping(expected, found, golden, where)
    elif isinstance(expected, (tuple, list)):
        yield from _find_in_sequence(expected, found, golden, where)
    elif dataclasses.is_dataclass(expected) and type(found) is type(expected):
        for part in dataclasses.fields(expected):
            one, other = getattr(expected, part.name), getattr(found, part.name)
            yield from find_differences(one, other, golden, f"{where}.{part.name}")
    elif _is_array(expected) and _is_array(found):
        yield from _find_in_arrays(expected, found, golden, where)
    elif _is_opaque(expected) and type(found) is type(expected) and where.count(".") < _MAX_OBJECT_DEPTH:
        yield from _find_in_object(expected, found, golden, where)
    elif not _is_equal(expected, found, golden):
        yield where, f"expected {shorten_repr(expected)}, got {shorten_repr(found)}"


_MAX_OBJECT_DEPTH = 16
"""How many objects deep attributes are compared; what lies deeper, as in a circle, must be one and the same."""


def _is_array(value: Any) -> bool:
    return isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype")


def _is_opaque(value: object) -> bool:
    """Tell whether two of these are equal only if they are one: such as a cache of `transformers`."""
    return type(value).__eq__ is object.__eq__ and hasattr(value, "__dict__") and not callable(value)


def _find_in_arrays(expected: Any, found: Any, golden: Golden, where: str) -> Iterator[tuple[str, str]]:
    try:
        one, other = torch.as_tensor(expected), torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):  # text and objects; numbers that torch does not have
        if expected.shape != found.shape or not _is_equal(expected, found, golden):
            yield where, f"expected {shorten_repr(expected)}, got {shorten_repr(found)}"
    else:
        yield from find_differences(one, other, golden, where)


def _find_in_object(expected: object, found: object, golden: Golden, where: str) -> Iterator[tuple[str, str]]:
    ours, theirs = vars(expected), vars(found)
    if ours.keys() != theirs.keys():
        yield where, f"expected the attributes {sorted(ours)}, got {sorted(theirs)}"
    for name in ours.keys() & theirs.keys() if expected is not found else ():
        yield from find_differences(ours[name], theirs[name], golden, f"{where}.{name}")


def _is_equal(expected: object, found: object, golden: Golden) -> bool:
    if type(expected) is type(found) is float:
        both_nan = math.isnan(expected) and math.isnan(found)
        return both_nan or math.isclose(expected, found, rel_tol=golden.rtol, abs_tol=golden.atol)
    try:
        equal: Any = expected == found
        return bool(equal.all() if _is_array(equal) else equal)
    except Exception:  # noqa: BLE001 - the model's own types may raise anything; what cannot be compared differs
        return False


def _find_in_mapping(expected: Mapping[Any, Any], found: Any, golden: Golden, where: str) -> Iterator[tuple[str, str]]:
    keys = set(found) if isinstance(found, Mapping) else set()
    if set(expected) != keys:
        yield where, f"expected the keys {sorted(map(str, expected))}, got {sorted(map(str, keys))}"
    for key in [key for key in expected if key in keys]:
        yield from find_differences(expected[key], found[key], golden, f"{where}[{key!r}]")


def _find_in_sequence(
    expected: tuple[Any, ...] | list[Any], found: Any, golden: Golden, where: str
) -> Iterator[tuple[str, str]]:
    if not isinstance(found, (tuple, list)) or len(found) != len(expected):
        yield where, f"expected {len(expected)} outputs, got {shorten_repr(type(found).__name__)}"
        return
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        yield from find_differences(one, other, golden, f"{where}[{index}]")


def _describe_difference(expected: torch.Tensor, found: object, golden: Golden) -> str | None:
    if not isinstance(found, torch.Tensor):
        return f"expected a tensor, got {type(found).__name__}"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return (
            f"expected {expected.dtype} of shape {list(expected.shape)}, got {found.dtype} of shape {list(found.shape)}"
        )
    if _same_bits(expected, found):  # what is compared is mostly equal, and the words below cost a millisecond
        return None
    try:
        torch.testing.assert_close(
            found.detach(), expected, rtol=golden.rtol, atol=golden.atol, equal_nan=True, check_stride=False
        )
    except AssertionError as difference:
        traceback.clear_frames(difference.__traceback__)  # they refer to each other in a circle, and to the outputs
        return " ".join(str(difference).split())
    if golden.rtol == golden.atol == 0 and _signs_differ(expected, found):
        return "expected equal bits, got a zero of the other sign"
    return None


def _same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    plain = expected.device == found.device and expected.layout is found.layout is torch.strided
    return plain and torch.equal(tensor_bytes(expected), tensor_bytes(found))


def _signs_differ(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if not expected.is_floating_point():
        return False
    return bool(((torch.signbit(found) != torch.signbit(expected)) & ~torch.isnan(expected)).any())


def _ask(module: nn.Module, checks: tuple[Callable[[nn.Module], object], ...]) -> None:
    problems: list[Problem] = []
    cause: Exception | None = None
    for check in checks:
        try:
            answer = check(module)
        except Exception as error:  # noqa: BLE001 - a check that raises has failed, whatever it raises
            cause = cause or error
            message = f"{_name(check)} raised {describe_exception(error)}"
            problems.append(Problem(code="GATE_FAILED", message=message))
            continue
        if answer is not None and answer is not True:
            message = f"Expected None or True from {_name(check)}, got {shorten_repr(answer)}"
            problems.append(Problem(code="GATE_FAILED", message=message))
    if problems:
        raise CallableCheckError(
            "Expected every check to pass.", problems=problems, remedy="look at what the named checks measured."
        ) from cause


def _name(check: Callable[..., object]) -> str:
    return str(getattr(check, "__qualname__", None) or shorten_repr(check))
