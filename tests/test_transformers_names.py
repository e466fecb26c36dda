"""Renames handed to transformers' registry and back: the same names come out on either side, and the same way back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import hotglm
from hotglm.errors import MigrationStepError
from hotglm.migration.expression import Source
from hotglm.migration.operation import Operation
from hotglm.migration.operations import Drop, Rename
from hotglm.migration.tensor_spec import TensorSpec
from support.swaps import same_state

transformers = pytest.importorskip("transformers")

from transformers.conversion_mapping import _build_checkpoint_conversion_mapping  # noqa: E402 - needs transformers
from transformers.core_model_loading import PrefixChange, WeightRenaming  # noqa: E402

from hotglm.integrations.transformers_names import from_transformers, to_transformers  # noqa: E402
from support.hub import OwnLlama, make_own, read_checkpoint, registered, save  # noqa: E402

SPEC = TensorSpec(dtype="float32", shape=())

RENAMES = {
    "a name": Rename("head.weight", "lm_head.weight", optional=True),
    "a prefix": Rename(r"encoder\.(.*)", r"backbone.\1", optional=True),
    "a suffix": Rename(r"(.*)\.gamma", r"\1.weight", optional=True),
    "around": Rename(r"model\.(\w+)\.w", r"trunk.\1.weight", optional=True),
    "in front": Rename(r"(.*)", r"model.\1", optional=True),
    "the middle": Rename(r"(layers\.\d+)\.attn\.(.*)", r"\1.self_attn.\2", optional=True),
    "a number": Rename(r"h\.(\d+)\.(.*)", r"layers.\1.\2", optional=True),
}
NAMES = (
    *(
        "head.weight",
        "head.weight.x",
        "xhead.weight",
        "headsweight",
        "encoder.a.b",
        "xencoder.a",
        "m.encoder.a",
        "encoder.",
    ),
    *("a.gamma", "gamma", "a.gamma.b", "model.x.w", "model.x.y.w", "model.x.weight", "layers.3.attn.q.weight"),
    *("layers.x.attn.q", "layers.3.attn.", "m.layers.3.attn.q", "h.3.a", "h.x.a", "x.h.3.a", "layers.12.attn.k.bias"),
)


def rename_there(entries: list[Any], name: str) -> str:
    for entry in entries:
        name, _ = entry.rename_source_key(name)
    return name


def rename_here(operations: list[Operation], name: str) -> str:
    state: Any = {name: Source(name, SPEC)}
    for operation in operations:
        state = operation.apply(state)
    (renamed,) = state
    return str(renamed)


@pytest.mark.parametrize("case", [case for case in RENAMES if case != "a number"])
def test_a_rename_is_the_same_there_and_comes_back(case: str) -> None:
    """A rename gives the same names in the registry, the same rename when taken back, and the same way back."""
    rename = RENAMES[case]
    entries = to_transformers([rename])
    assert from_transformers(entries) == [rename]
    reverse = [entry.reverse_transform() for entry in reversed(entries)]
    inverse = rename.inverse()
    assert isinstance(inverse, Rename)
    changed = 0
    for name in NAMES:
        there = rename_there(entries, name)
        assert there == rename_here([rename], name)
        assert rename_there(reverse, name) == rename_here([inverse], name)
        if there != name:
            changed += 1
            assert rename_there(reverse, there) == name
    assert changed


def test_a_rename_with_two_groups_is_said_with_one_where_that_is_exact() -> None:
    """All that stands before the change goes into one group; the rest that stays needs none."""
    rename = Rename(r"layers\.(\d+)\.attn\.(.*)", r"layers.\1.self_attn.\2", optional=True)
    entries = to_transformers([rename])
    for name in NAMES:
        assert (
            rename_there(entries, name) == rename_here([rename], name) == rename_here(from_transformers(entries), name)
        )
    assert any(rename_there(entries, name) != name for name in NAMES)


def test_what_the_registry_cannot_say_is_refused_or_said_name_by_name() -> None:
    """A rename that needs two groups there, a swap of groups and other operations are refused by name, all at once."""
    swap = Rename(r"(\w+)\.(\w+)\.w", r"\2.\1.w", optional=True)
    loose = Rename("head.*", "other", optional=True)
    with pytest.raises(MigrationStepError) as caught:
        to_transformers([swap, Drop("x"), loose, RENAMES["a name"], Rename(r"(\w+)-(\d)\.x", r"\1.\2")])
    assert [problem.code for problem in caught.value.problems] == ["NOT_EXPRESSIBLE"] * 4
    for text in ("Rename", "Drop", "head.*", "several"):
        assert text in str(caught.value)
    entries = to_transformers([swap, RENAMES["a suffix"]], names=["a.b.w", "c.d.w", "e.gamma", "other"])
    assert [rename_there(entries, name) for name in ("a.b.w", "c.d.w", "e.gamma", "other", "x.a.b.w")] == [
        *("b.a.w", "d.c.w", "e.weight", "other", "x.a.b.w"),
    ]
    assert all(len(from_transformers([entry])) == 1 for entry in entries)


def test_a_later_rename_sees_the_names_that_an_earlier_one_gave() -> None:
    """Name by name, each rename is expressed for the names as they are by then."""
    swap = Rename(r"(\w+)\.(\w+)\.w", r"\2.\1.w", optional=True)
    entries = to_transformers([swap, swap], names=["a.b.w"])
    assert rename_there(entries, "a.b.w") == "a.b.w"
    assert len(entries) == 2


# --- the registry as it is --------------------------------------------------------------------------------------------


def sample(source: str) -> str:
    """Return a name that a source of the registry may match: its text, with something short for what is open in it."""
    text = re.sub(r"\(\?[!<][^()]*\)|\^|\$", "", source)
    text = re.sub(r"\[(.)[^\]]*\]", r"\1", text).replace(r"\d+", "3").replace(r"\w+", "v")
    text = re.sub(r"\.[*+]\??", "v", text).replace("*.", "7.").replace(r"\.", ".")
    while (shorter := re.sub(r"\((?:\?:)?([^()|]*)(?:\|[^()]*)?\)\??", r"\1", text)) != text:
        text = shorter
    return text.replace("\\", "")


def test_every_rename_of_the_registry_is_the_same_here() -> None:
    """Each entry that transformers ships and that only renames gives, as a rename, the names that it gives there."""
    num_entries = num_seen = 0
    for kind, entries in _build_checkpoint_conversion_mapping().items():
        for entry in entries:
            if not isinstance(entry, WeightRenaming) or type(entry) not in (WeightRenaming, PrefixChange):
                continue
            operations = from_transformers([entry])
            num_entries += 1
            changed = False
            for body in map(sample, entry.source_patterns):
                for name in (body, f"a.{body}", f"{body}.weight", f"{body}x", f"a.{body}.{body}", "other.weight"):
                    there = rename_there([entry], name)
                    assert there == rename_here(operations, name), (kind, entry, name)
                    changed = changed or there != name
            num_seen += changed
    assert num_entries > 500
    assert num_seen > 0.95 * num_entries


def test_entries_with_a_scope_and_several_sources_are_the_same_here() -> None:
    """A scope, with and without the base model's prefix, and several sources for one target are understood."""
    scoped = WeightRenaming(r"\.gamma", ".weight")
    scoped.scope_prefix, scoped.base_model_prefix = "tower", "model"
    anchored = WeightRenaming("^norm", "layer_norm")
    anchored.scope_prefix, anchored.base_model_prefix = "", "model"
    several = WeightRenaming([r"^model\.trunk\.model", r"^trunk\.model\.model"], "model.trunk")
    nested = WeightRenaming(["x.scale", "x.scale.absmax", "x_"], "y")
    names = ("model.tower.a.gamma", "tower.a.gamma", "a.gamma", "other.tower.a.gamma", "norm.w", "model.norm.w")
    more = (
        "model.model.norm.w",
        "normal.w",
        "model.trunk.model.x",
        "trunk.model.model.x",
        "trunk.model.x",
        "x.scale",
        "x.scale.absmax",
        "x.scales",
        "a.x_b",
        "model.trunk.modelx",
    )
    for entry in (scoped, anchored, several, nested):
        operations = from_transformers([entry])
        found = {name: rename_there([entry], name) for name in (*names, *more)}
        assert {name: rename_here(operations, name) for name in found} == found
        assert any(name != renamed for name, renamed in found.items())


