"""Texts of exceptions that others raised: they may quote a file, and reach no log line or terminal raw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import hotglm
from hotglm.model import registry
from hotglm.problem import describe_exception
from support.swaps import build

FORGED = "x\n2026-01-01 INFO hotglm: committed 9.9.9\x1b[2J\u202e\u2028"
X = torch.ones(1, 2)


@given(st.text(max_size=2000), st.integers(20, 500))
def test_a_description_is_one_short_line_of_plain_ascii(text: str, limit: int) -> None:
    """Whatever an exception says, its description is printable ASCII and about as long as asked for."""
    shown = describe_exception(ValueError(text), limit=limit)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= limit + 3


def test_a_description_is_readable() -> None:
    """Plain text stays as it is, without quotes; an empty text leaves the type alone."""
    assert describe_exception(KeyError("a 'b' \\ c")) == "KeyError: \"a 'b' \\\\ c\""
    assert describe_exception(TypeError('it\'s no "x" \\ y')) == 'TypeError: it\'s no "x" \\ y'
    assert describe_exception(MemoryError()) == "MemoryError"
    assert describe_exception(type("Bad\n", (Exception,), {})("t")) == "Bad\\n: t"


def test_an_exception_whose_text_raises_is_described() -> None:
    """Asking for the text of a foreign exception may raise anything; describing it does not."""

    class NastyError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe_exception(NastyError()) == "NastyError: (its text cannot be had)"


def is_clean(text: str) -> bool:
    return text.replace("\n  - ", "").replace("\nVersion 1.0.0 still", "").replace("\nRemedy: ", "").isprintable()


def verify_nothing_raw(slot: hotglm.ModuleSlot, update: Callable[[], object], *, code: str) -> None:
    """See that the refusal says `x` escaped in its text, its event and the status, and that what was live serves."""
    before = slot(X)
    events: list[hotglm.Event] = []
    slot.subscribe(events.append)
    with pytest.raises(hotglm.HotglmError) as caught:
        update()
    assert caught.value.code == code
    texts = [str(caught.value), *(event.message for event in events if hasattr(event, "message"))]
    texts.append(slot.status().last_refusal)
    assert len(texts) == 3
    for text in texts:
        assert is_clean(text), text
        assert "x\\n2026" in text
    assert is_clean(str(slot.status()).replace("\n", ""))
    assert torch.equal(slot(X), before)
    assert slot.live.number == 1


@dataclass
class Config:
    width: int = 2


class Configured(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear = nn.Linear(2, config.width)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_definitions", {})


@pytest.mark.usefixtures("own_registry")
def test_a_config_key_forges_no_log_line(tmp_path: Any) -> None:
    """A key that the config's class does not take is quoted by Python raw, and by us escaped."""
    hotglm.versioned("forged", "1.0.0", config=Config)(Configured)
    slot = hotglm.ModuleSlot(Configured(Config()), name="forged")
    hotglm.versioned("forged", "1.0.1", config=Config)(type("Next", (Configured,), {}))
    path = tmp_path / "w.safetensors"
    hotglm.save_weights(Configured(Config()), path, version="1.0.1", config={FORGED: 1})
    verify_nothing_raw(slot, lambda: slot.update(path), code="BAD_DEFINITION")


class Raising(nn.Module):
    """Raises in a pass, or its refresh, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.fails = False

    def forward(self, x: torch.Tensor) -> Any:
        if self.fails:
            raise ValueError(FORGED)
        return self.linear(x)


def fail(module: nn.Module) -> None:
    raise ValueError(FORGED)


def make_fail(module: nn.Module) -> None:
    module.fails = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("options", "policy", "code"),
    [
        ({}, {"checks": (fail,)}, "GATE_FAILED"),
        ({"refresh": make_fail}, {"warm_up": (X,)}, "WARM_UP_FAILED"),
        ({"refresh": make_fail}, {"goldens": (hotglm.Golden(inputs=X, outputs=X),)}, "GOLDEN_MISMATCH"),
        ({"refresh": fail}, {}, "REFRESH_FAILED"),
    ],
    ids=["check", "warm-up", "golden", "refresh"],
)
def test_code_that_raises_forges_no_log_line(options: Mapping[str, Any], policy: Mapping[str, Any], code: str) -> None:
    """What a check, a pass or a refresh raises is quoted escaped."""
    maker = build(Raising)
    slot = hotglm.ModuleSlot(maker(1), name="raising", version="1.0.0", policy=hotglm.StagePolicy(**policy), **options)
    verify_nothing_raw(slot, lambda: slot.update(maker(2).state_dict(), version="1.0.1"), code=code)


class Refreshing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    @hotglm.refresh("table")
    def remake(self) -> None:
        raise ValueError(FORGED)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


def test_a_refresh_method_forges_no_log_line() -> None:
    """What a refresh method raises is quoted escaped."""
    maker = build(Refreshing)
    slot = hotglm.ModuleSlot(maker(1), name="refreshing", version="1.0.0")
    verify_nothing_raw(slot, lambda: slot.update(maker(2).state_dict(), version="1.0.1"), code="REFRESH_FAILED")


def test_what_ends_a_stage_unforeseen_forges_no_log_line() -> None:
    """An error that no part of a stage expects is quoted escaped."""
    maker = build(Raising)
    slot = hotglm.ModuleSlot(maker(1), name="raising", version="1.0.0")

    def progress(_: object) -> None:
        raise ValueError(FORGED)

    def check(module: nn.Module) -> bool:
        module.__class__ = type("Odd", (Raising,), {"named_parameters": progress})
        return True

    policy = hotglm.StagePolicy(checks=(check,))
    verify_nothing_raw(
        slot, lambda: slot.update(maker(2).state_dict(), version="1.0.1", policy=policy), code="STAGE_FAILED"
    )


def test_a_bad_version_in_a_file_names_the_file(tmp_path: Any) -> None:
    """A file whose metadata has no usable version is refused as a file, and what it says is quoted escaped."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(_file_with_version(FORGED))
    slot = hotglm.ModuleSlot(nn.Linear(2, 2), name="m", version="1.0.0")
    verify_nothing_raw(slot, lambda: slot.update(path), code="BAD_METADATA")
    with pytest.raises(hotglm.TensorValueError) as caught:
        slot.update(path)
    assert caught.value.file == str(path)


def _file_with_version(version: str) -> bytes:
    return save(nn.Linear(2, 2).state_dict(), metadata={"hotglm.version": version})
