"""`moadapt generate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moadapt.cli.arguments import AdapterPath, BaseModel, Dtype, UseCpu, checked_dtype
from moadapt.cli.console import guarded, note, quiet_libraries
from moadapt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moadapt.run_config import RunConfig
    from moadapt.train.data_config import DataConfig


@guarded
def generate(
    adapter: AdapterPath,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; repeatable.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="Prompts: .txt, one a line, or .jsonl with `prompt`."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSONL to a file instead of printing.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: the most likely token; above: sample.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="When sampling.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="When sampling.")] = 42,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at a time.")] = 8,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Wrap prompts with the chat template (default: as in training)."),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option("--system-prompt", metavar="TEXT", help="Default: as in training.")
    ] = None,
    base: BaseModel = None,
    dtype: Dtype = None,
    cpu: UseCpu = False,
) -> None:
    """Generate answers with an adapter.

    Prompts are tokenised as in training: the beginning and end tokens, the chat template and the system prompt are
    those of the config.yaml that train saved beside the adapter, where there is one. --prompt prints text, --file
    prints one JSON object a line with prompt and response.

    [bold]Examples[/bold]

      moadapt generate runs/my-run --prompt "Translate to French: cheese"
      moadapt generate runs/my-run --file prompts.txt --output answers.jsonl
      moadapt generate runs/my-run -p "Once upon a time" --temperature 0.8
    """
    from moadapt.cli.adapters import adapter_config
    from moadapt.train.data_config import DataConfig

    quiet_libraries()
    if bool(prompts) == (file is not None):
        raise ConfigError("give prompts with --prompt TEXT or with --file FILE, one of the two")
    if temperature == 0.0 and top_p != 1.0:
        raise ConfigError("--top-p has no effect at temperature 0; set --temperature as well")
    texts = list(prompts or []) if file is None else _read_prompts(file)
    config = adapter_config(adapter, base, None if dtype is None else checked_dtype(dtype), cpu)
    # Without a saved config: the defaults of every option that has to do with text.
    data = config.data if config.data is not None else DataConfig.model_construct()
    options = {"apply_chat_template": chat, "system_prompt": system_prompt}
    data = data.model_copy(update={name: value for name, value in options.items() if value is not None})
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": None}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    import torch

    torch.manual_seed(seed)
    answers = _answers(config, data, adapter, texts, batch_size, {"max_new_tokens": max_new_tokens, **sampling})
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", encoding="utf-8") as stream:
            for text, answer in zip(texts, answers, strict=True):
                stream.write(_line(text, answer) + "\n")
        note(f"wrote {len(texts)} answers to {output}")
        return
    for text, answer in zip(texts, answers, strict=True):
        typer.echo(answer if file is None else _line(text, answer))


def _line(prompt: str, response: str) -> str:
    return json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False)


def _read_prompts(file: Path) -> list[str]:
    """The prompts of a text or JSONL file.

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
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise DataError(f"{file}: the file has no prompts")
        return prompts
    if file.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(f"{file}: unknown kind of file {file.suffix!r}; use .txt, one prompt a line, or .jsonl")
    table = read_table(str(file))
    table.require("prompt", "--file")
    prompts = []
    for index, row in enumerate(table.rows):
        value = row.get("prompt")
        if not isinstance(value, str):
            raise DataError(f"{table.where(index)}: `prompt` must be a text, found {type(value).__name__}")
        prompts.append(value)
    return prompts


def _answers(
    config: RunConfig, data: DataConfig, adapter: str, prompts: Sequence[str], batch_size: int, options: dict[str, Any]
) -> list[str]:
    """The answers in the prompts' order."""
    import torch

    from moadapt.cli.adapters import load_for_inference
    from moadapt.cli.processes import progress_bar
    from moadapt.pretrained import load_tokenizer
    from moadapt.train.collate import Collator
    from moadapt.train.encoding import Encoder, Example
    from moadapt.train.evaluation import end_tokens

    tokenizer = load_tokenizer(config)
    model = load_for_inference(config, adapter)
    encoder_decoder = bool(model.config.is_encoder_decoder)
    encoder = Encoder(tokenizer, data, is_encoder_decoder=encoder_decoder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = Collator(pad or 0, "left", encoder_decoder)
    rows = []
    for index, prompt in enumerate(prompts):
        ids = _encode(encoder, data, prompt)
        rows.append(Example(ids, len(ids), 0, index, [], prompt, "", [1] * len(ids)))
    device = next(model.parameters()).device
    ends = end_tokens(tokenizer, data.eos_token)
    answers: list[str] = []
    with progress_bar() as progress:
        for start in range(0, len(rows), batch_size):
            batch = collator.collate_prompts(rows[start : start + batch_size])
            with torch.no_grad():
                output_BS = model.generate(
                    **{name: value.to(device) for name, value in batch.items()},
                    eos_token_id=ends or None,
                    pad_token_id=collator.pad_token_id,
                    num_beams=1,
                    **options,
                )
            new_BS = output_BS[:, 1 if encoder_decoder else batch["input_ids"].shape[1] :]
            progress("generating", start + len(new_BS), len(rows))
            for tokens in new_BS.tolist():
                end = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
                answers.append(tokenizer.decode(tokens[:end], skip_special_tokens=True).strip())
    return answers


def _encode(encoder: Any, data: DataConfig, prompt: str) -> list[int]:
    if not data.apply_chat_template:
        text = prompt if data.system_prompt is None else f"{data.system_prompt}\n\n{prompt}"
        ids: list[int] = encoder.encode_prompt(text)
        return ids
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    messages: list[int] = encoder.encode_messages([*system, {"role": "user", "content": prompt}])
    return messages
