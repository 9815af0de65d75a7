"""Work of `moadapt generate`: prompts and their tasks, answers as text or as a stream, and the decisions behind them.

Shapes: B prompts of a batch, S longest sequence, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from transformers import TextStreamer

from moadapt.errors import ConfigError, DataError
from moadapt.registry import closest

if TYPE_CHECKING:
    from torch import Tensor

    from moadapt.config import MixtureConfig
    from moadapt.model import MixtureModel
    from moadapt.train.data_config import DataConfig

Decisions = dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    Attributes:
        text: the prompt.
        task: the name of its task in the file; None where the file says nothing.
        where: file and line, for messages; empty for one from the command line.
    """

    text: str
    task: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model made of a prompt.

    Attributes:
        response: the generated text.
        routing: by router, the selected experts and their weights; None where the decisions were not asked for.
    """

    response: str
    routing: Decisions | None = None


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a text or JSONL file; the column `task` is optional.

    Raises:
        DataError: the file cannot be used; names the line.
    """
    from moadapt.train.sources import read_table

    if file.suffix.lower() == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise DataError(f"{file}: cannot be read: {reason}") from None
        prompts = [Prompt(line, None, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not prompts:
            raise DataError(f"{file}: the file has no prompts")
        return prompts
    if file.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(f"{file}: unknown kind of file {file.suffix!r}; use .txt, one prompt a line, or .jsonl")
    table = read_table(str(file))
    table.require("prompt", "--file")
    prompts = []
    for index, row in enumerate(table.rows):
        where = table.where(index)
        text, task = row.get("prompt"), row.get("task")
        if not isinstance(text, str):
            raise DataError(f"{where}: `prompt` must be a text, found {type(text).__name__}")
        if task is not None and not isinstance(task, str):
            raise DataError(f"{where}: `task` must be the name of a task, found {type(task).__name__}")
        prompts.append(Prompt(text, task, where))
    return prompts


def task_ids(prompts: Sequence[Prompt], default: str | None, mixture: MixtureConfig) -> list[int] | None:
    """The prompts' task ids, for an adapter that goes by task.

    Args:
        prompts: a task of their own wins over the default.
        default: what `--task` says.
        mixture: the adapter's config, which names the tasks it knows; where it does not, their numbers do.

    Returns:
        One id a prompt, -1 for one without a task where the adapter takes such; None where the adapter does not go by
        task. The column `task` of a file means nothing to it then.

    Raises:
        ConfigError: `--task` for an adapter that does not go by task, or an unknown task there.
        DataError: an unknown task in the file, or a prompt without a task and an adapter that needs one.
    """
    from moadapt.train.task_ids import UNKNOWN, takes_unknown_tasks

    if not mixture.needs_tasks:
        if default is not None:
            raise ConfigError("--task: this adapter does not go by task; leave --task out")
        return None
    numbers = [getattr(part, "num_tasks", None) or 0 for part in (mixture.router, mixture.expert)]
    known = mixture.tasks or [str(number) for number in range(max(numbers))]
    listed = f"Tasks of this adapter: {', '.join(known)}"
    ids = []
    for prompt in prompts:
        name = default if prompt.task is None else prompt.task
        where = f"{prompt.where}: " if prompt.where else ""
        if name in known:
            ids.append(known.index(name))
        elif name is not None:
            text = f"unknown task {name!r}{closest(name, known)} {listed}"
            raise ConfigError(f"--task: {text}") if prompt.task is None else DataError(where + text)
        elif takes_unknown_tasks(mixture):
            ids.append(UNKNOWN)
        else:
            raise DataError(
                f"{where}this adapter goes by task; name the task with --task, or as `task` in --file. {listed}"
            )
    return ids


class AnswerStreamer(TextStreamer):  # type: ignore[misc]  # its type is hidden
    """Prints an answer while it is generated: the same text as afterwards, without end tokens and outer white space.

    Args:
        tokenizer: decodes the answer.
        ends: the tokens that end it; they need not be special ones.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ends = ends
        self._held = ""  # white space that is printed if something follows
        self._began = False

    def put(self, value: Tensor) -> None:
        """Take the prompt once, then new tokens."""
        tokens = value.reshape(-1)
        if not self.next_tokens_are_prompt:
            tokens = tokens[[token not in self.ends for token in tokens.tolist()]]
        if self.next_tokens_are_prompt or tokens.numel():
            super().put(tokens)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a finished piece; at the end of the stream a line break."""
        text = self._held + text if self._began else text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._began = self._began or bool(shown)
        typer.echo(shown, nl=stream_end)


class Answerer:
    """Answers prompts with a loaded adapter. Prompts are tokenised as in training.

    Args:
        model: the adapter on its base model.
        tokenizer: the base model's.
        data: options of the text: special tokens, chat template, system prompt.
        options: arguments of `generate` that are the same for all prompts.
    """

    def __init__(self, model: MixtureModel, tokenizer: Any, data: DataConfig, options: dict[str, Any]) -> None:
        from moadapt.train.collate import Collator
        from moadapt.train.encoding import Encoder
        from moadapt.train.evaluation import end_tokens

        self.model = model
        self.tokenizer = tokenizer
        self.data = data
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.encoder = Encoder(tokenizer, data, is_encoder_decoder=self.is_encoder_decoder)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.collator = Collator(pad or 0, "left", self.is_encoder_decoder)
        self.ends = end_tokens(tokenizer, model, data.eos_token)
        self.options = {"eos_token_id": self.ends or None, "pad_token_id": self.collator.pad_token_id, **options}

    def stream(self, prompt: str, task_id: int | None) -> None:
        """Print the answer to one prompt while it is generated."""
        ids = None if task_id is None else [task_id]
        self._generate([prompt], ids, streamer=AnswerStreamer(self.tokenizer, self.ends))

    def answer(self, prompts: Sequence[str], task_ids: Sequence[int] | None, decisions: bool) -> list[Answer]:
        """The answers to one batch of prompts, in their order.

        Args:
            prompts: B texts.
            task_ids: B ids, for an adapter that goes by task; None for any other.
            decisions: tell the decision of every prompt, too, for an adapter that makes one for each.
        """
        if decisions:
            from moadapt.generation import decisions_of

            output = self._generate(prompts, task_ids, return_dict_in_generate=True, use_cache=True)
            output_BS, routings = output.sequences, decisions_of(output.past_key_values)
        else:
            output_BS, routings = self._generate(prompts, task_ids), {}
        answers = []
        for row, tokens in enumerate(output_BS.tolist()):
            end = next((position for position, token in enumerate(tokens) if token in self.ends), len(tokens))
            text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
            answers.append(Answer(text, self._decisions(routings, row, len(prompts)) if decisions else None))
        return answers

    def _generate(self, prompts: Sequence[str], task_ids: Sequence[int] | None, **options: Any) -> Any:
        """The output of `generate`, its sequences cut to the (B, S) new tokens unless they are streamed."""
        import torch

        from moadapt.train.encoding import Example

        rows = []
        for index, prompt in enumerate(prompts):
            ids = self._encode(prompt)
            task_id = 0 if task_ids is None else task_ids[index]
            rows.append(Example(ids, len(ids), task_id, index, [], prompt, "", [1] * len(ids)))
        batch = self.collator.collate_prompts(rows)
        if task_ids is None:  # no task is not the first one
            del batch["task_ids"]
        device = next(self.model.parameters()).device
        with torch.no_grad():
            inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
            output = self.model.generate(**inputs, **self.options, **options)
        first = 1 if self.is_encoder_decoder else batch["input_ids"].shape[1]
        if isinstance(output, torch.Tensor):
            return output[:, first:]
        output.sequences = output.sequences[:, first:]
        return output

    def _decisions(self, routings: dict[str, Any], row: int, rows: int) -> Decisions:
        """What every router decided for one of a batch's prompts."""
        found: Decisions = {}
        for router, routing in routings.items():
            names: list[Any] = self.model.expert_names(router)
            if self.model.mixture_config.expert_unit == "bank":
                names = list(range(routing.num_experts))
            # The beams of one prompt lie side by side and share its decision.
            first = row * (routing.selected_TN.shape[0] // rows)
            chosen = routing.selected_TN[first].nonzero().flatten().tolist()
            weights = routing.weights_TN[first].tolist()
            found[router] = {
                "experts": [names[expert] for expert in chosen],
                "weights": [round(weights[expert], 6) for expert in chosen],
            }
        return found

    def _encode(self, prompt: str) -> list[int]:
        system = self.data.system_prompt
        if not self.data.apply_chat_template:
            return self.encoder.encode_prompt(prompt if system is None else f"{system}\n\n{prompt}")
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.encoder.encode_messages([*messages, {"role": "user", "content": prompt}])
