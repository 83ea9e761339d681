"""Meanings of codes against counts by hand, and how catalogues lie in their SIDs."""

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import NUM_ITEMS
from whyrec.catalog.dataset import Item, read_items, write_items
from whyrec.evaluation.code_space import level_balance, map_2d, shared_prefixes
from whyrec.evaluation.codes import (
    Catalogue,
    code_meanings,
    code_words,
    load_catalogue,
    log_odds,
    name_of,
)


def planted() -> Catalogue:
    """Four first codes of eight items each, combs by Kent and three soaps; no title twice."""
    items = [Item(f"c{n}", f"Comb {n:02d}x", "Kent", ("Beauty", "Combs")) for n in range(8)]
    for kind in "abc":
        items += [
            Item(f"{kind}{n}", f"Soap {n:02d}{kind}", "", ("Beauty", f"Soaps {kind}"))
            for n in range(8)
        ]
    codes_NL = np.array([[n // 8, n % 8] for n in range(32)])
    return Catalogue(items, codes_NL, (4, 8), None, [])


def test_words_are_what_a_code_has_and_others_lack() -> None:
    combs, soaps, *_ = code_meanings(planted(), level=0)
    assert {(w.kind, w.text) for w in combs.words} == {
        ("category", "Combs"),
        ("brand", "Kent"),
        ("title", "comb"),
    }
    assert {w.text for w in soaps.words} == {"Soaps a"}  # "Beauty" and "soap" tell little
    assert all(w.count == 8 and w.z > 1.96 for w in [*combs.words, *soaps.words])
    assert sorted(combs.items) == list(range(8))
    # at the second level every code has a comb and a soap: nothing to tell
    assert all(not meaning.words for meaning in code_meanings(planted(), level=1))
    assert set(code_words(planted())) == {f"<s_a_{code}>" for code in range(4)}


def test_a_word_of_one_item_is_no_meaning() -> None:
    items = [Item("a", "Zebra", "", ("X",)), Item("b", "", "", ("X",)), Item("c", "", "", ("Y",))]
    catalogue = Catalogue(items, np.array([[0, 0], [0, 1], [1, 0]]), (2, 2), None, [])
    assert all(w.text != "zebra" for m in code_meanings(catalogue, level=0) for w in m.words)


def test_behind_a_prefix_items_are_compared_with_each_other_only() -> None:
    catalogue = planted()
    found = code_meanings(catalogue, level=1, prefix=[1])
    assert [meaning.items for meaning in found] == [[8 + n] for n in range(8)]
    with pytest.raises(ValueError, match="no item's SID begins"):
        code_meanings(catalogue, level=1, prefix=[7])
    with pytest.raises(ValueError, match="levels are 0 to 1"):
        code_meanings(catalogue, level=2)


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=5))
def test_log_odds_by_hand(rows: list[list[int]]) -> None:
    counts = np.array(rows, dtype=float)
    z = log_odds(counts)
    total = counts.sum()
    if not total:
        assert not z.any()
        return
    strength = 0.1 * total / len(rows)
    for group, term in np.ndindex(*counts.shape):
        prior = strength * counts[:, term].sum() / total
        if not prior:
            assert z[group, term] == 0
            continue
        own, size = counts[group, term], counts[group].sum()
        other, others = counts[:, term].sum() - own, total - size
        if min(size + strength - own - prior, others + strength - other - prior) <= 1e-9:
            continue  # the group says nothing but this term
        delta = math.log((own + prior) / (size + strength - own - prior))
        delta -= math.log((other + prior) / (others + strength - other - prior))
        error = math.sqrt(1 / (own + prior) + 1 / (other + prior))
        assert z[group, term] == pytest.approx(delta / error, abs=1e-9)


def test_balance_and_cells_are_counted_right(prepared_run: Path) -> None:
    catalogue = load_catalogue(prepared_run)
    codes = catalogue.codes_NL.tolist()
    for balance in level_balance(catalogue):
        counts = Counter(row[balance.level] for row in codes)
        assert {k: c for k, c in enumerate(balance.counts_K.tolist()) if c} == dict(counts)
        share = [count / NUM_ITEMS for count in counts.values()]
        entropy = -sum(p * math.log(p) for p in share) / math.log(balance.size)
        assert balance.entropy == pytest.approx(entropy) and balance.used == len(counts)
    for cell in shared_prefixes(catalogue):
        groups = Counter(tuple(row[: cell.depth]) for row in codes)
        assert cell.cells == len(groups)
        assert cell.sharing == pytest.approx(
            sum(count for count in groups.values() if count > 1) / NUM_ITEMS
        )
        prefix, members = cell.largest
        assert len(members) == max(groups.values()) == groups[prefix]
        assert all(tuple(codes[item][: cell.depth]) == prefix for item in members)
    assert shared_prefixes(catalogue)[-1].sharing == 0  # every item has its own SID


def test_the_map_is_that_of_the_singular_vectors() -> None:
    vectors_ND = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    xy_N2, shares = map_2d(vectors_ND)
    centred = vectors_ND - vectors_ND.mean(0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(xy_N2), np.abs(left[:, :2] * scale[:2]), atol=1e-9)
    np.testing.assert_allclose(shares, scale[:2] ** 2 / (scale**2).sum())


def test_a_model_folder_and_its_run_say_the_same(saved_model: Path, prepared_run: Path) -> None:
    model, run = load_catalogue(saved_model), load_catalogue(prepared_run)
    assert [i.item_id for i in model.items] == [i.item_id for i in run.items]
    assert (model.codes_NL == run.codes_NL).all() and model.level_sizes == run.level_sizes
    assert model.missing == run.missing == [] and model.vectors_ND is not None
    typical = code_meanings(model, level=0)[0].items
    vectors = model.vectors_ND[typical]
    distances = np.linalg.norm(vectors - vectors.mean(0), axis=1)
    assert (np.diff(distances) >= 0).all()


def test_what_is_missing_is_said_and_the_rest_shown(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "embeddings.safetensors").unlink()
    items = read_items(model_folder / "items.parquet")
    untitled = [Item(i.item_id, "", i.brand, i.categories, "") for i in items]
    write_items(model_folder / "items.parquet", [untitled[0], *items[1:]])
    catalogue = load_catalogue(model_folder)
    assert catalogue.vectors_ND is None and len(catalogue.missing) == 2
    assert "no item vectors" in catalogue.missing[0] and "1 of 30" in catalogue.missing[1]
    assert name_of(catalogue.items[0]) == f"(no title) {items[0].item_id}"
    assert code_meanings(catalogue, level=0)
    with pytest.raises(ValueError, match="holds no SIDs"):
        load_catalogue(tmp_path / "nowhere")


def test_vectors_of_another_catalogue_are_not_used(run: Path) -> None:
    from safetensors.numpy import save_file

    path = run / "sids" / "embeddings.safetensors"
    save_file({"vectors_ND": np.ones((3, 4), np.float32)}, path)
    catalogue = load_catalogue(run)
    assert catalogue.vectors_ND is None and "other items" in catalogue.missing[0]
    shutil.rmtree(run)
