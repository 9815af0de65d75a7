"""`moadapt inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moadapt.cli.arguments import AdapterPath, BaseModel, Dtype, UseCpu, checked_dtype
from moadapt.cli.console import guarded, is_main_process, note, out, quiet_libraries
from moadapt.errors import ConfigError

OTHER = "other"
"""Folder for the other model of a comparison."""


def _print_schema(value: bool) -> None:
    if value:
        from moadapt.statistics.document import routing_schema

        typer.echo(json.dumps(routing_schema(), indent=2))
        raise typer.Exit


@guarded
def inspect(
    adapter: AdapterPath,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE|CONFIG",
            help="Rows with prompt, response and, if there are several, task; or a YAML file with tasks.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="For routing.json, routing.parquet and routing.html."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="OTHER", help="Another adapter, or a later checkpoint, on the same rows."),
    ] = None,
    max_samples: Annotated[int, typer.Option("--max-samples", min=1, metavar="N", help="Most rows of a task.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Rows at a time.")] = 8,
    texts: Annotated[int, typer.Option("--texts", min=0, metavar="N", help="Rows of each task to show as text.")] = 2,
    vocabulary: Annotated[
        bool, typer.Option("--vocabulary/--no-vocabulary", help="Also find the tokens that an expert takes most of.")
    ] = False,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Also generate answers, and record the decoding.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer, with --generate.")
    ] = 64,
    trace: Annotated[
        int | None,
        typer.Option("--trace", min=1, metavar="N", help="Write the first N decisions to trace.parquet, too."),
    ] = None,
    base: BaseModel = None,
    dtype: Dtype = None,
    cpu: UseCpu = False,
    schema: Annotated[
        bool, typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print routing.json's JSON Schema.")
    ] = False,
) -> None:
    """Show who is routed where: load, balance, entropy, and whether tasks get their own experts.

    ADAPTER is an adapter, a converted model, or a mixture-of-experts model of transformers (Mixtral, Qwen-MoE, OLMoE).
    Without --data it reads the held-out rows of the tasks that the adapter was trained on. Prints a table and verdicts
    in plain words; --output writes routing.json (all numbers), routing.parquet (counts) and routing.html (a report
    that opens offline). Several processes share the work under torchrun.

    [bold]Examples[/bold]

      moadapt inspect runs/my-run --output inspected
      moadapt inspect runs/my-run --data rows.jsonl --generate --output inspected
      moadapt inspect runs/my-run/checkpoint-500 --compare runs/my-run --output inspected
    """
    from moadapt.cli.inspect_passes import Options, inspected
    from moadapt.cli.inspecting import find_data, find_subject, read_rows
    from moadapt.cli.processes import joined_processes, progress_bar
    from moadapt.pretrained import load_tokenizer
    from moadapt.statistics.compare import Selections, compare_documents

    quiet_libraries()
    if output is not None and output.is_file():
        raise ConfigError(f"--output: {output} is a file; name a folder")
    if trace is not None and output is None:
        raise ConfigError("--trace: needs --output DIR, where trace.parquet goes")
    checked = None if dtype is None else checked_dtype(dtype)
    names = [adapter] if compare is None else [adapter, compare]
    subjects = [find_subject(name, base, checked, cpu) for name in names]
    tokenizers = [load_tokenizer(subject.config) for subject in subjects]
    source = find_data(subjects[0], tokenizers[0], data)
    rows = [read_rows(source, *pair, max_samples) for pair in zip(subjects, tokenizers, strict=True)]
    for line in rows[0].notes:
        note(line)
    # Rows that both models read as the same tokens can be compared one by one.
    selections = Selections() if compare is not None and rows[0].examples == rows[-1].examples else None
    options = Options(batch_size, texts, vocabulary, max_new_tokens if generate else None, trace)
    folders = [output, None if output is None else output / OTHER]
    documents: list[dict[str, Any]] = []
    with joined_processes(subjects[0].config.training) as processes, progress_bar() as progress:
        for index, subject in enumerate(subjects):
            folder = folders[index]
            if folder is not None and processes.is_main:
                folder.mkdir(parents=True, exist_ok=True)
            documents.append(
                inspected(
                    subject,
                    rows[index],
                    tokenizers[index],
                    options,
                    processes,
                    progress,
                    folder=folder,
                    selections=selections,
                    compares=index == 1,
                )
            )
    if not is_main_process():
        return
    if compare is not None:
        shared = None if selections is None else selections.shared
        documents[0]["compare"] = compare_documents(documents[0], documents[1], shared)
    _print(documents)
    for document, folder in zip(documents, folders, strict=False):
        if folder is not None:
            _write(document, folder)


def _print(documents: list[dict[str, Any]]) -> None:
    from moadapt.cli.inspect_tables import comparison_tables, routing_tables, verdict_lines

    console = out()
    for document in documents:
        for part in (*routing_tables(document), verdict_lines(document)):
            console.print(part, highlight=False)
    if "compare" in documents[0]:
        for part in comparison_tables(documents[0]):
            console.print(part, highlight=False)


def _write(document: dict[str, Any], folder: Path) -> None:
    from moadapt.report import render_report
    from moadapt.statistics.document import for_report

    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    (folder / "routing.json").write_text(text + "\n", encoding="utf-8")
    (folder / "routing.html").write_text(render_report(for_report(document)), encoding="utf-8")
    out().print(f"{folder / 'routing.html'}", highlight=False, markup=False, soft_wrap=True)
