"""Checkpoints of transformers: staged through its own registry, a swap is what `from_pretrained` would have loaded."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hotglm
from hotglm.errors import IncompatibleError, MigrationStepError, MissingExtraError
from support.scripts import run_script
from support.swaps import same_bits, same_state

transformers = pytest.importorskip("transformers")

from transformers.core_model_loading import ConversionOps, WeightRenaming  # noqa: E402 - needs transformers

from hotglm.integrations.transformers import plan_conversion  # noqa: E402 - needs transformers
from hotglm.integrations.transformers_config import verify_computes_the_same  # noqa: E402
from hotglm.migration.operations import Rename  # noqa: E402
from hotglm.migration.tensor_spec import TensorSpec  # noqa: E402
from hotglm.weights.lowering import find_byte_runs  # noqa: E402
from support.hub import (  # noqa: E402
    FAMILIES,
    OwnLlama,
    generate,
    make,
    make_own,
    read_checkpoint,
    registered,
    run,
    save,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products spend their time waiting for threads, on a busy machine a hundred times what they compute."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def hold(model: Any) -> hotglm.ModuleSlot:
    return hotglm.ModuleSlot(model, name="model", version="1.0.0")


def expect(slot: hotglm.ModuleSlot, cold: Any) -> None:
    """Expect everything that a pass, a generation or a look at the state can show to be that of a cold start."""
    assert same_state(slot, cold)
    assert same_bits(dict(slot.named_parameters()), dict(cold.named_parameters()))
    assert same_bits(run(slot), run(cold))
    assert same_bits(generate(slot), generate(cold))


def edit(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


def refuse(slot: hotglm.ModuleSlot, source: Any, error: type[hotglm.HotglmError], **options: Any) -> hotglm.HotglmError:
    """Return the error that refuses an update, having seen that what was live still serves, bit for bit."""
    before, version = run(slot), slot.version
    with pytest.raises(error) as caught:
        slot.update(source, **options)
    assert same_bits(run(slot), before)
    assert (slot.version, len(slot.history)) == (version, 1)
    return caught.value


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


# --- converters that are more than rearranging ------------------------------------------------------------------------


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype=str(t.dtype)[6:], shape=tuple(t.shape)) for name, t in tensors.items()}


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
