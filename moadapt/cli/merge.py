"""`moadapt merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moadapt.cli.arguments import AdapterPath, BaseModel, Dtype, checked_dtype, refuse_filled
from moadapt.cli.console import guarded, note, quiet_libraries


@guarded
def merge(
    adapter: AdapterPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the plain model.", show_default=False)],
    base: BaseModel = None,
    dtype: Dtype = None,
) -> None:
    """Fold an adapter into its base model and write a plain model.

    The result loads without moadapt, as any model of transformers. It is exact, so it works only where the routing
    does not depend on the input: with one expert (preset [bold]lora[/bold]). A mixture whose router looks at the
    tokens has no single weight that equals it, and is refused.

    [bold]Example[/bold]

      moadapt merge runs/lora --output merged
      moadapt merge runs/lora --output merged --base ./my-model --dtype float32
    """
    from moadapt.cli.adapters import load_for_inference, with_base
    from moadapt.pretrained import load_tokenizer
    from moadapt.run_config import RunConfig
    from moadapt.train.training_config import TrainingConfig

    quiet_libraries()
    refuse_filled(output, "--output")
    options = RunConfig.model_validate({"dtype": checked_dtype(dtype), "training": TrainingConfig(use_cpu=True)})
    config = with_base(options, adapter, base)
    tokenizer = load_tokenizer(config)
    model = load_for_inference(config, adapter).merge_and_unload()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    note(f"wrote the merged model to {output}")
