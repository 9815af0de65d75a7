"""Tables at the end of a run: scores, sizes and speed, and where each task's tokens or prompts went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moadapt.cli.console import out
from moadapt.train.data_config import MetricName

if TYPE_CHECKING:
    from rich.table import Table

MANY_EXPERTS = 10
"""From this many on, a task's row names its most used experts instead of one column for each."""
_MOST_USED = 5

Scores = dict[str, dict[str, float]]


@dataclass
class RunReport:
    """What came of one mixture.

    Attributes:
        name: its name in reports.
        output_dir: where its adapter is.
        steps: optimizer steps.
        stop_reason: why it ended early, or None.
        trainable_parameters: as `get_nb_trainable_parameters`.
        seconds_per_step: mean time of an optimizer step, evaluations and saving left out.
        before: scores by task, and `mean`, before the first step; None without `eval_on_start`.
        after: the same of the saved adapter; None without evaluation rows.
        metrics: the metric of each evaluated task, None for the loss alone.
        usage: `ExpertUsage.to_dict()`, or None.
    """

    name: str
    output_dir: str
    steps: int
    stop_reason: str | None
    trainable_parameters: int
    seconds_per_step: float | None
    before: Scores | None
    after: Scores | None
    metrics: dict[str, MetricName | None]
    usage: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dict(vars(self))


def print_reports(reports: Sequence[RunReport]) -> None:
    """Print all tables and where the adapters are."""
    console = out()
    for build in (score_table, run_table):
        table = build(reports)
        if table is not None:
            console.print(table)
    for report in reports:
        if report.usage is not None:
            title = f"{report.name}: where each task's {report.usage['counted']} went"
            console.print(title, style="italic", highlight=False)
            console.print(usage_table(report))
            console.print(usage_caption(report.usage) + "\n", style="dim", highlight=False)
    for report in reports:
        if report.stop_reason:
            console.print(f"{report.name} stopped at step {report.steps}: {report.stop_reason}", highlight=False)
    for report in reports:
        console.print(f"{report.name}: {report.output_dir}", highlight=False, markup=False, soft_wrap=True)


# -- the tables' cells, for the terminal and for Markdown ---------------------------------------------------------


def score_rows(reports: Sequence[RunReport]) -> tuple[list[str], list[list[list[str]]]]:
    """(header, sections of rows): metrics first, then losses, each with its mean. No rows without evaluation."""
    reports = [report for report in reports if report.after is not None]
    if not reports:
        return [], []
    before = next((report.before for report in reports if report.before is not None), None)
    names = [report.name for report in reports]
    header = ["task", "score", *(["before"] if before is not None else []), *names]
    columns = [*([before] if before is not None else []), *(report.after or {} for report in reports)]
    metrics = reports[0].metrics
    scored: list[tuple[str, str]] = [(task, metric) for task, metric in metrics.items() if metric is not None]
    sections = []
    for kind, rows in (("score", scored), ("loss", [(task, "loss") for task in metrics])):
        cells = [[task, name, *(_number(column, task, name) for column in columns)] for task, name in rows]
        if len(cells) > 1:
            cells.append(["mean", kind, *(_number(column, "mean", kind) for column in columns)])
        if cells:
            sections.append(cells)
    return header, sections


def _number(scores: Scores, task: str, name: str) -> str:
    value = scores.get(task, {}).get(name)
    return "–" if value is None else f"{value:.3f}"


def run_rows(reports: Sequence[RunReport]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) with the size and speed of each mixture."""
    header = ["mixture", "trainable parameters", "steps", "seconds per step"]
    rows = [
        [
            report.name,
            f"{report.trainable_parameters:,}",
            f"{report.steps:,}",
            "–" if report.seconds_per_step is None else f"{report.seconds_per_step:.3g}",
        ]
        for report in reports
    ]
    return header, rows


def usage_rows(usage: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) with each task's shares in percent: all experts, or the most used of many."""
    shares: dict[str, list[float]] = usage["shares"]
    names = short_names(usage["routers"][usage["router"]]["experts"])
    num_experts = len(names)
    if num_experts <= MANY_EXPERTS:
        header = ["task", *names]
        return header, [[task, *(f"{100 * value:.0f}" for value in values)] for task, values in shares.items()]
    rows = []
    for task, values in shares.items():
        top = sorted(range(num_experts), key=lambda expert: -values[expert])[:_MOST_USED]
        rows.append([task, "  ".join(f"{names[expert]}: {100 * values[expert]:.0f}" for expert in top)])
    return ["task", f"{_MOST_USED} most used of {num_experts} experts, expert: share"], rows


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of modules' names, where these differ."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return last if len(set(last)) == len(last) else list(names)


