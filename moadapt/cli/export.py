"""`moadapt export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moadapt.cli.arguments import AdapterPath, BaseModel, Dtype, UseCpu, checked_dtype, refuse_filled
from moadapt.cli.console import guarded, note, out, quiet_libraries
from moadapt.cli.texts import TextColumn, refuse_without_text
from moadapt.errors import ConfigError
from moadapt.registry import closest


@guarded
def export(
    context: typer.Context,
    converted: AdapterPath,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="ARCH",
            help="mixtral, qwen2_moe, qwen3_moe, granitemoeshared, glm4_moe, or auto_map (brings its own code).",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the checkpoint.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Write also what ARCH holds only nearly, with the error measured.")
    ] = False,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text to compare on (default: random tokens).")
    ] = None,
    text_column: TextColumn = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=2, metavar="N", help="Tokens of the text to compare on.")
    ] = 2048,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="Allowed difference, as a share of the largest logit.")
    ] = 1e-5,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file of weights, as 500MB.")
    ] = "5GB",
    base: BaseModel = None,
    dtype: Dtype = None,
    cpu: UseCpu = False,
) -> None:
    """Write a converted model as a checkpoint that transformers loads without moadapt.

    The stock architectures need no code of their own; auto_map holds every routing, and loads with trust_remote_code.
    Weights, tokenizer and generation config are written, and equivalence.json: how far the logits are from the
    converted model's, both in fp32. What ARCH cannot hold exactly is refused, with the reasons and what can.

    [bold]Examples[/bold]

      moadapt export converted --to mixtral --output mixtral --text book.txt
      moadapt export converted --to auto_map --output custom
      moadapt export converted --to glm4_moe --output glm4 --approximate
    """
    from moadapt.cli.adapters import adapter_config, load_for_inference
    from moadapt.cli.processes import progress_bar
    from moadapt.cli.texts import read_text
    from moadapt.export import TARGETS, export_converted
    from moadapt.pretrained import load_tokenizer
    from moadapt.train.text import CalibrationConfig

    quiet_libraries()
    if to is None or to not in TARGETS:
        given = "missing." if to is None else f"{to!r}{closest(to, TARGETS)}"
        raise ConfigError(f"--to: {given} Valid targets: {', '.join(TARGETS)}")
    if output is None:
        raise ConfigError("--output: missing; name a folder for the checkpoint")
    refuse_without_text(context, text, "text_column", "max_tokens")
    refuse_filled(output, "--output")
    config = adapter_config(converted, base, None if dtype is None else checked_dtype(dtype), cpu)
    tokenizer, model = load_tokenizer(config), load_for_inference(config, converted)
    batches = None
    if text is not None:
        options = CalibrationConfig(path=text, text_column=text_column, max_tokens=max_tokens, batch_size=4)
        batches = read_text(options, tokenizer, model.config)
    with progress_bar() as progress:
        report = export_converted(
            model,
            to,
            output,
            tokenizer,
            approximate=approximate,
            text_batches=batches,
            max_tokens=max_tokens,
            tolerance=tolerance,
            max_shard_size=max_shard_size,
            progress=progress,
        )
    if text is None:
        note("compared on random tokens; give text with --text FILE")
    out().print(_summary(report), soft_wrap=True, highlight=False)
    out().print(f"{output}", highlight=False, markup=False, soft_wrap=True)


def _summary(report: dict[str, Any]) -> str:
    """What the report says, in a few lines of markup."""
    numbers = report["comparison"]
    lines = [
        f"[bold]{escape(report['target'])}[/bold], {'exact' if report['exact'] else 'nearly the same'}: logits differ "
        f"by at most {numbers['max_logit_difference']:.2g}, {numbers['mean_logit_difference']:.2g} in the mean "
        f"(largest logit {numbers['max_logit']:.3g}), same best token at {100 * numbers['argmax_agreement']:.2f} % of "
        f"{numbers['tokens']} tokens, "
        f"{'the same' if numbers['generation_equal'] else 'other'} {numbers['generated_tokens']} generated tokens"
    ]
    lines += [f"not exact: {escape(reason)}" for reason in report["not_exact_because"]]
    return "\n".join(lines)
