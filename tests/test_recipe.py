"""Recipes: what is read, and what is refused in one sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from whyrec.recipe import load_recipe, recipe_config
from whyrec.train.align_recipe import AlignRecipe


@dataclass
class Demo:
    epochs: int = 3
    lr: float = 1e-3
    name: str = "x"
    force: bool = False
    sizes: tuple[int, ...] = (4, 4)
    limit: int | None = None
    share: float | None = 0.5


def read(tmp_path: Path, text: str, *overrides: str) -> Demo:
    (tmp_path / "demo.yaml").write_text(text, encoding="utf-8")
    return load_recipe(Demo, tmp_path / "demo.yaml", overrides)


def test_defaults() -> None:
    assert load_recipe(Demo, None) == Demo()


def test_values_of_every_type(tmp_path) -> None:
    found = read(
        tmp_path,
        "epochs: 5\nlr: 5e-4   # YAML 1.1 reads this as a string\nname: ünï\nforce: true\n"
        "sizes: [8, 16]\nlimit: 7\nshare: 1\n",
    )
    assert found == Demo(5, 5e-4, "ünï", True, (8, 16), 7, 1.0)
    assert isinstance(found.lr, float) and isinstance(found.share, float)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_recipe_is_the_defaults(tmp_path, text: str) -> None:
    assert read(tmp_path, text) == Demo()


def test_overrides_win(tmp_path) -> None:
    overrides = ["epochs=9", "lr=2e-5", "sizes=[1,2,3]", "limit=null", "name=a=b", "force=true"]
    found = read(tmp_path, "epochs: 5\nlimit: 3\n", *overrides)
    assert found == Demo(9, 2e-5, "a=b", True, (1, 2, 3), None)


def test_the_config_is_plain_and_reads_back(tmp_path) -> None:
    recipe = AlignRecipe(lr=3e-4, backbone="x")
    config: dict[str, Any] = recipe_config(recipe)
    assert AlignRecipe(**config) == recipe


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("epoch: 5", [], r"unknown key 'epoch'; did you mean 'epochs'\?"),
        ("zzz: 5", [], "unknown key 'zzz'; known keys: epochs, lr"),
        ("3: 5", [], "unknown key 3"),
        ("", ["epoch=5"], "did you mean 'epochs'"),
        ("", ["epochs"], "write it as key=value"),
        ("epochs: many", [], "epochs must be of type int, not 'many'"),
        ("epochs: 2.5", [], "epochs must be of type int, not 2.5"),
        ("epochs: true", [], "epochs must be of type int, not True"),
        ("epochs:", [], "epochs must be of type int, not None"),
        ("lr: fast", [], "lr must be of type float, not 'fast'"),
        ("lr: false", [], "lr must be of type float, not False"),
        ("name: 5", [], "name must be of type str, not 5"),
        ("force: 1", [], "force must be of type bool, not 1"),
        ("force: 'yes'", [], "force must be of type bool"),
        ("sizes: 4", [], "sizes must be a list, not 4"),
        ("sizes: [4, x]", [], "sizes must be of type int, not 'x'"),
        ("limit: x", [], "limit must be of type int, not 'x'"),
        ("- epochs", [], "must hold `key: value` lines"),
        ("just words", [], "must hold `key: value` lines"),
        ("epochs: [1", [], "is not valid YAML"),
        ("a:\n\t- b: ]", [], "is not valid YAML"),
        ("", ["sizes=[1"], r"--set sizes=\[1: the value is not valid YAML"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, text: str, overrides: list, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text, *overrides)
    assert "\n" not in str(error.value)


def test_refusals_name_the_file(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"demo\.yaml has the unknown key"):
        read(tmp_path, "epoch: 5")
    with pytest.raises(ValueError, match=r"demo\.yaml: epochs must be"):
        read(tmp_path, "epochs: x")
    with pytest.raises(ValueError, match=r"there is no recipe at .*missing\.yaml"):
        load_recipe(Demo, tmp_path / "missing.yaml")


def test_bytes_that_are_no_text(tmp_path) -> None:
    (tmp_path / "demo.yaml").write_bytes(b"epochs: \xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(Demo, tmp_path / "demo.yaml")


def test_every_recipe_of_the_repository_loads() -> None:
    recipes = Path(__file__).parents[1] / "recipes"
    found = sorted(recipes.glob("*/align.yaml"))
    assert found
    for path in found:
        load_recipe(AlignRecipe, path)
