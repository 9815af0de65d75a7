"""Tiny random base models and batches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from moadapt import MixtureModel, get_mixture_model

VOCAB = 40
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=4),
    "mistral": MistralConfig(**_GROUPED, sliding_window=None),
    "gemma": GemmaConfig(**_GROUPED, head_dim=4),
    "phi3": Phi3Config(**_GROUPED),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        ffn_dim=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dropout=0.0,
    ),
    "t5": T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_ff=20,
        num_layers=2,
        num_heads=4,
        d_kv=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    ),
}
for _name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
    setattr(CONFIGS["gpt2"], _name, 0.0)
FAMILIES = list(CONFIGS)


def base_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A base model with weights large enough that every layer matters; the same for the same seed."""
    config = copy.deepcopy(CONFIGS[family])
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # T5's position bias lets torch pick another kernel (and rounding) whenever what needs a gradient changes. The eager
    # attention has one path; for the others it turns rows without any key into NaN in float64.
    model = auto.from_config(config, attn_implementation="eager" if config.is_encoder_decoder else None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "shared" not in name:
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1 and name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def mixture_model(
    config: dict[str, Any],
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    noise: float = 0.3,
    **changes: Any,
) -> MixtureModel:
    """A mixture whose adapter tensors are all noise, the zero-initialised ones included."""
    model = get_mixture_model(base_model(family, dtype, **changes), config)
    randomize_adapter(model, noise)
    return model


@torch.no_grad()
def randomize_adapter(model: MixtureModel, std: float = 0.3, seed: int = 1) -> None:
    """Overwrite every adapter tensor by noise; router weights are larger, so that few tokens are near a tie."""
    torch.manual_seed(seed)
    for name, parameter in model.adapter_parameters():
        parameter.normal_(std=0.5 if model.parameter_role(name) == "router" else std)


def batch(rows: int = 2, length: int = 6, seed: int = 3, family: str = "llama") -> dict[str, Tensor]:
    """Token ids without padding, all of them labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(3, VOCAB, (rows, length - 2), generator=generator) if family == "t5" else ids.clone()
    return made | {"labels": labels}


def gradients(model: MixtureModel) -> dict[str, Tensor]:
    """Copies of the adapter's gradients by name."""
    return {name: p.grad.clone() for name, p in model.adapter_parameters() if p.grad is not None}
