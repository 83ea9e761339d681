"""Looking into one recommendation: against the model's own logits, and with planted lies."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import NUM_ITEMS
from whyrec import Recommender
from whyrec.catalog.dataset import Item, read_items, write_items
from whyrec.decode.permitted import Rule
from whyrec.evaluation.beam_tree import Branch, beam_tree
from whyrec.evaluation.inspection import (
    Inspector,
    another_fact,
    change_word,
    changes,
    swap_item,
)
from whyrec.evaluation.trace_view import TraceReader
from whyrec.sid.vocabulary import code_token


def thinking(folder: Path, target: Path) -> Path:
    """A copy of a model folder that thinks, in ten tokens at most."""
    copy = Path(shutil.copytree(folder, target))
    values = json.loads((copy / "whyrec.json").read_text())
    thoughts = {"samples": 2, "max_tokens": 10, "temperature": 1.0}
    (copy / "whyrec.json").write_text(json.dumps(values | {"thoughts": thoughts}))
    return copy


@pytest.fixture(scope="module")
def thinks(saved_model, prepared_run, tmp_path_factory) -> Inspector:
    folder = thinking(saved_model, tmp_path_factory.mktemp("thinks") / "model")
    return Inspector.open(folder, run=prepared_run)


@pytest.fixture(scope="module")
def plain(saved_model, prepared_run) -> Inspector:
    return Inspector.open(saved_model, run=prepared_run)


def leaves(branches: list[Branch], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Branch]:
    """All branches by path."""
    found = {}
    for branch in branches:
        here = (*path, branch.code)
        found |= {here: branch} | leaves(branch.children, here)
    return found


def next_code_probabilities(recommender: Recommender, tokens: list[int], level: int) -> np.ndarray:
    """Over the whole level, from a plain forward pass."""
    vocabulary = recommender.encoder.vocabulary
    with torch.no_grad():
        logits_V = recommender.decoder.model(torch.tensor([tokens])).logits[0, -1].double()
    first = vocabulary.offsets[level]
    return logits_V[first : first + vocabulary.level_sizes[level]].exp().numpy()


@pytest.mark.parametrize("width", [3, 12])
def test_the_tree_holds_the_models_own_probabilities(plain: Inspector, extended, width) -> None:
    recommender = plain.recommender
    history = [3, 4, 5]
    prompt = recommender.encoder.recommendation_prompt(history)
    rule = Rule(excluded=history)
    items, branches = beam_tree(recommender.decoder, prompt, width=width, rule=rule)
    found = leaves(branches)
    codes_NL = extended.codes_NL.tolist()
    for path, branch in found.items():
        codes = [int(code.strip("<>").split("_")[2]) for code in path]
        assert [code_token(level, code) for level, code in enumerate(codes)] == list(path)
        before = codes[:-1]
        legal = {row[len(before)] for row in codes_NL if row[: len(before)] == before}
        offsets = recommender.encoder.vocabulary.offsets
        tokens = [*prompt, *(offsets[level] + code for level, code in enumerate(before))]
        weights = next_code_probabilities(recommender, tokens, len(before))
        expected = weights[codes[-1]] / sum(weights[code] for code in legal)
        assert branch.probability == pytest.approx(expected, rel=1e-4)
    for item, score in items:
        path = tuple(code_token(level, code) for level, code in enumerate(codes_NL[item]))
        assert found[path].item == item and found[path].log_prob == pytest.approx(score, abs=1e-4)
        steps = [found[path[: depth + 1]].probability for depth in range(len(path))]
        assert math.log(math.prod(steps)) == pytest.approx(score, abs=1e-4)
    shown = {branch.item for branch in found.values() if branch.item is not None}
    assert shown == {item for item, _ in items} and not shown & set(history)
    # what was left leads to no item of the list
    for path, branch in found.items():
        below = [b for p, b in found.items() if p[: len(path)] == path and b.item is not None]
        assert branch.left == (not below)


def test_items_are_those_of_recommend(plain: Inspector) -> None:
    history = plain.history_of("u03")
    ids = [plain.recommender.items[i].item_id for i in history]
    view = plain.look(history, width=20)
    expected = plain.recommender.recommend(ids)
    assert [plain.recommender.items[i].item_id for i in view.items] == [e.item_id for e in expected]
    assert [score for _, score in view.found] == pytest.approx(
        [e.score for e in expected], abs=1e-5
    )


def test_tokens_have_the_models_own_probabilities(thinks: Inspector) -> None:
    encoder = thinks.recommender.encoder
    history = [1, 2, 3]
    thought = "The history shares Genre 1 – naïve."
    view = thinks.look(history, thought=thought)
    assert view.trace is not None and view.trace.text == thought
    ids = [*encoder.text(thought), encoder.vocabulary.think_end]
    assert "".join(token.text for token in view.trace.tokens[:-1]) == thought
    assert view.trace.tokens[-1].text == "</think>"
    tokens = encoder.thinking_prompt(history)
    for token, told in zip(ids, view.trace.tokens, strict=True):
        with torch.no_grad():
            logits_V = thinks.recommender.decoder.model(torch.tensor([tokens])).logits[0, -1]
        assert told.probability == pytest.approx(float(logits_V.softmax(-1)[token]), rel=1e-3)
        tokens = [*tokens, token]


def test_a_sampled_thought_is_one_of_recommends(thinks: Inspector) -> None:
    history = thinks.history_of("u03")
    view = thinks.look(history, think=True)
    recommender = thinks.recommender
    ranked = recommender.rank_thinking([np.array(history)], width=10, keys=[0])
    assert view.trace is not None
    assert view.trace.text == ranked.texts(recommender.encoder)[0][0]
    # the same thought, given, leads to the same items
    ids = recommender.encoder.text(view.trace.text)
    if ids == ranked.thoughts[0][0]:
        assert thinks.look(history, thought=view.trace.text).items == view.items


def test_facts_are_linked_to_the_items_that_bear_them_and_lies_marked(prepared_run) -> None:
    reader = TraceReader(read_items(prepared_run / "dataset" / "items.parquet"))
    text = "The history shares Genre 1; Genre 3; Genre 99. Lately Genre 4. Next: Genre 2."
    view = reader.read(text, [1, 6, 2, 4, 12, 11], recommended=[7, 0, 22])
    by_name = {(claim.clause, claim.name): claim for claim in view.claims}
    told = by_name["evidence", "Genre 1"]
    assert told.true and told.places == (0, 1, 5)
    assert text[told.start : told.end] == "Genre 1"
    assert not by_name["evidence", "Genre 3"].true  # a genre, but not of this history
    assert by_name["evidence", "Genre 3"].places == ()
    assert not by_name["evidence", "Genre 99"].true  # an invention
    assert by_name["turn", "Genre 4"].true and by_name["turn", "Genre 4"].places == (3,)
    announced = by_name["next", "Genre 2"]
    assert announced.true and announced.recommended == (1, 3)
    assert {claim.name for claim in view.untrue} == {"Genre 3", "Genre 99"}
    # of the newest items only: it was so four items ago
    old = reader.read("Lately Genre 4. Next: Genre 2.", [4, 1, 2, 3])
    assert not old.claims[0].true and old.claims[0].places == (0,)


def test_free_text_is_read_for_names(prepared_run) -> None:
    reader = TraceReader(read_items(prepared_run / "dataset" / "items.parquet"))
    view = reader.read("After Film 3 they want Genre 2, surely, not Genre 4.", [3, 2])
    assert [(c.name, c.true, c.places) for c in view.claims] == [
        ("Genre 2", True, (1,)),
        ("Genre 4", False, ()),
    ]
    assert [title.places for title in view.titles] == [(0,)] and not view.well_formed
    assert reader.read("nothing at all", [1]).claims == ()


def test_a_model_that_cannot_think_is_looked_at_without(plain: Inspector) -> None:
    assert any("has not learnt to think" in sentence for sentence in plain.missing)
    view = plain.look([1, 2], think=True)
    assert view.trace is None and len(view.found) == 10
    assert any("without a thought" in sentence for sentence in view.missing)
    assert plain.look([1, 2]).missing == []
    assert another_fact(plain, view) is None


def test_a_very_long_history_is_cut_and_that_is_said(plain: Inspector) -> None:
    history = [n % 15 for n in range(500)]
    view = plain.look(history)
    assert view.history == history[-8:] and view.hidden == 492
    assert "500" in view.missing[0] and "newest 8" in view.missing[0]
    assert not set(view.items) & set(history)


def test_no_run_and_no_titles(model_folder: Path) -> None:
    items = read_items(model_folder / "items.parquet")
    write_items(model_folder / "items.parquet", [Item(items[0].item_id), *items[1:]])
    inspector = Inspector.open(model_folder)
    assert inspector.dataset is None and len(inspector.missing) == 3
    assert inspector.name(0) == f"(no title) {items[0].item_id}" and inspector.name(1) == "Film 1"
    history = inspector.some_history()
    assert len(inspector.look(history).found) == 10
    with pytest.raises(ValueError, match="no users without a run"):
        inspector.history_of("u00")


def test_users_of_the_run_beside_the_model(run: Path, saved_model: Path, tmp_path: Path) -> None:
    inspector = Inspector.open(Path(shutil.copytree(saved_model, run / "model" / "aligned")))
    assert inspector.dataset is not None
    test = inspector.dataset.examples("test")
    assert inspector.some_history() == test.histories[0].tolist()
    with pytest.raises(ValueError, match="there is no user 'u99'"):
        inspector.history_of("u99")
    write_items(run / "dataset" / "items.parquet", inspector.dataset.items[::-1])
    with pytest.raises(ValueError, match="different catalogues"):
        Inspector.open(saved_model, run=run)


def test_swaps_and_what_follows(thinks: Inspector) -> None:
    assert swap_item([1, 2, 3], -1, 9) == [1, 2, 9] and swap_item([1, 2, 3], 0, 9) == [9, 2, 3]
    with pytest.raises(ValueError, match="no place 3"):
        swap_item([1, 2, 3], 3, 9)
    assert change_word("Next: Genre 1.", "Genre 1", "Genre 2") == "Next: Genre 2."
    with pytest.raises(ValueError, match="does not say 'War'"):
        change_word("Next: Genre 1.", "War", "Peace")
    history = [1, 6]
    before = thinks.look(history, thought="The history shares Genre 1. Next: Genre 1.")
    pair = another_fact(thinks, before)
    assert pair is not None and pair[0] == "Genre 1" and pair[1] in {f"Genre {n}" for n in "0234"}
    after = thinks.look(swap_item(history, 0, 20))
    rows = changes(before, after)
    assert [row.item for row in rows[: len(after.items)]] == after.items
    assert {row.item for row in rows} == {*before.items, *after.items}
    for row in rows:
        assert row.before == (
            before.items.index(row.item) + 1 if row.item in before.items else None
        )
        assert row.after == (after.items.index(row.item) + 1 if row.item in after.items else None)


def test_more_items_than_there_are(plain: Inspector) -> None:
    view = plain.look(list(range(NUM_ITEMS - 3)), width=50, k=50)
    assert len(view.found) == 3
