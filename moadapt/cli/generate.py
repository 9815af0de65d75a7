"""`moadapt generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moadapt.cli.arguments import AdapterPath, BaseModel, Dtype, UseCpu, checked_dtype
from moadapt.cli.console import guarded, note, out, quiet_libraries
from moadapt.errors import ConfigError

if TYPE_CHECKING:
    from moadapt.cli.generating import Answer, Prompt


@guarded
def generate(
    adapter: AdapterPath,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; repeatable.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", metavar="FILE", help="Prompts: .txt, one a line, or .jsonl with `prompt`, `task`."
        ),
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
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="Above 1: beam search.")] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Prompts at a time; default 8, with --merge-after-prefill 1.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="The prompts' task, for an adapter that goes by task."),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream", help="Print while generating (default: a single --prompt on a terminal does)."
        ),
    ] = None,
    routing: Annotated[
        bool | None,
        typer.Option(
            "--routing/--no-routing",
            help="Give JSON with each prompt's decision (default: in JSON, where the adapter makes one a prompt).",
        ),
    ] = None,
    merge_after_prefill: Annotated[
        bool,
        typer.Option(
            "--merge-after-prefill/--no-merge-after-prefill",
            help="Fold what the prompt selected into the weights until its answer ends: faster for long answers.",
        ),
    ] = False,
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
    those of the config.yaml that train saved beside the adapter, where there is one. --prompt prints text, on a
    terminal while it is generated; --file prints one JSON object a line with prompt and response, and the routing of
    the prompt where the adapter decides once for a prompt or a task.

    [bold]Examples[/bold]

      moadapt generate runs/my-run --prompt "Translate to French: cheese"
      moadapt generate runs/my-run --file prompts.txt --output answers.jsonl
      moadapt generate runs/my-run -p "Once upon a time" --temperature 0.8
    """
    from moadapt.cli.adapters import adapter_config, load_for_inference
    from moadapt.cli.generating import Answerer, Prompt, read_prompts, task_ids
    from moadapt.cli.processes import progress_bar
    from moadapt.pretrained import load_tokenizer
    from moadapt.saving import read_adapter_config
    from moadapt.train.data_config import DataConfig

    quiet_libraries()
    if bool(prompts) == (file is not None):
        raise ConfigError("give prompts with --prompt TEXT or with --file FILE, one of the two")
    if temperature == 0.0 and top_p != 1.0:
        raise ConfigError("--top-p has no effect at temperature 0; set --temperature as well")
    as_json = file is not None or output is not None or bool(routing)
    alone = not as_json and len(prompts or []) == 1 and num_beams == 1
    if stream and not alone:
        raise ConfigError(
            "--stream prints one answer as text; give one --prompt, no --output, --routing or --num-beams"
        )
    given = [Prompt(text) for text in prompts or []] if file is None else read_prompts(file)
    mixture, _ = read_adapter_config(adapter)
    by_token = getattr(mixture.router, "granularity", "token") == "token"
    if routing and by_token:
        raise ConfigError(
            "--routing: this adapter decides for every token, so a prompt has no decision of its own; leave --routing "
            "out (results.json of its training run has the share of each expert by task)"
        )
    ids = task_ids(given, task, mixture)
    config = adapter_config(adapter, base, None if dtype is None else checked_dtype(dtype), cpu)
    # Without a saved config: the defaults of every option that has to do with text.
    data = config.data if config.data is not None else DataConfig.model_construct()
    text_options = {"apply_chat_template": chat, "system_prompt": system_prompt}
    data = data.model_copy(update={name: value for name, value in text_options.items() if value is not None})
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": None}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, **sampling}
    if merge_after_prefill:
        options["merge_after_prefill"] = True
    import torch

    tokenizer = load_tokenizer(config)
    answerer = Answerer(load_for_inference(config, adapter), tokenizer, data, options)
    torch.manual_seed(seed)
    if alone and (out().is_terminal if stream is None else stream):
        answerer.stream(given[0].text, None if ids is None else ids[0])
        return
    decisions = as_json and routing is not False and not by_token
    size = batch_size or (1 if merge_after_prefill else 8)
    answers: list[Answer] = []
    with progress_bar() as progress:
        for start in range(0, len(given), size):
            texts = [prompt.text for prompt in given[start : start + size]]
            answers += answerer.answer(texts, None if ids is None else ids[start : start + size], decisions)
            progress("generating", len(answers), len(given))
    lines = [_line(*pair) if as_json else pair[1].response for pair in zip(given, answers, strict=True)]
    if output is None:
        for line in lines:
            typer.echo(line)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    note(f"wrote {len(lines)} answers to {output}")


def _line(prompt: Prompt, answer: Answer) -> str:
    routing = {} if answer.routing is None else {"routing": answer.routing}
    return json.dumps({"prompt": prompt.text, "response": answer.response, **routing}, ensure_ascii=False)
