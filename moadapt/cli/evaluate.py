"""`moadapt eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moadapt.cli.arguments import AdapterPath, BaseModel, Overrides
from moadapt.cli.console import guarded, is_main_process, note, out, quiet_libraries


@guarded
def evaluate(
    adapter: AdapterPath,
    config_path: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="The YAML file with the tasks; default: the one that train saved beside the adapter.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write scores and generated answers as JSON, too."),
    ] = None,
    base: BaseModel = None,
    losses_only: Annotated[bool, typer.Option("--losses-only", help="Skip the metrics, which generate text.")] = False,
) -> None:
    """Evaluate an adapter on each task of a config.

    Prints a table with the loss and, where the config names one, the metric of each task. Without CONFIG it takes the
    tasks that the adapter was trained on, and finds the same held-out rows. Several processes share the work under
    torchrun, with the same scores.

    [bold]Examples[/bold]

      moadapt eval runs/my-run
      moadapt eval runs/my-run/checkpoint-500 --output scores.json
      moadapt eval runs/my-run other.yaml data.tasks.0.max_eval_samples=100
    """
    from moadapt.cli.adapters import load_for_inference, saved_config, with_base
    from moadapt.cli.processes import computing, joined_processes, progress_bar
    from moadapt.errors import ConfigError
    from moadapt.pretrained import load_tokenizer
    from moadapt.run_config import load_run_config
    from moadapt.train.collate import Collator
    from moadapt.train.evaluation import evaluate_tasks
    from moadapt.train.tasks import load_tasks

    quiet_libraries()
    given, explicit = list(overrides or []), config_path
    if explicit is not None and "=" in explicit:  # no CONFIG, the first argument is an override
        given, explicit = [explicit, *given], None
    path = Path(explicit) if explicit is not None else saved_config(adapter)
    if path is None and not given:
        raise ConfigError(f"{adapter} has no config.yaml beside it; give a CONFIG with the tasks")
    config = load_run_config(path, given, needs=("data",))
    config = with_base(config, adapter, base, prefer_config=explicit is not None)
    assert config.data is not None
    with joined_processes(config.training) as processes:
        tokenizer = load_tokenizer(config)
        model = load_for_inference(config, adapter)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        tasks = load_tasks(config.data, tokenizer, is_encoder_decoder=encoder_decoder, seed=config.training.seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with progress_bar() as progress:
            result = evaluate_tasks(
                model,
                tokenizer,
                tasks,
                Collator(pad or 0, config.data.padding_side, encoder_decoder),
                batch_size=config.training.per_device_eval_batch_size,
                processes=processes,
                computing=lambda: computing(config.training, processes),
                eos_token=config.data.eos_token,
                metrics=not losses_only,
                progress=progress,
            )
    if not is_main_process():
        return
    out().print(f"{adapter} on {config.model_name_or_path}", highlight=False, markup=False, soft_wrap=True)
    out().print(result.table())
    if output is not None:
        document = {
            "adapter": adapter,
            "base_model": config.model_name_or_path,
            **result.to_dict(),
            "predictions": result.predictions,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        note(f"wrote {output}")
