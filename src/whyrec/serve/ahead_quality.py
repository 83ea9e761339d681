"""What Think-Ahead is worth: the model that thinks now, that does not, and that thought before.

    whyrec think-ahead MODEL --run RUN --evaluate valid

For each user of a split the item to be found is the next one. `whyrec` closes the thought at once
and `whyrec-think` thinks after all that the user has done. `whyrec-ahead` was prepared when the
newest `news` events had not happened yet, and folds them in: its prompt holds them behind the old
thought, and its beam stays inside the old prefixes, as `/v1/recommendations` does. Users with too
few events to take so many away are prepared after what they have, one event at least.

Figures, history excluded: `ROW/SPLIT/excluded/R@10` and the like, `think_gain/...` and
`ahead_gain/...` over `whyrec`, paired by user; `cost/ROW/seconds` a user, in batches as large as
the device takes, where `ahead` counts what is left to do online and `prepare` what was done before.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from whyrec.catalog.dataset import Dataset, Examples
from whyrec.decode.permitted import Rule
from whyrec.decode.ranking import Ranking, batches, no_ranking
from whyrec.decode.recommender import Recommender
from whyrec.decode.thought_ranking import by_thought, fuse
from whyrec.evaluation.metrics import ranking_metrics
from whyrec.evaluation.results import record
from whyrec.evaluation.thinking import think_gains
from whyrec.serve.ahead_worker import AheadSettings, AheadWorker
from whyrec.stage import fingerprint

Made = tuple[list[list[int]], list[list[list[int]]]]


def evaluate_ahead(
    folder: Path,
    run: Path,
    *,
    split: str,
    users: int = 0,
    news: int = 1,
    beams: int = 20,
    thoughts: int | None = None,
    width: int = 50,
    levels: int | None = None,
    device: str | None = None,
    command: str = "",
    json_path: Path | None = None,
) -> dict[str, float]:
    """The figures of the three rows; see this module.

    Args:
        folder: a model folder that has learnt to think.
        run: the run folder with its data set.
        split: `valid` or `test`.
        users: a fixed random subset of so many; 0 for all.
        news: events since the thoughts were prepared.
        beams: beam width, and how many items are ranked.
        thoughts, width, levels, device: as for `think_ahead`.
        command: how this was called, for the record.
        json_path: where the record is written.

    Raises:
        ValueError: when the model cannot think, is of another catalogue, or a setting makes no
            sense.
    """
    if beams < 10 or news < 0:
        raise ValueError(
            "the beam must be at least 10 wide, for metrics at 10, and news not below 0"
        )
    dataset = Dataset.load(run / "dataset")
    recommender = Recommender.from_pretrained(folder, device=device)
    if [i.item_id for i in recommender.items] != [i.item_id for i in dataset.items]:
        raise ValueError(f"{folder} and {run} have different catalogues; name the model's own run")
    settings = AheadSettings.of(recommender, thoughts=thoughts, width=width, levels=levels)
    examples = dataset.examples(split)  # type: ignore[arg-type]
    examples = examples.at_most(users)
    if not len(examples):
        raise ValueError(f"the {split} split of {run} holds no users; prepare a larger log")
    keys = examples.users_E.tolist()
    seconds: dict[str, float] = {}

    start = time.perf_counter()
    (plain,) = recommender.rank(examples.histories, width=beams, progress="no thought")
    seconds["plain"] = time.perf_counter() - start

    start = time.perf_counter()
    ranked = recommender.rank_thinking(
        examples.histories, width=beams, settings=settings.thoughts, keys=keys, progress="thinking"
    )
    seconds["think"] = time.perf_counter() - start

    start = time.perf_counter()
    worker = AheadWorker(recommender, settings)
    before = [h[: max(len(h) - news, 1)].tolist() for h in examples.histories]
    made: list[Made] = [([], [])] * len(before)
    for batch in worker.batches(before):
        found = worker.prepare([before[n] for n in batch], keys=[keys[n] for n in batch])
        for n, one in zip(batch, found, strict=True):
            made[n] = one
    seconds["prepare"] = time.perf_counter() - start

    start = time.perf_counter()
    ahead = rank_ahead(recommender, examples, made, plain=plain, width=beams)
    seconds["ahead"] = time.perf_counter() - start

    figures = {f"cost/{name}/seconds": value / len(examples) for name, value in seconds.items()}
    figures["ahead/news"], figures["ahead/users"] = float(news), float(len(examples))
    rows = {"whyrec": plain, "whyrec-think": ranked.rankings[0], "whyrec-ahead": ahead}
    for name, ranking in rows.items():
        found_E = ranking_metrics(ranking.items_EW, examples.targets_E, cutoffs=(10,))
        for metric, values in found_E.items():
            figures[f"{name}/{split}/excluded/{metric}"] = float(np.mean(values))
    tokens = float(np.mean([sum(map(len, own)) for own in ranked.thoughts]))
    others = {"think": ranked.rankings[0], "ahead": ahead}
    figures |= think_gains(plain, others, examples.targets_E, tokens=tokens)
    if json_path is not None:
        record(
            json_path,
            name="think-ahead",
            command=command,
            seed=0,
            figures=figures,
            data_sha256=fingerprint(run / "dataset"),
        )
    return figures


def rank_ahead(
    recommender: Recommender,
    examples: Examples,
    made: Sequence[Made],
    *,
    plain: Ranking,
    width: int,
) -> Ranking:
    """Rank after thoughts of an earlier day, inside their prefixes, history excluded.

    Args:
        recommender: the model.
        examples: whose histories are those of today.
        made: of each example, the thoughts and the prefixes behind each.
        plain: ranks those for whom the prefixes hold fewer than 10 items, as the server does.
        width: beam width.
    """
    decoder, encoder = recommender.decoder, recommender.encoder
    newest = slice(-recommender.settings.max_history, None)
    prompts = [
        [encoder.answer_prompt(history[newest].tolist(), thought) for thought in thoughts]
        for history, (thoughts, _) in zip(examples.histories, made, strict=True)
    ]
    samples = len(prompts[0])
    ranking = no_ranking(len(prompts), width=width)
    sizes = [sum(map(len, own)) for own in prompts]
    for batch in batches(sizes, device=decoder.device.type):
        rules = [
            Rule(examples.histories[n].tolist(), None, prefixes)
            for n in batch
            for prefixes in made[n][1]
        ]
        prefilled = decoder.prefill([one for n in batch for one in prompts[n]], width=width)
        beams = decoder.search(prefilled, width=width, permitted=decoder.permitted(rules))
        mixed = fuse(by_thought(beams, samples=samples), weights=[1] * samples, width=width)
        for place, n in enumerate(batch):
            enough = (mixed.items_EW[place] >= 0).sum() >= 10
            source, row = (mixed, place) if enough else (plain, n)
            ranking.items_EW[n] = source.items_EW[row]
            ranking.scores_EW[n] = source.scores_EW[row]
    return ranking
