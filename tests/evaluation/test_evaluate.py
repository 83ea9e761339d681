"""`evaluate`: its figures are those of scoring every item, one by one, with the plain model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import LEVEL_SIZES, NUM_ITEMS, NUM_USERS, make_run, save_model
from whyrec.catalog.prepare import PrepareRecipe, prepare
from whyrec.evaluation import comparison, prior
from whyrec.evaluation import evaluate as evaluate_module
from whyrec.evaluation.evaluate import evaluate
from whyrec.evaluation.metrics import paired_gain_interval, ranking_metrics
from whyrec.evaluation.report import figures_table
from whyrec.evaluation.results import read_results
from whyrec.evaluation.sasrec import SasrecRecipe
from whyrec.evaluation.tiger import TigerRecipe
from whyrec.stage import fingerprint, run_stage

MAX_HISTORY = 6  # shorter than the histories, so that cutting is tested too
SASREC = SasrecRecipe(dim=8, layers=1, heads=1, max_length=8, epochs=2)
TIGER = TigerRecipe(dim=8, layers=1, heads=1, max_length=8, epochs=1, beam_width=10)


@pytest.fixture(scope="module")
def finished(extended, prepared_run, tmp_path_factory) -> Path:
    """A run with a model of random weights; not to be changed."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(prepared_run, run)

    def build(folder: Path) -> None:
        save_model(folder, run, extended, max_history=MAX_HISTORY)

    run_stage(
        run / "model" / "aligned",
        build,
        stage="align",
        config={"seed": 7},
        inputs={"sids": run / "sids"},
    )
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@torch.no_grad()
def brute_force_scores(extended, history: list[int]) -> np.ndarray:
    """log p of every item's SID, each code renormalised over the codes that go on legally."""
    prompt = extended.encoder.recommendation_prompt(history[-MAX_HISTORY:])
    codes = extended.codes_NL.tolist()
    tokens = [extended.vocabulary.encode(sid) for sid in codes]
    ids = torch.tensor([[*prompt, *sid] for sid in tokens])
    # Only the positions before a code and the last: the head over all text tokens is slow.
    logits_NTV = extended.model(ids, logits_to_keep=len(LEVEL_SIZES) + 1).logits
    scores = []
    for n, sid in enumerate(codes):
        total = 0.0
        for level, code in enumerate(sid):
            legal = sorted({other[level] for other in codes if other[:level] == sid[:level]})
            row = [extended.vocabulary.offsets[level] + other for other in legal]
            log_probs = logits_NTV[n, level, row].log_softmax(0)
            total += float(log_probs[legal.index(code)])
        scores.append(total)
    return np.array(scores)


