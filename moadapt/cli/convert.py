"""`moadapt convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moadapt.cli.arguments import Dtype, Overrides, UseCpu, checked_dtype, refuse_filled
from moadapt.cli.console import guarded, note, out, quiet_libraries
from moadapt.cli.texts import BatchSize, MaxLength, MaxTokens, TextColumn, refuse_without_text


@guarded
def convert(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A dense model: a hub id or a folder.", show_default=False)
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the converted model.")
    ] = None,
    config_path: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="YAML with mixture, calibration, data, training."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Text to measure perplexity on (default: the calibration text)."),
    ] = None,
    text_column: TextColumn = None,
    max_tokens: MaxTokens = 65536,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    cpu: UseCpu = False,
) -> None:
    """Split a dense model's feed-forward blocks into routed experts.

    Writes a folder that transformers still loads as the dense model, with the routers beside it, and conversion.json
    with what was lost. train, eval, generate and sweep take that folder. With a data section the model is healed by a
    training in the same go. Without any option: eight slices of each block, four of them at work, no training.

    [bold]Examples[/bold]

      moadapt convert MODEL --output DIR --text book.txt
      moadapt convert MODEL --output DIR mixture.preset=cmoe \\
        calibration.path=book.txt
      moadapt convert MODEL --output DIR --config heal.yaml mixture.preset=dsmoe
    """
    from moadapt.cli.converting import convert_model
    from moadapt.errors import ConfigError
    from moadapt.run_config import load_run_config
    from moadapt.train.text import CalibrationConfig

    quiet_libraries()
    if output is None:
        raise ConfigError("--output: missing; name a folder for the converted model")
    refuse_filled(output, "--output")
    of_text = "text_column", "max_tokens", "max_length", "batch_size"
    refuse_without_text(context, text, *of_text, hint="; for calibration text set calibration.{}")
    given = [*(overrides or []), f"model_name_or_path={model}"]
    given += [] if dtype is None else [f"dtype={checked_dtype(dtype)}"]
    given += ["training.use_cpu=true"] if cpu else []
    config = load_run_config(config_path, given, converts=True)
    measured = None
    if text is not None:
        measured = CalibrationConfig(
            path=text, text_column=text_column, max_tokens=max_tokens, max_length=max_length, batch_size=batch_size
        )
    report = convert_model(config, output, measured)
    last = next(reversed(report.results.values()), None)
    if last is None:
        note("nothing was measured: give text with --text FILE or calibration.path")
    else:
        out().print(report.table())
        shown = report.results["converted"]
        out().print(shown.table("experts at work, and error of each block before healing"))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    out().print(f"{output} ({seconds})", highlight=False, markup=False, soft_wrap=True)
