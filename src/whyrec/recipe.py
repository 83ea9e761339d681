"""Recipes: flat YAML files read into dataclasses, with unknown keys and wrong types refused."""

import dataclasses
import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def load_recipe(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a recipe.

    Args:
        cls: the stage's recipe dataclass; its fields are the known keys.
        path: a YAML file of `key: value` lines, or None for the defaults.
        overrides: `key=value` strings, as `--set` gives them; values are read as YAML.

    Raises:
        ValueError: for a missing file, broken YAML, an unknown key or a value of the wrong type.

    Example:
        >>> @dataclasses.dataclass
        ... class Demo:
        ...     epochs: int = 3
        >>> load_recipe(Demo, None, ["epochs=5"])
        Demo(epochs=5)
    """
    values = _read_yaml(path) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: write it as key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--set {override}: the value is not valid YAML") from None
    hints = get_type_hints(cls)
    source = str(path) if path is not None else "the recipe"
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise ValueError(f"{source} has the unknown key {key!r}; {hint}")
    checked = {key: _check(value, hints[key], f"{source}: {key}") for key, value in values.items()}
    return cls(**checked)


def recipe_config(recipe: Any) -> dict[str, object]:
    """A recipe as plain JSON values, for `stage.json`."""
    return dataclasses.asdict(recipe)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no recipe at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, one a setting")
    return values


def _check(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`, or say in one sentence what was expected."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _check(value, next(a for a in args if a is not type(None)), where)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {value!r}")
        return origin(_check(entry, args[0], where) for entry in value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-4 as a string
        except ValueError:
            pass
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise ValueError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value