def brute_force_ranks(extended, examples, *, exclude: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each target (0: it cannot come) and the first ten items of each user."""
    ranks, tops = [], []
    for history, target in zip(examples.histories, examples.targets_E, strict=True):
        scores = brute_force_scores(extended, history.tolist())
        if exclude:
            scores[np.unique(history)] = -np.inf
        order = [n for n in np.argsort(-scores) if np.isfinite(scores[n])]
        ranks.append(order.index(target) + 1 if target in order else 0)
        tops.append(order[:10])
    return np.array(ranks), np.array(tops)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_figures_equal_brute_force(run, extended, split) -> None:
    figures = evaluate(run / "model" / "aligned", run, split=split, beams=NUM_ITEMS + 3)
    examples = extended.dataset.examples(split)
    for history, exclude in (("excluded", True), ("kept", False)):
        ranks_E, tops_E10 = brute_force_ranks(extended, examples, exclude=exclude)
        found = {k.split("/")[-1]: v for k, v in figures.items() if f"/{history}/" in k}
        prefix = f"whyrec/{split}/{history}"
        for k in (5, 10, 20):
            hit_E = (ranks_E > 0) & (ranks_E <= k)
            gain_E = np.where(hit_E, 1 / np.log2(np.maximum(ranks_E, 1) + 1), 0)
            assert figures[f"{prefix}/R@{k}"] == pytest.approx(hit_E.mean())
            assert figures[f"{prefix}/N@{k}"] == pytest.approx(gain_E.mean())
            reciprocal_E = np.where(hit_E, 1 / np.maximum(ranks_E, 1), 0)
            assert figures[f"{prefix}/MRR@{k}"] == pytest.approx(reciprocal_E.mean())
        shown = np.unique(tops_E10)
        assert figures[f"{prefix}/coverage"] == pytest.approx(len(shown) / NUM_ITEMS)
        assert 0 < found["gini"] < 1
        for name in ("R@10", "N@10", "MRR", "coverage", "gini", "legal"):
            low, high = figures[f"{prefix}/{name}/low"], figures[f"{prefix}/{name}/high"]
            assert low <= figures[f"{prefix}/{name}"] <= high
        # Lists of 33 places cannot be filled from 30 items, or fewer: nothing is missing.
        assert figures[f"{prefix}/legal"] == 1.0


def test_a_narrow_beam_is_wide_enough_to_be_exact_here(run) -> None:
    """All legal continuations of 30 items over 4 x 4 prefixes fit into 16 beams."""
    narrow = evaluate(run / "model" / "aligned", run, split="test", beams=20)
    wide = evaluate(run / "model" / "aligned", run, split="test", beams=NUM_ITEMS)
    for name in ("R@10", "N@10", "coverage", "gini"):
        assert narrow[f"whyrec/test/kept/{name}"] == wide[f"whyrec/test/kept/{name}"]


def test_the_record(run, tmp_path) -> None:
    figures = evaluate(
        run / "model" / "aligned",
        run,
        split="test",
        beams=20,
        sasrec_recipe=SASREC,
        command="whyrec evaluate X --run Y",
        json_path=tmp_path / "results" / "new" / "seed-7.json",
    )
    (entry,) = read_results(tmp_path / "results" / "new")
    assert entry["figures"] == figures
    assert entry["command"] == "whyrec evaluate X --run Y" and entry["seed"] == 7
    assert entry["name"] == "run test" and entry["data_sha256"] == fingerprint(run / "dataset")
    assert list(entry) == [
        *("name", "command", "commit", "date", "device", "seed", "versions"),
        *("data_sha256", "figures"),
    ]
    in_run = json.loads((run / "eval" / "results.json").read_text())
    assert in_run["figures"] == figures
    assert figures["evaluate/seconds"] > 0
    models = {key.split("/")[0] for key in figures} - {"gain_over", "evaluate"}
    counted = {"popularity", "co-visitation", "co-visitation-tuned", "counts-and-words"}
    assert models == {"whyrec", "sasrec"} | counted
    for model in models:
        for history in ("excluded", "kept"):
            for metric in ("R@5", "R@10", "N@5", "N@10", "MRR", "coverage", "gini", "legal"):
                for key in (metric, f"{metric}/low", f"{metric}/high"):
                    assert 0 <= figures[f"{model}/test/{history}/{key}"] <= 1
    table = figures_table(figures)
    for model in models:  # two histories; figures, intervals and gains
        assert table.count(f"\n{model} ") == (4 if model == "whyrec" else 6)
    assert f"{figures['sasrec/test/kept/N@10']:.4f}" in table


def test_popularity_is_what_counting_gives(run, extended) -> None:
    figures = evaluate(run / "model" / "aligned", run, split="test", beams=20, sasrec_recipe=SASREC)
    dataset = extended.dataset
    counts = np.bincount(np.concatenate(dataset.training_sequences()), minlength=NUM_ITEMS)
    hits = []
    for history, target in zip(*_test_events(dataset), strict=True):
        allowed = [n for n in range(NUM_ITEMS) if n not in history]
        best = sorted(allowed, key=lambda n: (-counts[n], n))[:10]
        hits.append(target in best)
    assert figures["popularity/test/excluded/R@10"] == pytest.approx(np.mean(hits))


def _test_events(dataset) -> tuple[list, list]:
    examples = dataset.examples("test")
    return examples.histories, examples.targets_E.tolist()


def test_trained_baselines_are_kept_for_every_split_and_user(run, capsys, monkeypatch) -> None:
    model = run / "model" / "aligned"
    recipes = {"sasrec_recipe": SASREC, "tiger_recipe": TIGER}
    first = evaluate(model, run, split="test", beams=20, **recipes)
    assert "unchanged" not in capsys.readouterr().err
    for name in ("sasrec", "tiger"):
        record = json.loads((run / "eval" / f"{name}-seed-7" / "stage.json").read_text())
        assert record["config"]["seed"] == 7  # our model's, not the recipe's
        assert record["summary"]["epoch"] >= 1 and "excluded/N@10" in record["summary"]["valid"]
    with monkeypatch.context() as patch:
        patch.setattr(comparison.sasrec, "train", None)
        patch.setattr(comparison.tiger, "train", None)
        again = evaluate(model, run, split="test", beams=20, **recipes)
        assert again | {"evaluate/seconds": first["evaluate/seconds"]} == first
        told = capsys.readouterr().err
        assert "sasrec: unchanged" in told and "tiger: unchanged" in told
        few = evaluate(model, run, split="test", beams=20, users=6, **recipes)
        valid = evaluate(model, run, split="valid", beams=20, **recipes)
    assert few.keys() == first.keys() and few != first
    assert {key.replace("/valid/", "/test/") for key in valid} == set(first)
    capsys.readouterr()
    other = SasrecRecipe(**{**vars(SASREC), "dropout": 0.9})
    evaluate(model, run, split="test", beams=20, sasrec_recipe=other)
    assert "unchanged" not in capsys.readouterr().err


def test_a_killed_training_of_a_baseline_is_done_again(run, monkeypatch) -> None:
    model = run / "model" / "aligned"
    with monkeypatch.context() as patch:
        patch.setattr(comparison.torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, run, split="test", beams=20, tiger_recipe=TIGER)
    assert not (run / "eval" / "tiger-seed-7").exists()
    figures = evaluate(model, run, split="test", beams=20, tiger_recipe=TIGER)
    assert 0 <= figures["tiger/test/excluded/N@10"] <= 1
    assert (run / "eval" / "tiger-seed-7" / "weights.pt").exists()
    assert not any(key.startswith(("sasrec", "popularity")) for key in figures)


def test_gains_are_paired_differences(run, extended) -> None:
    model = run / "model" / "aligned"
    figures = evaluate(model, run, split="test", beams=20, sasrec_recipe=SASREC, tiger_recipe=TIGER)
    for name in ("popularity", "co-visitation", "sasrec", "tiger"):
        for history in ("excluded", "kept"):
            for metric in ("R@10", "N@10"):
                where = f"test/{history}/{metric}"
                gain = figures[f"whyrec/{where}"] - figures[f"{name}/{where}"]
                assert figures[f"gain_over/{name}/{where}"] == pytest.approx(gain)
    assert not any(key.startswith("gain_over/whyrec") for key in figures)


def test_gain_intervals_are_those_of_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    targets_E = rng.integers(0, 40, 300)
    ranked = {
        f"{name}/test/kept": np.stack([rng.permutation(40)[:k] for _ in targets_E])
        for name, k in (("whyrec", 30), ("sasrec", 20))
    }
    figures = comparison.gain_figures(ranked, targets_E)
    ours, theirs = (
        ranking_metrics(ranked[f"{name}/test/kept"], targets_E, cutoffs=(10,))["N@10"]
        for name in ("whyrec", "sasrec")
    )
    gain = paired_gain_interval(ours, theirs)
    key = "gain_over/sasrec/test/kept/N@10"
    assert figures[key] == pytest.approx(gain.difference)
    assert figures[f"{key}/low"] == pytest.approx(gain.difference_low, abs=0.004)
    assert figures[f"{key}/high"] == pytest.approx(gain.difference_high, abs=0.004)


def test_the_prior_has_rows_of_its_own(run, extended, capsys) -> None:
    model = run / "model" / "aligned"
    pure = evaluate(model, run, split="test", beams=NUM_ITEMS)
    none = evaluate(model, run, split="test", beams=NUM_ITEMS, prior_weight=0.0)
    assert none["prior/weight"] == 0.0
    for metric in ("R@5", "N@10", "MRR", "coverage"):
        for history in ("excluded", "kept"):
            key = f"test/{history}/{metric}"
            assert (
                none[f"whyrec+counts-and-words/{key}"]
                == none[f"whyrec/{key}"]
                == pure[f"whyrec/{key}"]
            )
    capsys.readouterr()
    chosen = evaluate(model, run, split="test", beams=NUM_ITEMS, prior_weight="auto")
    weight = chosen["prior/weight"]
    assert f"chosen on validation: {weight}\n" in capsys.readouterr().err
    # The ring is what counts know best and random weights do not know at all.
    assert weight > 0
    for history in ("excluded", "kept"):
        assert chosen[f"whyrec+counts-and-words/test/{history}/N@10"] > (
            pure[f"whyrec/test/{history}/N@10"] + 0.2
        )
    table = figures_table(chosen)
    assert table.count("\nwhyrec+counts-and-words") == 4 and table.endswith(
        f"\nprior/weight {weight}"
    )


def test_the_priors_weight_is_the_best_on_validation(run, extended) -> None:
    model = run / "model" / "aligned"
    weight = evaluate(model, run, split="test", beams=20, prior_weight="auto")["prior/weight"]
    reached = {
        w: evaluate(model, run, split="valid", beams=20, prior_weight=w)[
            "whyrec+counts-and-words/valid/excluded/N@10"
        ]
        for w in (0.0, weight, 0.95)
    }
    assert reached[weight] == max(reached.values()) > reached[0.0]
    assert weight in prior.WEIGHTS


@pytest.mark.parametrize("weight", [-0.1, 1.5, 2, float("nan")])
def test_a_weight_that_is_no_share_is_refused(run, weight) -> None:
    with pytest.raises(ValueError, match="weight must lie between 0 and 1"):
        evaluate(run / "model" / "aligned", run, split="test", beams=20, prior_weight=weight)


def test_language_and_captions_are_told_beside_the_ranking(run, backbone) -> None:
    settings_file = run / "model" / "aligned" / "whyrec.json"
    settings = json.loads(settings_file.read_text()) | {"backbone": str(backbone)}
    settings_file.write_text(json.dumps(settings))
    figures = evaluate(run / "model" / "aligned", run, split="test", beams=20, language=True)
    kept, base = figures["language/perplexity"], figures["language/base_perplexity"]
    assert figures["language/perplexity_ratio"] == pytest.approx(kept / base)
    assert figures["caption_all/items"] == NUM_ITEMS
    assert 0 <= figures["caption_all/category_accuracy"] <= 1
    assert figures["caption_all/category_majority"] == pytest.approx(6 / 30)
    assert not any("brand" in key for key in figures)  # the ring's items have none
    table = figures_table(figures)
    assert f"language/perplexity_ratio {kept / base:.4g}" in table
    assert "caption_all/category_accuracy 0 [0.0000, 0.0000]" in table


def test_a_subset_of_the_users_is_fixed(run, extended) -> None:
    model = run / "model" / "aligned"
    few = evaluate(model, run, split="test", beams=NUM_ITEMS, users=6)
    examples = extended.dataset.examples("test").take(6, seed=0)
    ranks_E, _ = brute_force_ranks(extended, examples, exclude=False)
    expected = ((ranks_E > 0) & (ranks_E <= 10)).mean()
    assert few["whyrec/test/kept/R@10"] == pytest.approx(expected)
    everybody = evaluate(model, run, split="test", beams=NUM_ITEMS, users=10_000)
    assert len(extended.dataset.examples("test")) == NUM_USERS
    ranks_E, _ = brute_force_ranks(extended, extended.dataset.examples("test"), exclude=False)
    expected = ((ranks_E > 0) & (ranks_E <= 10)).mean()
    assert everybody["whyrec/test/kept/R@10"] == pytest.approx(expected)


def test_a_model_of_another_catalogue_is_refused(run, tmp_path) -> None:
    other = make_run(tmp_path / "other", num_items=NUM_ITEMS - 3)
    with pytest.raises(ValueError, match=r"30 items and .* 27: .*different catalogues"):
        evaluate(run / "model" / "aligned", other, split="test", beams=20)
    assert not (other / "eval").exists()


def test_an_empty_split_is_refused(run, tmp_path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id\na,x\na,y\nb,x\nb,y\n")
    prepare(tmp_path / "short", PrepareRecipe(source=str(tmp_path / "log.csv"), k_core=0))
    with pytest.raises(ValueError, match=r"the test split of .* holds no users; prepare"):
        evaluate(run / "model" / "aligned", tmp_path / "short", split="test", beams=20)


def test_an_unfinished_run_is_refused(run, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"missing or incomplete; run `whyrec prepare SOURCE"):
        evaluate(run / "model" / "aligned", tmp_path / "nothing", split="test", beams=20)
    (run / "dataset" / "stage.json").unlink()
    with pytest.raises(ValueError, match="missing or incomplete"):
        evaluate(run / "model" / "aligned", run, split="test", beams=20)


def test_too_few_beams_are_refused_at_once(run) -> None:
    with pytest.raises(ValueError, match="beams must be at least 10"):
        evaluate(run / "model" / "aligned", run, split="test", beams=9)


def test_a_model_without_its_history_has_seed_0(run, capsys) -> None:
    (run / "model" / "aligned" / "stage.json").unlink()
    evaluate(run / "model" / "aligned", run, split="test", beams=20)
    assert "its seed is recorded as 0" in capsys.readouterr().err
    assert json.loads((run / "eval" / "results.json").read_text())["seed"] == 0


def test_what_was_measured_before_a_failure_is_kept(run, tmp_path, monkeypatch) -> None:
    def killed(*_: object, **__: object) -> dict:
        raise KeyboardInterrupt

    path = tmp_path / "seed-7.json"
    for step, known in (("rank_baselines", "whyrec"), ("language_figures", "popularity")):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate_module, step, killed)
            with pytest.raises(KeyboardInterrupt):
                evaluate(
                    run / "model" / "aligned",
                    run,
                    split="test",
                    beams=20,
                    sasrec_recipe=SASREC,
                    language=True,
                    json_path=path,
                )
        figures = json.loads(path.read_text())["figures"]
        assert f"{known}/test/excluded/R@10" in figures
        assert not any(key.startswith(("language/", "caption/")) for key in figures)