# -- rich ---------------------------------------------------------------------------------------------------------


def score_table(reports: Sequence[RunReport]) -> Table | None:
    """Each task's scores before and after; None without evaluation rows. The best of a row is bold."""
    from rich.table import Table

    header, sections = score_rows(reports)
    if not sections:
        return None
    table = Table(title="scores (losses: lower is better)")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for rows in sections:
        for row in rows:
            is_mean = row[0] == "mean"
            if is_mean:
                table.add_section()
            table.add_row(*row[:2], *_bold_best(row[2:], smallest=row[1] == "loss"))
        table.add_section()
    return table


def _bold_best(cells: list[str], *, smallest: bool) -> list[str]:
    numbers = [float(cell) for cell in cells if cell != "–"]
    if len(numbers) < 2:
        return cells
    best = f"{min(numbers) if smallest else max(numbers):.3f}"
    return [f"[bold]{cell}[/bold]" if cell == best else cell for cell in cells]


def run_table(reports: Sequence[RunReport]) -> Table:
    """Size and speed of each mixture."""
    from rich.table import Table

    header, rows = run_rows(reports)
    table = Table(title="mixtures")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def usage_table(report: RunReport) -> Table:
    """Where each task's tokens, or prompts, went. Large shares are bold, small ones dim."""
    from rich.table import Table

    assert report.usage is not None
    header, rows = usage_rows(report.usage)
    table = Table()
    many = len(header) == 2
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 or many else "right", overflow="fold")
    for row in rows:
        cells = row[1:] if many else [_shaded(cell, len(row) - 1) for cell in row[1:]]
        table.add_row(row[0], *cells)
    return table


def _shaded(cell: str, num_experts: int) -> str:
    """Bold where an expert gets 1.5 times its even share or more, dim below half of it."""
    even = 100 / num_experts
    if float(cell) >= 1.5 * even:
        return f"[bold]{cell}[/bold]"
    return f"[dim]{cell}[/dim]" if float(cell) < 0.5 * even else cell


def usage_caption(usage: dict[str, Any]) -> str:
    """What the numbers of a usage table are."""
    of = "selections" if usage["share_of"] == "selections" else "gate weight (every expert is always selected)"
    known = [router["task_information"] for router in usage["routers"].values()]
    return (
        f"% of {of} by expert at {usage['router']}, which tells tasks apart best of {len(known)} routers: task "
        f"information {max(known):.2f}, mean {sum(known) / len(known):.2f} (0 all tasks alike, 1 each its own experts)"
    )


# -- Markdown -----------------------------------------------------------------------------------------------------


def write_cards(reports: Sequence[RunReport]) -> None:
    """Put the results into the model card that was saved with each adapter."""
    from moadapt.saving import CARD_FILE

    for report in reports:
        path = Path(report.output_dir) / CARD_FILE
        before, use, after = path.read_text(encoding="utf-8").partition("\n## Use\n")
        results = f"\n## Results\n\n{markdown(reports, report)}\n"
        path.write_text(f"{before}{results}{use}{after}", encoding="utf-8")


def markdown(reports: Sequence[RunReport], of: RunReport) -> str:
    """The same tables as Markdown, with the usage of one mixture."""
    parts = []
    header, sections = score_rows(reports)
    if sections:
        parts.append(_markdown_table(header, [row for rows in sections for row in rows], left=2))
    parts.append(_markdown_table(*run_rows(reports)))
    if of.usage is not None:
        parts.append(f"Where each task's {of.usage['counted']} went: {usage_caption(of.usage)}.")
        parts.append(_markdown_table(*usage_rows(of.usage)))
    return "\n\n".join(parts)


def _markdown_table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    marks = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows))
