"""The released MovieLens-100K checkpoint that thinks: what it says, and what follows."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from whyrec import Recommender
from whyrec.catalog.dataset import Dataset
from whyrec.prompting.templates import load_templates
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.trace import check_trace, read_trace
from whyrec.reasoning.wording import Wording

TOP = Path(__file__).resolve().parents[2]
USERS, WIDTH = 50, 10


def test_real_items_after_thoughts_that_are_true() -> None:
    run = TOP / "runs" / "ml-100k"
    folder = run / "model" / "activated"
    assert folder.exists(), "there is no runs/ml-100k/model/activated: make thinking"
    recommender = Recommender.from_pretrained(folder, device="cpu")
    dataset = Dataset.load(run / "dataset")
    examples = dataset.examples("test").at_most(USERS)
    ranked = recommender.rank_thinking(
        examples.histories,
        width=WIDTH,
        settings=replace(recommender.thoughts, samples=1),
        keys=examples.users_E.tolist(),
    )
    items_EW = ranked.rankings[0].items_EW
    for history, items in zip(examples.histories, items_EW.tolist(), strict=True):
        assert len(set(items)) == WIDTH and not {-1, *history.tolist()} & set(items)

    texts = [own[0] for own in ranked.texts(recommender.encoder)]
    assert all(text.strip() for text in texts)
    assert ranked.closed_EG.mean() >= 0.95  # by the model, within its budget
    book = FactBook(dataset.items)
    wording = Wording(load_templates("rationale", folder / "prompts"))
    shown = [h[-recommender.settings.max_history :].tolist() for h in examples.histories]
    checks = [
        check_trace(read_trace(text, book, wording=wording), history, book)
        for text, history in zip(texts, shown, strict=True)
    ]
    assert np.mean([check.named > 0 for check in checks]) >= 0.95
    assert sum(check.true for check in checks) >= 0.95 * sum(check.named for check in checks)