def test_entries_that_are_more_than_renames_are_refused_by_name() -> None:
    """Converters, and renames that depend on more than the name, are refused all at once, each with its patterns."""
    mapping = _build_checkpoint_conversion_mapping()
    with pytest.raises(MigrationStepError) as caught:
        from_transformers([*mapping["qwen2_moe"], *mapping["kimi_k25"], *mapping["legacy"]])
    assert {problem.code for problem in caught.value.problems} == {"NOT_EXPRESSIBLE"}
    assert "mlp.experts" in str(caught.value)
    assert "GroupWeightRename" in str(caught.value)


# --- handed over ------------------------------------------------------------------------------------------------------


def test_our_renames_serve_transformers_in_both_directions(tmp_path: Path) -> None:
    """Renames in the registry load an old layout, cold and by swap, and `save_pretrained` writes that layout again."""
    old = [
        Rename(r"trunk\.(.*)", r"model.\1", optional=True),
        Rename("head.weight", "lm_head.weight", optional=True),
    ]
    with registered("OwnLlama", to_transformers(old)):
        path = save(make_own(2), tmp_path)
        names = set(read_checkpoint(path))
        assert {"head.weight", "trunk.norm.weight"} <= names
        assert not any(name.startswith(("model.", "lm_head")) for name in names)
        cold = OwnLlama.from_pretrained(path).eval()
        assert same_state(cold, make_own(2))
        slot = hotglm.ModuleSlot(make_own(1), name="model", version="1.0.0")
        slot.update(path, version="1.0.1")
        assert same_state(slot, cold)
