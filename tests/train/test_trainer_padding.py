"""The padding side changes nothing, also for a model with absolute positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_helpers import MIXTURE, VOCABULARY, losses, make_tasks, make_tokenizer, options
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from moadapt import get_mixture_model
from moadapt.train.data_config import DataConfig
from moadapt.train.trainer import MultiTaskTrainer


def _gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.3, bos_token_id=1, eos_token_id=2))


def _opt() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            **sizes,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            dropout=0.0,
            init_std=0.3,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize("make", [_gpt2, _opt], ids=["gpt2", "opt"])
def test_training_and_evaluation_do_not_depend_on_the_padding_side(make, tmp_path: Path) -> None:
    results = {}
    for side in ("left", "right"):
        torch.manual_seed(0)
        model = get_mixture_model(make(), {**MIXTURE, "target_modules": "all-linear"})
        data = DataConfig.model_validate({"path": "unused.jsonl", "task_column": "task", "padding_side": side})
        trainer = MultiTaskTrainer(model, make_tokenizer(), data, options(tmp_path / side), tasks=make_tasks())
        history = trainer.train().history
        results[side] = losses(history), trainer.evaluate(metrics=False).means["loss"]
    assert results["left"][0] == pytest.approx(results["right"][0], abs=2e-5)
    assert results["left"][1] == pytest.approx(results["right"][1], abs=2e-5)
