"""`moadapt params`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moadapt.cli.arguments import ConfigPath, Overrides
from moadapt.cli.console import guarded, out, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table

    from moadapt.params import ParameterCounts, ParameterRow


@guarded
def params(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count the parameters of a config's mixture, without loading weights.

    Trainable, used by one token (or prompt), and all, for each kind of module. Only the base model's config is read.
    The numbers are those of the model that [bold]train[/bold] builds (of unquantised base weights, where it quantises
    them).

    [bold]Examples[/bold]

      moadapt params CONFIG.yaml
      moadapt params CONFIG.yaml mixture.num_experts=16 mixture.expert.r=4
      moadapt params CONFIG.yaml model_name_or_path=meta-llama/Llama-3.1-8B
    """
    from moadapt.params import count_parameters
    from moadapt.pretrained import empty_mixture
    from moadapt.run_config import load_run_config

    quiet_libraries()
    run = load_run_config(config, overrides or (), needs=("model_name_or_path", "mixture"))
    all_counts = {}
    for name, entry in run.runs().items():
        all_counts[name] = count_parameters(empty_mixture(entry, as_converted=True))
    if as_json:
        typer.echo(json.dumps({name: counts.to_dict() for name, counts in all_counts.items()}, indent=2))
        return
    for name, counts in all_counts.items():
        out().print(f"{name} on {run.model_name_or_path}", highlight=False, markup=False, soft_wrap=True)
        out().print(parameter_table(counts))
        for line in notes(counts):
            out().print(line, highlight=False)
        total = counts.total
        out().print(f"trainable: {100 * total.trainable / total.total:.3f} % of all parameters\n", highlight=False)


def notes(counts: ParameterCounts) -> list[str]:
    """What the numbers of use are: a bound, or a mean over modules of different sizes."""
    lines = []
    if counts.active_is_bound:
        lines.append(
            f"used per {counts.granularity}: at most; the router keeps as many experts as it likes, and sweep measures "
            "how many"
        )
    if counts.active_trainable_range is not None:
        fewest, most = counts.active_trainable_range
        mean = f"used per {counts.granularity}: the mean over all choices of modules"
        lines.append(f"{mean}; of the trainable ones at least {fewest:,}, at most {most:,}")
    return lines


def parameter_table(counts: ParameterCounts) -> Table:
    """One line for each kind of module, and the sum."""
    from rich.table import Table

    def number(value: int) -> str:  # six columns of exact billions do not fit into a terminal; --json has them
        return f"{value:,}" if value < 10**8 else f"{value / 1e6:,.1f} M"

    def numbers(row: ParameterRow) -> list[str]:
        return [number(value) for value in (row.trainable, row.active_trainable, row.active, row.total)]

    table = Table()
    table.add_column("module", no_wrap=True)
    used = f"used per {counts.granularity}"
    for name in ("modules", "trainable", f"trainable, {used}", used, "total"):
        table.add_column(name, justify="right")
    for row in counts.rows:
        table.add_row(row.kind, f"{row.modules:,}", *numbers(row))
    table.add_section()
    table.add_row("total", "", *numbers(counts.total), style="bold")
    return table
