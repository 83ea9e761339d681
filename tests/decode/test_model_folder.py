"""A model folder loads as a whole or says in one sentence what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import LEVEL_SIZES, NUM_ITEMS
from whyrec.catalog.dataset import Item
from whyrec.catalog.withheld import withheld
from whyrec.decode.model_folder import (
    CATALOGUE_FILES,
    Settings,
    load_model_folder,
    read_settings,
)
from whyrec.prompting.encoder import item_text
from whyrec.sid.trie import Trie


def test_what_was_saved_comes_back(saved_model, extended) -> None:
    parts = load_model_folder(saved_model)
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


def test_plain_transformers_loads_it(saved_model, extended) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    ids = tokenizer("<|sid_begin|><s_a_1><s_b_2><s_c_0><|sid_end|>", return_tensors="pt").input_ids
    assert ids[0].tolist() == [
        extended.vocabulary.begin,
        *extended.vocabulary.encode([1, 2, 0]),
        extended.vocabulary.end,
    ]
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 5, len(tokenizer))


def test_weights_may_be_of_another_type(saved_model) -> None:
    assert load_model_folder(saved_model, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_it_brings_its_own_templates(model_folder) -> None:
    template = model_folder / "prompts" / "recommend.yaml"
    template.write_text('system: "Be brief."\nuser: "{history} then"\n', encoding="utf-8")
    parts = load_model_folder(model_folder)
    prompt = parts.tokenizer.decode(parts.encoder.recommendation_prompt([0]))
    assert "Be brief." in prompt and " then" in prompt


def test_a_folder_that_is_none(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"not a WhyRec model folder .* `whyrec align`"):
        load_model_folder(tmp_path)
    with pytest.raises(ValueError, match="not a WhyRec model folder"):
        load_model_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"stage": "aligned"}', '{"other": 1}'])
def test_damaged_settings(model_folder, text) -> None:
    (model_folder / "whyrec.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="copy the model folder again"):
        load_model_folder(model_folder)


@pytest.mark.parametrize(
    "name", ["items.parquet", "sids.parquet", "trie.safetensors", "prompts/recommend.yaml"]
)
def test_a_part_is_missing(model_folder, name) -> None:
    (model_folder / name).unlink()
    with pytest.raises((ValueError, OSError), match=name.removeprefix("prompts/")):
        load_model_folder(model_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_model_is_missing_or_damaged(model_folder, name) -> None:
    whole = (model_folder / name).read_bytes()
    (model_folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot load"):
        load_model_folder(model_folder)
    (model_folder / name).unlink()
    with pytest.raises(ValueError):
        load_model_folder(model_folder)


def test_parts_of_another_catalogue(model_folder, extended) -> None:
    others = extended.codes_NL[:-1]
    Trie.build(others, level_sizes=LEVEL_SIZES).save(model_folder / "trie.safetensors")
    with pytest.raises(ValueError, match=r"29 items and the catalogue 30.*different catalogues"):
        load_model_folder(model_folder)


def test_settings_of_another_trie(model_folder) -> None:
    settings = json.loads((model_folder / "whyrec.json").read_text())
    (model_folder / "whyrec.json").write_text(json.dumps(settings | {"level_sizes": [4, 4, 8]}))
    with pytest.raises(ValueError, match=r"do not|different"):
        load_model_folder(model_folder)


def test_a_folder_of_before_is_read_where_it_misses_nothing(model_folder) -> None:
    path = model_folder / "whyrec.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"shortlist": 0, "neighbour_grades": False}))
    assert read_settings(model_folder).level_sizes == settings["level_sizes"]
    path.write_text(json.dumps(settings | {"shortlist": 12}))
    with pytest.raises(ValueError, match=r"another version of WhyRec .*shortlist"):
        read_settings(model_folder)


def test_every_catalogue_file_is_copied(saved_model, prepared_run) -> None:
    for name in CATALOGUE_FILES:
        assert (saved_model / name).read_bytes() == (prepared_run / "sids" / name).read_bytes()


def test_notes_of_a_folder_and_what_training_may_see(prepared_run: Path, extended) -> None:
    items = [*extended.dataset.items, Item("bare")]
    settings = Settings(
        "aligned", "tiny", list(LEVEL_SIZES), 8, withheld=0.5, note_events=3, text_tokens=4
    )
    notes = settings.notes(items, visits=prepared_run / "nothing.parquet")
    assert notes is not None and notes.visits is None
    assert notes.text(0) == item_text(items[0]) and notes.text(len(items) - 1) == ""
    hidden = settings.notes(items, visits=prepared_run / "nothing.parquet", training=True)
    silent_N = withheld(items, share=0.5)
    assert hidden is not None and 0 < silent_N.sum() < len(items)
    assert all((hidden.text(n) == "") == silent_N[n] for n in range(len(items) - 1))
    assert (
        Settings("aligned", "tiny", list(LEVEL_SIZES), 8, neighbours=0, note_events=3).notes(
            items, visits=prepared_run
        )
        is None
    )
