"""A tiny Llama with a tiny mixture, a word tokenizer and three toy tasks, for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moadapt.model import MixtureModel, get_mixture_model
from moadapt.train.encoding import Example
from moadapt.train.tasks import Task

WORDS = 24
VOCABULARY = WORDS + 3  # <pad> 0, <s> 1, </s> 2, then w0, w1, …

MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "target_modules": ["q_proj", "down_proj"],
    "expert": {"kind": "lora", "r": 2, "lora_alpha": 8, "lora_dropout": 0.0},
    "router": {"kind": "top_k", "num_experts_per_tok": 2},
    "losses": [{"kind": "load_balance", "coef": 0.1}, {"kind": "router_z", "coef": 0.01}],
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_base(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def make_model(dropout: float = 0.0, **changes: Any) -> MixtureModel:
    base = make_base()
    mixture = {**MIXTURE, "expert": {**MIXTURE["expert"], "lora_dropout": dropout}, **changes}
    model = get_mixture_model(base, mixture)
    with torch.no_grad():  # up-projections start at zero: move them, so that routers get gradients from step one
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.adapter_parameters():
            if model.parameter_role(name) == "up":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


PROMPT_ROUTER: dict[str, Any] = {
    "kind": "top_k",
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "scope": "block",
    "granularity": "prompt",
    "activation": "rational",
    "init_std": 0.5,
}


def make_prompt_model(dropout: float = 0.0, **changes: Any) -> MixtureModel:
    """Routed by prompt, with learned coefficients of the routers' activation."""
    return make_model(dropout, **{"router": PROMPT_ROUTER, **changes})


def activations(model: MixtureModel) -> dict[str, torch.Tensor]:
    """Copies of the coefficients of the routers' activation."""
    return {name: value for name, value in weights(model).items() if model.parameter_role(name) == "activation"}


def make_converted(**changes: Any) -> MixtureModel:
    """The same base model with its feed-forward blocks cut into four trained experts."""
    mixture: dict[str, Any] = {
        "num_experts": 4,
        "expert": {"kind": "ffn_partition", "trainable": True},
        "router": {"kind": "relu", "init_std": 0.5},
        "losses": [{"kind": "target_sparsity", "target": 0.3, "initial_strength": 0.05, "multiplier": 1.5}],
        **changes,
    }
    torch.manual_seed(1)
    return get_mixture_model(make_base(), mixture)


def make_tasks(
    sizes: tuple[int, ...] = (13, 9, 6), eval_size: int = 5, metric: str | None = "exact_match"
) -> list[Task]:
    tasks = []
    for task_id, size in enumerate(sizes):
        rng = np.random.default_rng(task_id)
        rows = [_example(rng, task_id, row) for row in range(size + eval_size)]
        name = f"task{task_id}"
        tasks.append(Task(name, task_id, train=rows[:size], eval=rows[size:], metric=metric))  # type: ignore[arg-type]
    return tasks


def _example(rng: np.random.Generator, task_id: int, row: int) -> Example:
    """Prompt: random words; response: its first words again, shifted by the task, and the end token."""
    words = rng.integers(0, WORDS, size=int(rng.integers(2, 9)))
    answer = [(int(word) + task_id) % WORDS for word in words[: int(rng.integers(1, 4))]]
    prompt = [1, *(int(word) + 3 for word in words)]
    response = [*(word + 3 for word in answer), 2]
    return Example(
        input_ids=prompt + response,
        prompt_length=len(prompt),
        task_id=task_id,
        row=row,
        labels=[-100] * len(prompt) + response,
        prompt_text=" ".join(f"w{word}" for word in words),
        response_text=" ".join(f"w{word}" for word in answer),
        prompt_mask=[1] * len(prompt) + [0] * len(response),
    )


def options(output_dir: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def losses(history: list[dict[str, float]]) -> list[float]:
    """The training losses of a run that logged every step."""
    return [entry["train/loss"] for entry in history if "train/loss" in entry]


def weights(model: MixtureModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.adapter_parameters()}
