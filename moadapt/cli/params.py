"""`moadapt params`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moadapt.cli.arguments import ConfigPath, Overrides
from moadapt.cli.console import guarded, out, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table

    from moadapt.params import ParameterCounts


@guarded
def params(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count the parameters of a config's mixture, without loading weights.

    Trainable, used by one token, and all, for each kind of module. Only the base model's config is read. The numbers
    are those of the model that [bold]train[/bold] builds (of unquantised base weights, where it quantises them).

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
        total = counts.total
        if counts.active_is_bound:
            out().print(
                "used per token: at most; the router keeps as many experts as it likes, and sweep measures how many",
                highlight=False,
            )
        out().print(f"trainable: {100 * total.trainable / total.total:.3f} % of all parameters\n", highlight=False)


def parameter_table(counts: ParameterCounts) -> Table:
    """One line for each kind of module, and the sum."""
    from rich.table import Table

    table = Table()
    table.add_column("module", no_wrap=True)
    for name in ("modules", "trainable", "used per token", "total"):
        table.add_column(name, justify="right")
    for row in counts.rows:
        table.add_row(row.kind, f"{row.modules:,}", *(f"{value:,}" for value in (row.trainable, row.active, row.total)))
    table.add_section()
    total = counts.total
    table.add_row("total", "", f"{total.trainable:,}", f"{total.active:,}", f"{total.total:,}", style="bold")
    return table
