"""Checkpoints of transformers: staged through its own registry, a swap is what `from_pretrained` would have loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hotglm
from hotglm.errors import IncompatibleError, MigrationStepError
from support.swaps import same_bits, same_state

transformers = pytest.importorskip("transformers")


from hotglm.integrations.transformers import plan_conversion  # noqa: E402 - needs transformers
from hotglm.integrations.transformers_config import verify_computes_the_same  # noqa: E402
from hotglm.migration.operations import Rename  # noqa: E402
from hotglm.weights.lowering import find_byte_runs  # noqa: E402
from support.hub import (  # noqa: E402
    FAMILIES,
    expect,
    generate,
    hold,
    make,
    one_thread,
    read_checkpoint,
    refuse,
    run,
    save,
    specs_of,
    write_checkpoint,
)

__all__ = ["one_thread"]  # a fixture for every test here


def edit(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


# --- a swap is what from_pretrained gives -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        *((family, {"max_shard_size": "20KB"}) for family in ("GLM dense", "GLM MoE", "T5")),
    ],
)
def test_a_swap_equals_from_pretrained(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A directory of a checkpoint in the hub's names swaps like any other: state, answers and generation (P12)."""
    slot = hold(make(family, 1))
    before = run(slot)
    path = save(make(family, 2), tmp_path, **options)
    assert ("index.json" in str(list(path.iterdir()))) == bool(options)
    slot.update(path, version="1.0.1")
    cold = type(make(family, 3)).from_pretrained(path).eval()
    expect(slot, cold)
    assert not same_bits(run(slot), before)
    slot.rollback()
    assert same_bits(run(slot), before)


def test_a_mapping_in_the_names_of_the_hub_is_converted_too(tmp_path: Path) -> None:
    """Tensors that a trainer sends under the checkpoint's names swap as the directory does."""
    slot = hold(make("GLM MoE", 1))
    b = make("GLM MoE", 2)
    receipt = slot.update(read_checkpoint(save(b, tmp_path)))  # and without a version, which takes a label then
    assert receipt.new_version is not None
    assert receipt.new_version.local
    expect(slot, b)
    slot.update(make("GLM MoE", 1).state_dict(), version="1.0.2")
    expect(slot, make("GLM MoE", 1))


@pytest.mark.parametrize("family", ["GLM MoE", "Mixtral"])
def test_experts_are_read_to_where_they_stay(family: str, tmp_path: Path) -> None:
    """A tensor of all experts is whole tensors of the file one after the other, so no scratch memory is planned."""
    specs = specs_of(read_checkpoint(save(make(family, 1), tmp_path)))
    plan = plan_conversion(make(family, 2), specs)
    fused = [name for name in plan.outputs if name.endswith("experts.gate_up_proj")]
    assert fused
    for name in plan.outputs:
        runs = find_byte_runs(plan.outputs[name])
        assert runs is not None
        assert len(runs) == {True: 8, False: 4}[name in fused] if "experts." in name and "shared" not in name else 1


def test_a_model_without_a_head_reads_files_with_and_without_the_prefix(tmp_path: Path) -> None:
    """Names with the base model's prefix, and without it, are for the same places, as in `from_pretrained`."""
    base = transformers.BertModel(transformers.BertConfig(**FAMILIES["BERT"][2])).eval()
    path = save(base, tmp_path)
    prefixed = {f"bert.{name}": tensor + 1 for name, tensor in read_checkpoint(path).items()}
    slot = hold(type(base)(base.config).eval())
    slot.update(write_checkpoint(path, prefixed), version="1.0.1")
    assert same_state(slot, type(base).from_pretrained(path))


