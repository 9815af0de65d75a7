"""Text files for commands that measure perplexity, or calibrate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moadapt.cli.console import note
from moadapt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from moadapt.train.text import CalibrationConfig

TextColumn = Annotated[
    str | None,
    typer.Option("--text-column", metavar="NAME", help="Column of the text (default: text), in a file with columns."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=2, metavar="N", help="Tokens of the text to read, from its beginning on.")
]
MaxLength = Annotated[int, typer.Option("--max-length", min=8, metavar="N", help="Tokens of one row.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Rows at a time.")]


def refuse_without_text(context: typer.Context, text: str | None, *names: str, hint: str = "") -> None:
    """Options about the text of `--text` mean nothing without it.

    Args:
        context: of the command.
        text: what `--text` says.
        names: the parameters of these options.
        hint: more to say, with `{}` for the parameter.

    Raises:
        ConfigError: one of them was given, and `--text` was not.
    """
    if text is not None:
        return
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise ConfigError(f"--{name.replace('_', '-')} needs --text{hint.format(name)}")


def read_text(options: CalibrationConfig, tokenizer: Any, model_config: Any) -> list[dict[str, Tensor]]:
    """Batches from a text file, in rows that the model has positions for.

    Raises:
        DataError: the file cannot be used, or holds no text.
    """
    from moadapt.train.text import text_batches

    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    length = options.max_length
    if isinstance(limit, int) and limit < length:
        note(f"{options.path}: rows of {limit} tokens, which is as many positions as the model has")
        length = limit
    return text_batches(
        options.path,
        tokenizer,
        text_column=options.text_column,
        sample_by=options.sample_by,
        max_length=max(length, 8),
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        is_encoder_decoder=bool(model_config.is_encoder_decoder),
    )
