"""Converters of transformers that are more than rearranging, and slots where the extra is not installed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hotglm.errors import MigrationStepError, MissingExtraError
from support.scripts import run_script

transformers = pytest.importorskip("transformers")

from transformers.core_model_loading import ConversionOps, WeightRenaming  # noqa: E402 - needs transformers

from support.hub import (  # noqa: E402
    OwnLlama,
    expect,
    hold,
    make,
    make_own,
    one_thread,
    read_checkpoint,
    refuse,
    registered,
    save,
    write_checkpoint,
)

__all__ = ["one_thread"]  # a fixture for every test here

# --- converters that are more than rearranging ------------------------------------------------------------------------


class _Double(ConversionOps):  # type: ignore[misc]
    """Computes: what it makes is no rearrangement."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0] * 2}


class _ByValue(ConversionOps):  # type: ignore[misc]
    """Needs the values to know what to do."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0] * (2 if tensors[0].sum().item() > 0 else 3)}


def converters(operation: Callable[[], Any]) -> list[Any]:
    return [
        transformers.WeightConverter(
            source_patterns="lm_head.weight_halved", target_patterns="lm_head.weight", operations=[operation()]
        )
    ]


def halved(path: Path) -> Path:
    tensors = read_checkpoint(path)
    tensors["lm_head.weight_halved"] = tensors.pop("lm_head.weight") / 2
    return write_checkpoint(path, tensors)


def test_a_converter_that_computes_is_run_on_what_it_needs(tmp_path: Path) -> None:
    """A converter that is no rearrangement runs by itself on its own tensors, and gives what `from_pretrained` does."""
    slot = hold(make_own(1))
    path = halved(save(make_own(2), tmp_path))
    with registered("OwnLlama", converters(_Double)):
        slot.update(path, version="1.0.1")
        expect(slot, OwnLlama.from_pretrained(path).eval())
    expect(slot, make_own(2))


class _Parts(ConversionOps):  # type: ignore[misc]
    """Computes several tensors of one."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        first, second = tensors[0].chunk(2)
        return dict(zip(target_patterns, (first * 2, second * 4), strict=True))


def test_a_converter_that_computes_several_tensors_fills_each_with_its_own(tmp_path: Path) -> None:
    """Of what one converter makes, every tensor goes to its place."""
    fused = transformers.WeightConverter(
        source_patterns="mlp.both.weight",
        target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        operations=[_Parts()],
    )
    path = save(make_own(2), tmp_path)
    tensors = read_checkpoint(path)
    for name in [name for name in tensors if "gate_proj" in name]:
        gate, up = tensors.pop(name) / 2, tensors.pop(name.replace("gate", "up")) / 4
        tensors[name.replace("gate_proj", "both")] = torch.cat([gate, up])
    slot = hold(make_own(1))
    with registered("OwnLlama", [fused]):
        slot.update(write_checkpoint(path, tensors), version="1.0.1")
    expect(slot, make_own(2))


def test_a_name_of_the_model_is_not_renamed_away(tmp_path: Path) -> None:
    """A rename to what is ignored does not apply to a name that the model has, as in `from_pretrained`."""
    entries = [WeightRenaming("^lm_head.weight", "rotary_emb.inv_freq"), WeightRenaming("^trunk", "model")]
    path = save(make_own(2), tmp_path)
    tensors = {re.sub("^model", "trunk", name): tensor for name, tensor in read_checkpoint(path).items()}
    assert "lm_head.weight" in tensors
    slot = hold(make_own(1))
    with registered("OwnLlama", entries):
        slot.update(write_checkpoint(path, tensors), version="1.0.1")
        expect(slot, OwnLlama.from_pretrained(path).eval())


def test_a_converter_that_needs_values_is_refused_by_name_and_has_a_way_out(tmp_path: Path) -> None:
    """A converter that cannot be planned from shapes is named; what `from_pretrained` loads is a source as ever."""
    slot = hold(make_own(1))
    path = halved(save(make_own(2), tmp_path))
    with registered("OwnLlama", converters(_ByValue)):
        error = refuse(slot, path, MigrationStepError, version="1.0.1")
        assert [problem.code for problem in error.problems] == ["UNPLANNABLE_CONVERTER"]
        assert "_ByValue" in str(error)
        assert "lm_head.weight_halved" in str(error)
        slot.update(OwnLlama.from_pretrained(path).eval(), version="1.0.1")
        expect(slot, OwnLlama.from_pretrained(path).eval())


def test_names_given_to_from_pretrained_are_remembered(tmp_path: Path) -> None:
    """A model that was loaded with `key_mapping` goes on reading checkpoints with those names."""
    path = save(make_own(1), tmp_path)

    def rename(directory: Path) -> Path:
        tensors = read_checkpoint(directory)
        return write_checkpoint(path, {n.replace("model.layers.", "trunk.blocks."): t for n, t in tensors.items()})

    mapping = {r"^trunk\.blocks\.": "model.layers."}
    slot = hold(OwnLlama.from_pretrained(rename(path), key_mapping=mapping).eval())
    rename(save(make_own(2), path))
    slot.update(path, version="1.0.1")
    expect(slot, make_own(2))


# --- without the extra ------------------------------------------------------------------------------------------------


def test_without_the_extra_what_fits_is_used_and_the_rest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the integration cannot be imported, names that fit swap as before, and others are refused by the extra."""
    import_module = importlib.import_module

    def fail(name: str, *arguments: Any) -> Any:
        if name == "hotglm.integrations.transformers":
            raise MissingExtraError(f"no {name}", remedy="pip install 'hotglm[hf]'")
        return import_module(name, *arguments)

    monkeypatch.setattr("importlib.import_module", fail)
    slot = hold(make("GLM MoE", 1))
    path = save(make("GLM MoE", 2), tmp_path)
    assert "hotglm[hf]" in str(refuse(slot, path, MissingExtraError, version="1.0.1"))
    slot.update(make("GLM MoE", 2).state_dict(), version="1.0.1")
    expect(slot, make("GLM MoE", 2))


def test_the_integration_is_imported_for_its_own_models_alone_and_names_its_extra() -> None:
    """No other slot imports transformers; the integration without it, or with one too old, says what to install."""
    done = run_script(
        """
        import sys
        import torch, hotglm
        from hotglm.errors import MissingExtraError
        slot = hotglm.ModuleSlot(torch.nn.Linear(2, 2), name="m", version="1.0.0")
        slot.update(torch.nn.Linear(2, 2).state_dict(), version="1.0.1")
        print([name for name in sys.modules if "transformers" in name.split(".")])

        def report():
            try:
                import hotglm.integrations.transformers
            except MissingExtraError as error:
                print(error)

        sys.modules["transformers"] = None
        report()
        del sys.modules["transformers"]
        import transformers
        transformers.__version__ = "5.4.0"
        report()
        """
    )
    loaded, missing, old = done.stdout.splitlines()
    assert loaded == "[]", done.stderr
    for line, found in ((missing, "None"), (old, "5.4.0")):
        assert "hotglm[hf]" in line
        assert "5.12" in line
        assert found in line