def test_old_names_and_dropped_tables_are_understood(tmp_path: Path) -> None:
    """`gamma` and `beta`, and tables that models no longer keep, are read as `from_pretrained` reads them."""
    path = save(make("BERT", 2), tmp_path)
    tensors = read_checkpoint(path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    slot = hold(make("BERT", 1))
    slot.update(write_checkpoint(path, old), version="1.0.1")
    expect(slot, type(make("BERT", 1)).from_pretrained(path).eval())


def test_what_a_class_says_to_ignore_is_ignored_and_nothing_else(tmp_path: Path) -> None:
    """Layers that only training used are dropped by the class's own list; an unknown tensor is refused by its name."""
    slot = hold(make("GLM MoE", 1))
    path = save(make("GLM MoE", 2), tmp_path)
    tensors = read_checkpoint(path)
    of_training = {name.replace("layers.1.", "layers.46."): tensor for name, tensor in tensors.items() if ".1." in name}
    write_checkpoint(path, tensors | of_training)
    slot.update(path, version="1.0.1")
    expect(slot, type(make("GLM MoE", 1)).from_pretrained(path).eval())
    other = hold(make("GLM MoE", 1))
    name = "model.layers.7.mlp.experts.0.up_proj.weight"
    error = refuse(other, write_checkpoint(path, {**tensors, name: torch.ones(16, 32)}), IncompatibleError)
    assert [(problem.code, name in problem.message) for problem in error.problems] == [("TENSOR_UNEXPECTED", True)]


def test_what_a_class_keeps_in_single_precision_is_widened(tmp_path: Path) -> None:
    """A checkpoint all in half precision fills a model that keeps some tensors in float32, as `from_pretrained`."""
    path = save(make("GLM MoE", 2).to(torch.bfloat16), tmp_path)
    live = type(make("GLM MoE", 1)).from_pretrained(path).eval()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert read_checkpoint(path)[name].dtype is torch.bfloat16
    assert live.state_dict()[name].dtype is torch.float32
    save(make("GLM MoE", 3).to(torch.bfloat16), path)
    slot = hold(live)
    slot.update(path, version="1.0.1")
    expect(slot, type(live).from_pretrained(path).eval())


def test_other_dtypes_are_a_matter_of_the_policy(tmp_path: Path) -> None:
    """A checkpoint in half precision for a model in single precision is refused, or converted where that is asked."""
    path = save(make("GLM MoE", 2).to(torch.bfloat16), tmp_path)
    slot = hold(make("GLM MoE", 1))
    error = refuse(slot, path, IncompatibleError, version="1.0.1")
    assert {problem.code for problem in error.problems} == {"DTYPE_CHANGED"}
    slot = hotglm.ModuleSlot(
        make("GLM MoE", 1), name="m", version="1.0.0", policy=hotglm.StagePolicy(convert_dtypes=True)
    )
    slot.update(path, version="1.0.1")
    expect(slot, type(make("GLM MoE", 1)).from_pretrained(path, dtype=torch.float32).eval())


def test_a_checkpoint_of_another_version_is_migrated_and_then_converted(tmp_path: Path) -> None:
    """Migrations of ours speak of the names in the file; what they leave is converted to the model's names."""
    migrations = hotglm.Migrations("model")
    migrations.state("1.0", "2.0", [Rename(r"old\.(.*)", r"model.\1")])
    slot = hotglm.ModuleSlot(make("GLM MoE", 1), name="model", version="2.0.0", accept="major", migrations=migrations)
    path = save(make("GLM MoE", 2), tmp_path)
    tensors = {re.sub("^model", "old", name): tensor for name, tensor in read_checkpoint(path).items()}
    receipt = slot.update(write_checkpoint(path, tensors), version="1.5.0")
    expect(slot, make("GLM MoE", 2))
    assert any("transformers' registry" in line for line in receipt.migration)
    assert len(receipt.migration) > 1


def test_a_class_registered_for_the_version_is_built_and_filled_by_conversion(tmp_path: Path) -> None:
    """A checkpoint of a version for which there is new code goes through the registry to that code."""
    base: Any = transformers.Glm4MoeForCausalLM
    fields = FAMILIES["GLM MoE"][2]

    @hotglm.versioned("glm-of-tests", "2.0.0")
    class Second(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(transformers.Glm4MoeConfig(**fields))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    slot = hotglm.ModuleSlot(make("GLM MoE", 1), name="glm-of-tests", version="1.0.0", accept=hotglm.Bump.MAJOR)
    slot.update(save(make("GLM MoE", 2), tmp_path), version="2.0.0")
    assert type(slot.live.module) is Second
    assert same_state(slot, make("GLM MoE", 2))
    assert same_bits(run(slot), run(make("GLM MoE", 2)))


def test_the_generation_config_stays_the_services_own(tmp_path: Path) -> None:
    """How a service generates is its own matter: a directory's `generation_config.json` changes nothing."""
    b = make("GLM dense", 2)
    b.generation_config.max_new_tokens = 1
    slot = hold(make("GLM dense", 1))
    slot.update(save(b, tmp_path), version="1.0.1")
    assert slot.generation_config.max_new_tokens != 1
    assert same_bits(generate(slot), generate(make("GLM dense", 2)))


def test_a_model_inside_another_module_keeps_the_ordinary_rules(tmp_path: Path) -> None:
    """Only a slot's own module is asked for its library: around a model, names must be those of the state dict."""

    class Around(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    slot = hotglm.ModuleSlot(Around(make("GLM MoE", 1)), name="model", version="1.0.0")
    tensors = {f"inner.{name}": t for name, t in read_checkpoint(save(make("GLM MoE", 2), tmp_path)).items()}
    with pytest.raises(IncompatibleError) as caught:
        slot.update(tensors, version="1.0.1")
    assert {problem.code for problem in caught.value.problems} == {"TENSOR_MISSING", "TENSOR_UNEXPECTED"}
    slot.update(Around(make("GLM MoE", 2)).state_dict(), version="1.0.1")


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "model type": ({"model_type": "llama"}, {"MODEL_TYPE_MISMATCH": "'llama'"}),
    "architecture": ({"architectures": ["Glm4MoeModel"]}, {"ARCHITECTURE_MISMATCH": "'Glm4MoeModel'"}),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, {"QUANTIZED": "'fp8'"}),
    "several": (
        {"model_type": "bert", "architectures": ["BertModel"]},
        {"MODEL_TYPE_MISMATCH": "'bert'", "ARCHITECTURE_MISMATCH": "'BertModel'"},
    ),
    "a number": ({"rms_norm_eps": 0.5}, {"CONFIG_CHANGED": "rms_norm_eps"}),
    "a nested number": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}},
        {"CONFIG_CHANGED": "rope_parameters"},
    ),
    "nonsense": ({"num_hidden_layers": "many"}, {"BAD_CONFIG": "num_hidden_layers"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_directory_of_another_model_is_refused_by_its_config(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model, quantised weights, or a config that computes something else is refused before a byte is read."""
    fields, expected = WRONG[case]
    slot = hold(make("GLM MoE", 1))
    path = edit(save(make("GLM MoE", 2), tmp_path), **fields)
    monkeypatch.setattr("hotglm.slot.staging._Stage._load", lambda *_: pytest.fail("read"))
    error = refuse(slot, path, IncompatibleError, version="1.0.1")
    assert {problem.code for problem in error.problems} == set(expected)
    for problem in error.problems:
        assert expected[problem.code] in problem.message
    assert "from_pretrained" in error.remedy


def test_fields_that_no_pass_depends_on_may_differ(tmp_path: Path) -> None:
    """Who saved it, in which dtype, with which dropout and initialisation does not keep a checkpoint out."""
    path = save(make("GLM MoE", 2), tmp_path)
    edit(path, transformers_version="4.0.0", attention_dropout=0.5, initializer_range=1.0, use_cache=False)
    slot = hold(make("GLM MoE", 1))
    slot.update(path, version="1.0.1")
    expect(slot, make("GLM MoE", 2))


def test_numbers_that_json_does_not_know_are_compared_as_numbers(tmp_path: Path) -> None:
    """Infinity and NaN, which transformers writes in its own way, are equal to themselves and to nothing else."""
    path = edit(save(make("GLM MoE", 2), tmp_path), routed_scaling_factor={"__float__": "Infinity"})
    model = make("GLM MoE", 1)
    slot = hold(model)
    assert "inf" in str(refuse(slot, path, IncompatibleError, version="1.0.1"))
    for number in ("Infinity", "NaN"):
        edit(path, routed_scaling_factor={"__float__": number})
        model.config.routed_scaling_factor = float(number)
        verify_computes_the_same(json.loads((path / "config.json").read_text()), model, label="there")


def test_another_width_gets_the_ordinary_verdict(tmp_path: Path) -> None:
    """A checkpoint of another hidden size is refused by the shapes, of converted tensors too, and by nothing else."""
    slot = hold(make("GLM MoE", 1))
    error = refuse(slot, save(make("GLM MoE", 2, hidden_size=48), tmp_path), IncompatibleError, version="1.0.1")
    assert {problem.code for problem in error.problems} == {"SHAPE_CHANGED"}
    assert any("experts.gate_up_proj" in problem.message for problem in error.problems)


def test_a_missing_expert_is_refused_by_the_shape(tmp_path: Path) -> None:
    """One expert less is another shape of the tensor that holds them all."""
    path = save(make("GLM MoE", 2), tmp_path)
    fewer = {name: tensor for name, tensor in read_checkpoint(path).items() if ".experts.3." not in name}
    error = refuse(hold(make("GLM MoE", 1)), write_checkpoint(path, fewer), IncompatibleError, version="1.0.1")
    assert {problem.code for problem in error.problems} == {"SHAPE_CHANGED"}
    assert len(error.problems) == 2


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    """A checkpoint with the old and the new name of one tensor is refused, not decided by the order of names."""
    path = save(make("BERT", 2), tmp_path)
    tensors = read_checkpoint(path)
    name = "bert.embeddings.LayerNorm.weight"
    both = {**tensors, name.replace("weight", "gamma"): tensors[name] + 1}
    error = refuse(hold(make("BERT", 1)), write_checkpoint(path, both), MigrationStepError, version="1.0.1")
    assert [(problem.code, problem.tensor) for problem in error.problems] == [("TWO_SOURCES", name)]
