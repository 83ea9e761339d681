"""A model folder loads as a whole or says in one sentence what is wrong with it."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import LEVEL_SIZES, NUM_ITEMS
from whyrec.decode.model_folder import (
    CATALOGUE_FILES,
    Settings,
    load_model_folder,
    save_model_folder,
)
from whyrec.sid.trie import Trie


@pytest.fixture(scope="module")
def saved(extended, prepared_run, tmp_path_factory) -> Path:
    """A model folder of random weights; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "aligned"
    save_model_folder(
        folder,
        model=copy.deepcopy(extended.model),
        tokenizer=extended.tokenizer,
        settings=Settings("aligned", "tiny", list(LEVEL_SIZES), max_history=8),
        dataset_folder=prepared_run / "dataset",
        sids_folder=prepared_run / "sids",
    )
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_what_was_saved_comes_back(saved, extended) -> None:
    parts = load_model_folder(saved)
    assert parts.settings == Settings("aligned", "tiny", list(LEVEL_SIZES), 8)
    assert parts.items == extended.dataset.items and len(parts.items) == NUM_ITEMS
    assert torch.equal(parts.codes_NL, extended.codes_NL)
    assert parts.vocabulary == extended.vocabulary
    assert parts.encoder.recommendation_prompt([3, 1]) == extended.encoder.recommendation_prompt(
        [3, 1]
    )
    assert not parts.model.training and parts.model.dtype == torch.float32
    ids = torch.tensor([extended.encoder.recommendation_prompt([3, 1])])
    with torch.no_grad():
        torch.testing.assert_close(parts.model(ids).logits, extended.model(ids).logits)


def test_plain_transformers_loads_it(saved, extended) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("<|sid_begin|><s_a_1><s_b_2><s_c_0><|sid_end|>", return_tensors="pt").input_ids
    assert ids[0].tolist() == [
        extended.vocabulary.begin,
        *extended.vocabulary.encode([1, 2, 0]),
        extended.vocabulary.end,
    ]
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 5, len(tokenizer))


def test_weights_may_be_of_another_type(saved) -> None:
    assert load_model_folder(saved, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_it_brings_its_own_templates(folder) -> None:
    template = folder / "prompts" / "recommend.yaml"
    template.write_text('system: "Be brief."\nuser: "{history} then"\n', encoding="utf-8")
    parts = load_model_folder(folder)
    prompt = parts.tokenizer.decode(parts.encoder.recommendation_prompt([0]))
    assert "Be brief." in prompt and " then" in prompt


def test_a_folder_that_is_none(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"not a WhyRec model folder .* `whyrec align`"):
        load_model_folder(tmp_path)
    with pytest.raises(ValueError, match="not a WhyRec model folder"):
        load_model_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"stage": "aligned"}', '{"other": 1}'])
def test_damaged_settings(folder, text) -> None:
    (folder / "whyrec.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="copy the model folder again"):
        load_model_folder(folder)


@pytest.mark.parametrize(
    "name", ["items.parquet", "sids.parquet", "trie.safetensors", "prompts/recommend.yaml"]
)
def test_a_part_is_missing(folder, name) -> None:
    (folder / name).unlink()
    with pytest.raises((ValueError, OSError), match=name.removeprefix("prompts/")):
        load_model_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_model_is_missing_or_damaged(folder, name) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot load"):
        load_model_folder(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError):
        load_model_folder(folder)


def test_parts_of_another_catalogue(folder, extended) -> None:
    others = extended.codes_NL[:-1]
    Trie.build(others, level_sizes=LEVEL_SIZES).save(folder / "trie.safetensors")
    with pytest.raises(ValueError, match=r"29 items and the catalogue 30.*different catalogues"):
        load_model_folder(folder)


def test_settings_of_another_trie(folder) -> None:
    settings = json.loads((folder / "whyrec.json").read_text())
    (folder / "whyrec.json").write_text(json.dumps(settings | {"level_sizes": [4, 4, 8]}))
    with pytest.raises(ValueError, match=r"do not|different"):
        load_model_folder(folder)


def test_every_catalogue_file_is_copied(saved, prepared_run) -> None:
    for name in CATALOGUE_FILES:
        assert (saved / name).read_bytes() == (prepared_run / "sids" / name).read_bytes()
