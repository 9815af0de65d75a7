"""`key=value` texts from the command line, put into a config's nested options."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moadapt.errors import ConfigError

_KEY = re.compile(r"[^\s.\[\]=]+(\.[^\s.\[\]=]+|\[\d+\])*")


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with the overrides put in, later ones over earlier ones.

    A key is a path of names and list positions (`training.max_steps`, `data.tasks.0.path`, `data.tasks[0].path`).
    Sections that are missing are made; the position behind the last entry of a list appends. A value is YAML, so
    `null`, `true`, `5e-4`, `[1, 2]` and `{kind: lora, r: 8}` mean what they mean in the file.

    Raises:
        ConfigError: lists every override that cannot be used.
    """
    result = copy.deepcopy(data)
    problems = []
    for text in overrides:
        try:
            key, value = parse_override(text)
            _put(result, key, value)
        except ValueError as error:
            problems.append(f"  {text}: {error}")
    if problems:
        count = f"{len(problems)} override{'s' if len(problems) > 1 else ''} cannot be used"
        raise ConfigError(f"{count}\n" + "\n".join(problems))
    return result


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `key=value` into the key's parts and the value.

    Raises:
        ValueError: no `=`, a malformed key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError("an override is written key=value, as training.max_steps=100")
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a path of option names, as training.max_steps or data.tasks.0.path")
    return re.sub(r"\[(\d+)\]", r".\1", key).split("."), _parse_value(value)


def _parse_value(text: str) -> Any:
    structured = text.lstrip()[:1] in ("[", "{", "'", '"')
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if structured:
            raise ValueError(f"the value is not valid YAML: {str(error).splitlines()[0]}") from None
        return text
    # `Question: {q}` is a text here, not a mapping; a mapping is written with braces.
    return text if isinstance(value, (dict, list)) and not structured else value


def _put(data: dict[str, Any], key: list[str], value: Any) -> None:
    node: Any = data
    for depth, part in enumerate(key):
        here = ".".join(key[:depth])
        last = depth == len(key) - 1
        if isinstance(node, list):
            index = _position(node, part, here)
            if index == len(node):
                node.append(None)
            if last:
                node[index] = value
            elif node[index] is None:
                node[index] = _new_section(key[depth + 1])
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif node.get(part) is None:
                node[part] = _new_section(key[depth + 1])
            node = node[part]
        else:
            raise ValueError(f"{here} is {node!r} and has no options of its own; override {here} as a whole")


def _new_section(first_part: str) -> dict[str, Any] | list[Any]:
    return [] if first_part.isdigit() else {}


def _position(node: list[Any], part: str, here: str) -> int:
    if not part.isdigit():
        raise ValueError(f"{here} is a list; name an entry by its position, as {here}.0")
    if int(part) > len(node):
        raise ValueError(f"{here} has {len(node)} entries; use a position from 0 to {len(node)} (which appends)")
    return int(part)
