"""Traces on planted models: one that says what is so and recommends what it says, one that lies."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import NUM_ITEMS, NUM_USERS
from whyrec import Recommender
from whyrec.catalog.dataset import Dataset, Examples
from whyrec.decode.ranking import Ranking
from whyrec.decode.think import ThoughtSettings
from whyrec.evaluation import traces as traces_module
from whyrec.evaluation.thinking import Thinking
from whyrec.evaluation.traces import distinct_ngrams, swap_category, trace_figures
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.trace import read_trace
from whyrec.reasoning.wording import packaged_wording


@pytest.fixture(scope="module")
def recommender(saved_model, tmp_path_factory) -> Recommender:
    folder = Path(shutil.copytree(saved_model, tmp_path_factory.mktemp("thinks") / "model"))
    values = json.loads((folder / "whyrec.json").read_text())
    thoughts = {"samples": 1, "max_tokens": 30, "temperature": 0.0}
    (folder / "whyrec.json").write_text(json.dumps(values | {"thoughts": thoughts}))
    return Recommender.from_pretrained(folder)


@pytest.fixture(scope="module")
def few(extended) -> Examples:
    """Users whose prompts show two items, so that other genres are left to swap in."""
    test = extended.dataset.examples("test")
    return Examples(test.users_E, [h[-2:] for h in test.histories], test.targets_E)


def genre(item: int) -> int:
    return item % 5  # of the tiny catalogue


def planted(monkeypatch, recommender: Recommender, *, follows: bool) -> None:
    """A decoder that recommends the announced genre, or always the same one."""

    def rank_prompts(decoder, prompts, histories, *, width, **_) -> list[Ranking]:
        items_EW = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in zip(items_EW, prompts, strict=True):
            text = recommender.encoder.tokenizer.decode(prompt)
            found = re.findall(r"Next: Genre (\d)", text) if follows else []
            wanted = int(found[-1]) if found else 0
            row[:] = sorted(range(NUM_ITEMS), key=lambda n: (genre(n) != wanted, n))[:width]
        return [Ranking(items_EW, np.zeros(items_EW.shape))]

    monkeypatch.setattr(traces_module, "rank_prompts", rank_prompts)


def measure(recommender, dataset: Dataset, few: Examples, texts: list[str], path: Path) -> dict:
    encoder = recommender.encoder
    thinking = Thinking({}, [[encoder.text(t)] for t in texts], ThoughtSettings(1, 30, 0.0), 0.1)
    return trace_figures(
        recommender,
        dataset,
        few,
        thinking,
        beams=10,
        template_folder=Path("nowhere"),
        path=path,
    )


def true_traces(few: Examples) -> list[str]:
    return [
        f"The history shares Genre {genre(int(h[-1]))}. Next: Genre {genre(int(h[-1]))}."
        for h in few.histories
    ]


@pytest.mark.parametrize("follows", [True, False])
def test_a_decoder_that_follows_and_one_that_does_not(
    recommender, extended, few, tmp_path, monkeypatch, follows
) -> None:
    planted(monkeypatch, recommender, follows=follows)
    path = tmp_path / "eval" / "traces.parquet"
    figures = measure(recommender, extended.dataset, few, true_traces(few), path)
    assert figures["trace/facts_true"] == figures["trace/well_formed"] == 1
    assert figures["trace/facts_named"] == 2 and figures["trace/swapped"] == 1
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == NUM_USERS
    for row, history in zip(rows, few.histories, strict=True):
        assert row["history"] == [extended.dataset.items[i].item_id for i in history]
        assert row["swapped_category"] not in {f"Genre {genre(int(i))}" for i in history}
        assert row["swapped_trace"].endswith(f"Next: {row['swapped_category']}.")
        assert row["follows"] is follows
    if follows:
        assert figures["trace/decoder_follows"] == 1
        assert figures["trace/agreement/category"] == pytest.approx(0.6)  # six films a genre
        assert figures["trace/new_category/after"] == pytest.approx(0.6)
        assert figures["trace/new_category/before"] < 0.6
        assert figures["trace/kept/shuffled"] < 1 and figures["trace/kept/swapped"] < 1
    else:
        assert figures["trace/decoder_follows"] == 0
        kept = [figures[key] for key in figures if key.startswith("trace/kept/")]
        assert kept == [1] * 5


def test_lies_and_repetition_are_counted(recommender, extended, few, tmp_path, monkeypatch) -> None:
    planted(monkeypatch, recommender, follows=True)
    lies = [
        f"The history shares Genre {(genre(int(h[-1])) + 2) % 5}. Next: Genre 9."
        for h in few.histories
    ]
    figures = measure(recommender, extended.dataset, few, lies, tmp_path / "x.parquet")
    assert figures["trace/facts_true"] == 0 and figures["trace/swapped"] == 0
    assert "trace/decoder_follows" not in figures
    same = ["They like it."] * len(few)
    figures = measure(recommender, extended.dataset, few, same, tmp_path / "y.parquet")
    assert figures["trace/distinct"] == 1 / NUM_USERS
    assert figures["trace/distinct_1"] == 3 / (3 * NUM_USERS)
    assert figures["trace/well_formed"] == figures["trace/facts_named"] == 0


def test_a_swapped_trace_is_in_the_same_words(extended) -> None:
    book, wording = FactBook(extended.dataset.items), packaged_wording()
    text = "They keep to Genre 1. So next comes Genre 1."
    trace = read_trace(text, book)
    seen = set()
    for seed in range(20):
        swap = swap_category(trace, [1, 2], book, wording, np.random.default_rng(seed))
        assert swap is not None
        assert swap.text == f"They keep to Genre 1. So next comes {swap.category.name}."
        seen.add(swap.category.name)
    assert seen == {"Genre 0", "Genre 3", "Genre 4"}
    nothing = read_trace("They keep to Genre 1.", book)
    assert swap_category(nothing, [1], book, wording, np.random.default_rng(0)) is None


def test_distinct_ngrams() -> None:
    assert distinct_ngrams(["a b a", "a b"], 1) == 2 / 5
    assert distinct_ngrams(["a b a", "a b"], 2) == 2 / 3
    assert distinct_ngrams(["a"], 2) == 0
