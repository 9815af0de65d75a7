"""`moadapt sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moadapt.cli.arguments import AdapterPath, BaseModel, Dtype, UseCpu, checked_dtype
from moadapt.cli.console import guarded, note, out, quiet_libraries
from moadapt.cli.texts import BatchSize, MaxLength, MaxTokens, TextColumn
from moadapt.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from moadapt.model import MixtureModel
    from moadapt.text_measure import TextResult

THRESHOLDS = "0.2,0.3,0.4,0.5,0.6,0.7,0.8"


@guarded
def sweep(
    adapter: AdapterPath,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text to measure perplexity on.", show_default=False)
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option("--thresholds", metavar="LIST", help=f"For routers with a threshold (default: {THRESHOLDS})."),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="LIST", help="num_experts_per_tok, for routers that keep a fixed number."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the numbers as JSON, too.")
    ] = None,
    text_column: TextColumn = None,
    max_tokens: MaxTokens = 65536,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    base: BaseModel = None,
    dtype: Dtype = None,
    cpu: UseCpu = False,
) -> None:
    """Print perplexity and the share of experts at work for each threshold of a converted model.

    As table 4 of DSMoE: the threshold is changed after training, and nothing is trained or saved. The shares are of
    the routed experts, of the parameters of the blocks that were split, and of the whole model's.

    [bold]Examples[/bold]

      moadapt sweep converted --text book.txt
      moadapt sweep converted --text book.txt --thresholds 0.4,0.5,0.6
      moadapt sweep converted --text book.txt --experts 1,2,4 -o sweep.json
    """
    from moadapt.adjust import adjustable, set_num_experts_per_tok, set_router_threshold
    from moadapt.cli.adapters import adapter_config, load_for_inference
    from moadapt.cli.processes import progress_bar
    from moadapt.cli.texts import read_text
    from moadapt.pretrained import load_tokenizer
    from moadapt.text_measure import measure
    from moadapt.train.text import CalibrationConfig

    quiet_libraries()
    if text is None:
        raise ConfigError("--text: missing; name a file of text to measure perplexity on")
    if thresholds is not None and experts is not None:
        raise ConfigError("--thresholds and --experts: give one of both")
    values: list[Any] = _numbers("--experts", experts, int) if experts is not None else []
    values = values or _numbers("--thresholds", thresholds or THRESHOLDS, float)
    config = adapter_config(adapter, base, None if dtype is None else checked_dtype(dtype), cpu)
    tokenizer, model = load_tokenizer(config), load_for_inference(config, adapter)
    option = "threshold" if experts is None else "num_experts_per_tok"
    _check(model, option, adjustable(model))
    options = CalibrationConfig(
        path=text, text_column=text_column, max_tokens=max_tokens, max_length=max_length, batch_size=batch_size
    )
    batches = read_text(options, tokenizer, model.config)
    saved = getattr(next(iter(model.injection.routers.values())).router, option)
    results: dict[Any, TextResult] = {}
    with progress_bar() as progress:
        with model.disable_adapter():
            dense = measure(model, batches, what="all experts, ungated", progress=progress)
        for value in values:
            (set_router_threshold if experts is None else set_num_experts_per_tok)(model, value)
            results[value] = measure(model, batches, what=f"{option} {value}", progress=progress)
    out().print(_table(option, saved, results, dense, text))
    out().print("* saved. experts: routed ones at work, a block and token; of FFN, of model: parameters", style="dim")
    if output is not None:
        rows = [{option: value, **result.to_dict()} for value, result in results.items()]
        document = {"model": adapter, "text": text, "saved": {option: saved}, "dense": dense.to_dict(), "rows": rows}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        note(f"wrote {output}")


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigError(f"{option}: {text!r} is no list of numbers, as {'1,2,4' if kind is int else THRESHOLDS}")
    return numbers


def _check(model: MixtureModel, option: str, valid: list[str]) -> None:
    """Only converted models, and only what their routers have.

    Raises:
        ConfigError: says what to give instead.
    """
    from moadapt.layer import PartitionLayer

    if not any(isinstance(layer, PartitionLayer) for layer in model.injection.layers.values()):
        raise ConfigError("sweep needs a converted model; this one adapts linear layers, whose experts save no work")
    if option in valid:
        return
    kind = model.mixture_config.router.kind
    if option == "threshold":
        way = "give --experts, as --experts 1,2,4" if valid else "its experts at work follow from its weights alone"
        raise ConfigError(f"--thresholds: the router {kind} has no threshold; {way}")
    way = "give --thresholds" if valid else "its experts at work follow from its weights alone"
    raise ConfigError(f"--experts: the router {kind} keeps no fixed number of experts; {way}")


def _table(option: str, saved: Any, results: dict[Any, TextResult], dense: TextResult, text: str) -> Table:
    from rich.table import Table

    table = Table(title=f"perplexity on {text} ({dense.tokens:,} tokens)")
    first = "threshold" if option == "threshold" else "kept"
    for name in (first, "perplexity", "loss", "experts", "of them", "of FFN", "of model"):
        table.add_column(name, justify="right", overflow="fold")
    for value, result in results.items():
        shares = (result.active_share, result.ffn_share, result.model_share)
        table.add_row(
            f"{value:g}{' *' if value == saved else ''}",
            f"{result.perplexity:,.3f}",
            f"{result.loss:.4f}",
            f"{result.mean_active or 0:.2f}",
            *(f"{100 * (share or 0):.1f} %" for share in shares),
        )
    table.add_section()
    table.add_row("ungated", f"{dense.perplexity:,.3f}", f"{dense.loss:.4f}", "all", "100 %", "100 %", "100 %")
    return table
