"""Outputs of transformers are recorded with their names, and compared like any others."""

from __future__ import annotations

import pytest
import torch

import hotglm
from hotglm.comparison import find_breakages

transformers = pytest.importorskip("transformers")


def make(vocabulary: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    module: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return module


def ids(batch: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(batch, 3, dtype=torch.int64)}


def test_a_grown_vocabulary_is_found_in_the_logits() -> None:
    """A `ModelOutput` is recorded by its names, and wider logits are found under batches of other sizes too."""
    old = hotglm.contract_of(make(32), inputs=[ids(1), ids(2)])
    new = hotglm.contract_of(make(40), inputs=[ids(3), ids(4)])
    assert old.outputs is not None
    output = old.outputs.recordings[0].output
    assert output.kind == "mapping_record"
    assert dict(output.parts)["logits"].shape == (1, 3, 32)
    texts = [one.explain() for one in find_breakages(old, new) if one.bump is hotglm.Bump.MAJOR]
    assert texts == ["output 'logits' went from 32 to 40 wide"]
    assert hotglm.Contract.from_dict(old.to_dict()) == old


def test_a_tuple_and_a_dictionary_are_two_calls() -> None:
    """`return_dict=False` is recorded as another call, and not compared with the plain one."""
    module = make(32)
    plain, as_tuple = (
        hotglm.contract_of(module, inputs=[{**ids(1), **more}]).outputs for more in ({}, {"return_dict": False})
    )
    assert plain is not None
    assert as_tuple is not None
    assert as_tuple.recordings[0].output.kind == "tuple"
    before, after = (hotglm.Contract(outputs=one) for one in (plain, as_tuple))
    assert list(find_breakages(before, after)) == []
