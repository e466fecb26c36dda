"""P12 for Hugging Face models: GLM first, and which families need a declaration; all tiny, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotglm
from hotglm.errors import StaleStateError
from support.swaps import build, same_bits, same_state

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GLM: dict[str, Any] = {**_SIZES, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1}
_MOE: dict[str, Any] = {
    **_GLM,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

GENERATIVE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GLM dense": ("GlmForCausalLM", "GlmConfig", _GLM),
    "GLM MoE": ("Glm4MoeForCausalLM", "Glm4MoeConfig", _MOE),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _SIZES),
    "GPT-2, tied": (
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT,
    ),
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertModel", "BertConfig", _SIZES),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8},
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
}


def _maker(family: tuple[str, str, dict[str, Any]]) -> Callable[[int], Any]:
    model, config, fields = family
    return build(lambda: getattr(transformers, model)(getattr(transformers, config)(**fields)).eval())


def _generate(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(IDS, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    return found


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def _expect(slot: hotglm.ModuleSlot, cold: Any) -> None:
    assert same_bits(_logits(slot), _logits(cold))
    assert same_bits(_generate(slot), _generate(cold))
    assert same_state(slot, cold)


SOURCES: dict[str, Callable[[Any, Path], Any]] = {
    "state dict": lambda model, path: model.state_dict(),
    "module": lambda model, path: model,
    "directory": lambda model, path: (model.save_pretrained(path, save_original_format=False), path)[1],
    "sharded directory": lambda model, path: (
        model.save_pretrained(path, save_original_format=False, max_shard_size="20KB"),
        path,
    )[1],
}


@pytest.mark.parametrize(
    ("family", "source"),
    [
        *((family, source) for family in ("GLM dense", "GLM MoE") for source in SOURCES),
        ("Llama", "directory"),
        ("GPT-2, tied", "directory"),
    ],
)
def test_a_swapped_language_model_is_the_one_started_cold(family: str, source: str, tmp_path: Path) -> None:
    """Logits, greedy generation, state and buffers after a swap equal a cold start's, with no declaration (P12)."""
    maker = _maker(GENERATIVE[family])
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    before = _logits(slot)
    b = maker(2)
    receipt = slot.update(SOURCES[source](b, tmp_path), version="1.0.1")
    cold = maker(3)
    cold.load_state_dict(b.state_dict())
    _expect(slot, cold)
    assert all("rotary" in name for name in receipt.carried)
    slot.rollback()
    assert same_bits(_logits(slot), before)
    assert not same_bits(_logits(cold), before)


def test_a_session_generates_from_one_version_throughout() -> None:
    """A session's generation finishes on the version it began with, while the slot serves the next."""
    maker = _maker(GENERATIVE["GLM dense"])
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    with slot.acquire() as generation:
        slot.update(maker(2).state_dict(), version="1.0.1")
        assert same_bits(_generate(generation.module), _generate(maker(1)))
    assert same_bits(_generate(slot), _generate(maker(2)))


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_need_no_declaration(family: str) -> None:
    """BERT, T5 and Whisper are swapped with the default rules, bit for bit."""
    maker = _maker(OTHERS[family])
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    b = maker(2)
    slot.update(b.state_dict(), version="1.0.1")
    assert same_state(slot, b)
    inputs: dict[str, Any] = {"input_ids": IDS}
    if family != "BERT":
        inputs["decoder_input_ids"] = IDS
    if family == "Whisper":
        inputs = {"input_features": torch.ones(1, 8, 32), "decoder_input_ids": IDS}
    with torch.no_grad():
        assert same_bits(slot(**inputs)[0], b(**inputs)[0])


NEEDY: dict[str, tuple[tuple[str, str, dict[str, Any]], str]] = {
    "Gemma 3": (("Gemma3ForCausalLM", "Gemma3TextConfig", {**_SIZES, "head_dim": 8}), "*.embed_scale"),
    "GPT-J": (
        (
            "GPTJForCausalLM",
            "GPTJConfig",
            {**_GPT, "rotary_dim": 4},
        ),
        "*.embed_positions",
    ),
}


@pytest.mark.parametrize("family", NEEDY)
def test_floats_beside_weights_need_to_be_vouched_for(family: str) -> None:
    """A float table in a module with weights cannot be told from a cache: it is named, and `constants` settles it."""
    config, pattern = NEEDY[family]
    maker = _maker(config)
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    before = _logits(slot)
    with pytest.raises(StaleStateError, match=pattern[2:]):
        slot.update(maker(2).state_dict(), version="1.0.1")
    assert same_bits(_logits(slot), before)
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0", constants=[pattern])
    slot.update(maker(2).state_dict(), version="1.0.1")
    _expect(slot, maker(2))


def test_a_model_that_is_being_used_by_a_pipeline_is_swapped_under_it() -> None:
    """A slot stands in for its model wherever code asks for the model's config, device and dtype."""
    maker = _maker(GENERATIVE["GLM dense"])
    slot = hotglm.ModuleSlot(maker(1), name="model", version="1.0.0")
    assert isinstance(slot, nn.Module)
    assert (slot.device.type, slot.dtype, slot.config.hidden_size) == ("cpu", torch.float32, 32)
    assert slot.num_parameters() == maker(1).num_parameters()
    assert slot.can_generate()
