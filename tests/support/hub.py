"""Tiny models of transformers, built from configs, saved as on the hub; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping

import hotglm
from hotglm.migration.tensor_spec import TensorSpec
from support.swaps import build, same_bits, same_state

__all__ = [
    "FAMILIES",
    "IDS",
    "OwnLlama",
    "expect",
    "generate",
    "hold",
    "make",
    "make_own",
    "one_thread",
    "read_checkpoint",
    "refuse",
    "registered",
    "run",
    "save",
    "specs_of",
    "write_checkpoint",
]

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_MOE: dict[str, Any] = {
    **_SIZES,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "d_kv": 8,
    "decoder_start_token_id": 0,
}
_WHISPER: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}

FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "GLM dense": ("Glm4ForCausalLM", "Glm4Config", {**_SIZES, "head_dim": 8}),
    "GLM MoE": ("Glm4MoeForCausalLM", "Glm4MoeConfig", _MOE),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_SIZES, "num_local_experts": 4}),
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, "tie_word_embeddings": True}),
    "BERT": ("BertForMaskedLM", "BertConfig", _SIZES),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "ViT": ("ViTModel", "ViTConfig", _VIT),
}
"""Name -> class, config class and fields. Names in files differ from the model's for the MoEs (experts) and ViT."""


def make(family: str, seed: int, **fields: Any) -> Any:
    """Return a model of a family, in evaluation mode, whose weights are those of a seed."""
    model, config, own = FAMILIES[family]
    return build(lambda: getattr(transformers, model)(getattr(transformers, config)(**{**own, **fields})).eval())(seed)


class OwnLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A class of our own, which the registry knows nothing of until it is told."""


def make_own(seed: int) -> Any:
    """Return a model of our own class, in evaluation mode, whose weights are those of a seed."""
    fields = {**FAMILIES["Llama, tied"][2], "tie_word_embeddings": False}
    return build(lambda: OwnLlama(transformers.LlamaConfig(**fields)).eval())(seed)


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Save a model as `save_pretrained` does and return the directory."""
    model.save_pretrained(directory, **options)
    return directory


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a directory with one file."""
    return load_file(directory / "model.safetensors")


def write_checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Replace the tensors of a directory with one file."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def run(model: Any) -> Any:
    """Return what a pass of any family gives."""
    inputs: dict[str, Any] = {"input_ids": IDS}
    kind = model.config.model_type
    if kind == "t5":
        inputs["decoder_input_ids"] = IDS
    if kind == "whisper":
        inputs = {"input_features": torch.linspace(-1, 1, 256).reshape(1, 8, 32), "decoder_input_ids": IDS}
    if kind == "vit":
        inputs = {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)}
    with torch.no_grad():
        return model(**inputs)[0]


def generate(model: Any) -> torch.Tensor | None:
    """Return what greedy generation gives, None for a family that does not generate."""
    if not model.can_generate():
        return None
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    if model.config.model_type == "whisper":
        features = torch.linspace(-1, 1, 256).reshape(1, 8, 32)
        options |= {"input_features": features, "decoder_input_ids": IDS[:, :2]}
    else:
        options["input_ids"] = IDS
    found: torch.Tensor = model.generate(**options)
    return found


@contextmanager
def registered(name: str, entries: list[Any]) -> Iterator[None]:
    """Register conversions under a class's name, until the end of the block."""
    conversion_mapping.register_checkpoint_conversion_mapping(name, entries, overwrite=True)
    try:
        yield
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop(name)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard(name)


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


def refuse(slot: hotglm.ModuleSlot, source: Any, error: type[hotglm.HotglmError], **options: Any) -> hotglm.HotglmError:
    """Return the error that refuses an update, having seen that what was live still serves, bit for bit."""
    before, version = run(slot), slot.version
    with pytest.raises(error) as caught:
        slot.update(source, **options)
    assert same_bits(run(slot), before)
    assert (slot.version, len(slot.history)) == (version, 1)
    return caught.value


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype=str(t.dtype)[6:], shape=tuple(t.shape)) for name, t in tensors.items()}
