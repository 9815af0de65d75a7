"""A tiny base model on disk with a word tokenizer, three small tasks, and ways to run the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from moadapt.cli.app import app

WORDS = [f"w{index}" for index in range(20)]


def save_base(folder: Path) -> Path:
    """A random Llama and its tokenizer."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_project(folder: Path) -> Path:
    """A config with the base model and the tasks beside it; returns the config."""
    save_base(folder / "base")
    rng = random.Random(0)
    for task, shift in (("copy", 0), ("next", 1), ("after", 2)):
        for split, size in (("train", 12), ("test", 5)):
            rows = []
            for _ in range(size):
                word = rng.randrange(len(WORDS))
                rows.append({"prompt": f"{WORDS[word]} w{shift}", "response": f" {WORDS[(word + shift) % len(WORDS)]}"})
            path = folder / f"{task}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model_name_or_path": "base",
        "mixture": {
            "preset": "malora",
            "num_experts": 4,
            "target_modules": ["q_proj", "down_proj"],
            "expert": {"r": 2, "shared_r": 4, "lora_dropout": 0.0},
        },
        "data": {
            "max_length": 16,
            "tasks": [
                {"name": "copy", "path": "copy.train.jsonl", "eval_path": "copy.test.jsonl", "metric": "exact_match"},
                {"name": "next", "path": "next.train.jsonl", "eval_path": "next.test.jsonl", "metric": "exact_match"},
                {"name": "after", "path": "after.train.jsonl", "eval_path": "after.test.jsonl"},
            ],
        },
        "training": {
            "output_dir": str(folder / "out"),
            "learning_rate": 1e-2,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
        },
    }
    path = folder / "run.yaml"
    path.write_text("# A tiny run\n" + yaml.safe_dump(config), encoding="utf-8")
    return path


def invoke(*arguments: object) -> Result:
    """Run the command line in this process, on a wide terminal without colours."""
    env = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def environment() -> dict[str, str]:
    """For a child process: this checkout is importable, and nothing goes to the network."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {
        **kept,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }


def run_python(*arguments: object, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS…` in a process of its own."""
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
