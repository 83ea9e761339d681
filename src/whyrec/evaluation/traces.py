"""`whyrec evaluate --traces`: are traces true, and do the recommended items follow them?

The first thought of each user is read back (`reasoning/trace.py`) and checked against the history
and the catalogue. Then the same beam runs again, history excluded, behind another thought in its
place: none at all, another user's, its first half, its words shuffled, and the trace announcing
another category (drawn from those that no item of the history bears). A decoder that follows its
traces recommends items of that category then; one that does not was talking for show.

    figures = trace_figures(recommender, dataset, examples, thinking, beams=20,
                            template_folder=model / "prompts", path=run / "eval/traces.parquet")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from whyrec.catalog.dataset import Dataset, Examples, write_table
from whyrec.decode.ranking import rank_prompts
from whyrec.decode.recommender import Recommender
from whyrec.evaluation.metrics import ranking_metrics
from whyrec.evaluation.thinking import Thinking
from whyrec.prompting.templates import load_templates
from whyrec.reasoning.facts import Fact, FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.reasoning.trace import Trace, agreement, check_trace, read_free_text, read_trace
from whyrec.reasoning.wording import Wording

_TOP = 10
_FEWEST_BEARERS = 10  # of a category that is swapped in: enough for a top 10


@dataclass(frozen=True)
class Swap:
    """A trace that announces another category.

    Attributes:
        text: the trace.
        category: the narrowest one that it announces now.
    """

    text: str
    category: Fact


def trace_figures(
    recommender: Recommender,
    dataset: Dataset,
    examples: Examples,
    thinking: Thinking,
    *,
    beams: int,
    template_folder: Path,
    path: Path,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the traces of all examples and write a table of them.

    Args:
        recommender: the model.
        dataset: the catalogue and the users.
        examples: whose traces these are.
        thinking: the traces.
        beams: beam width.
        template_folder: the model's own words; the packaged ones where it has none.
        path: Parquet file of traces, checks and top tens.
        seed: of what is drawn.

    Returns:
        `trace/facts_true`, `/well_formed`, `/possible`, `/distinct`, `/distinct_1`, `/distinct_2`;
        `trace/agreement/KIND` of the top 10, and `/others` with another user's top 10; for each
        other thought WHAT, `trace/kept/WHAT` (share of the top 10 that stays) and
        `trace/N@10/WHAT`; `trace/swapped` (share of users whose category could be swapped),
        `trace/decoder_follows` (share of these whose top 10 then holds more of the new category)
        and `trace/new_category/before` and `/after` (share of the top 10).
    """
    has_own = (template_folder / "rationale.yaml").exists()
    wording = Wording(load_templates("rationale", template_folder if has_own else None))
    book, encoder = FactBook(dataset.items), recommender.encoder
    finder = MentionFinder(book)
    own = [thoughts[0] for thoughts in thinking.thoughts]
    texts = [encoder.tokenizer.decode(ids) for ids in own]
    shown = [h[-recommender.settings.max_history :].tolist() for h in examples.histories]
    traces = [_read(text, book, wording, finder) for text in texts]
    checks = [
        check_trace(trace, history, book) for trace, history in zip(traces, shown, strict=True)
    ]
    rng = np.random.default_rng(seed)
    swaps = [
        swap_category(trace, history, book, wording, rng)
        for trace, history in zip(traces, shown, strict=True)
    ]

    def top(name: str, thoughts: Sequence[Sequence[int]]) -> np.ndarray:
        prompts = [encoder.answer_prompt(h, ids) for h, ids in zip(shown, thoughts, strict=True)]
        (ranking,) = rank_prompts(
            recommender.decoder,
            prompts,
            examples.histories,
            width=beams,
            progress=f"traces: {name}",
        )
        return ranking.items_EW[:, :_TOP]

    others: dict[str, list[list[int]]] = {
        "empty": [[] for _ in own],
        "other_user": [own[n - 1] for n in range(len(own))],
        "truncated": [ids[: len(ids) // 2] for ids in own],
        "shuffled": [encoder.text(_shuffled(text, rng)) for text in texts],
        "swapped": [
            encoder.text(swap.text) if swap else ids for swap, ids in zip(swaps, own, strict=True)
        ],
    }
    tops = {"own": top("own", own)} | {name: top(name, ids) for name, ids in others.items()}
    named = sum(check.named for check in checks)
    figures = {
        "trace/facts_true": sum(check.true for check in checks) / max(named, 1),
        "trace/facts_named": named / len(checks),
        "trace/well_formed": float(np.mean([trace.well_formed for trace in traces])),
        "trace/possible": float(np.mean([check.possible for check in checks])),
        "trace/distinct": len(set(texts)) / len(texts),
        "trace/distinct_1": distinct_ngrams(texts, 1),
        "trace/distinct_2": distinct_ngrams(texts, 2),
    }
    figures |= _agreement_figures(traces, tops["own"], book)
    for name, top_EK in tops.items():
        gains = ranking_metrics(top_EK, examples.targets_E, cutoffs=(_TOP,))
        figures[f"trace/N@10/{name}"] = float(gains["N@10"].mean())
        if name != "own":
            asked = [n for n, swap in enumerate(swaps) if swap or name != "swapped"]
            if asked:
                figures[f"trace/kept/{name}"] = _kept(tops["own"][asked], top_EK[asked])
    follows, more = follow_figures(swaps, tops["own"], tops["swapped"], book)
    _write(path, dataset, examples, shown, traces, checks, swaps, follows, tops)
    return figures | more


def swap_category(
    trace: Trace,
    history: Sequence[int],
    book: FactBook,
    wording: Wording,
    rng: np.random.Generator,
) -> Swap | None:
    """The trace announcing a category that nothing in the history bears; None where it cannot be.

    The new category comes with those above it, as an item of the catalogue has them; brand, series
    and era that were announced are left out, for they belong to the old category.
    """
    if not any(fact.kind == "category" for claim in trace.announced for fact in claim.facts):
        return None
    held = {fact for item in history for fact in book.of(item)}
    held |= {fact for claim in trace.announced for fact in claim.facts}
    possible = [
        fact
        for fact in book.all_facts()
        if fact.kind == "category"
        and fact not in held
        and book.says_something(fact)
        and book.count(fact) >= min(_FEWEST_BEARERS, book.num_items // 20 + 1)
    ]
    if not possible:
        return None
    category = possible[int(rng.integers(len(possible)))]
    bearers = book.bearers([category])
    item = bearers[int(rng.integers(len(bearers)))]
    facts = [category]
    if book.is_path:
        above = book.categories(item)[: book.categories(item).index(category)]
        facts = [*(fact for fact in above if book.says_something(fact)), category]
    text = wording.announce_instead(trace.text, facts, book)
    return Swap(text, category) if text else None


def follow_figures(
    swaps: Sequence[Swap | None], before_EK: np.ndarray, after_EK: np.ndarray, book: FactBook
) -> tuple[list[bool | None], dict[str, float]]:
    """Whether each user's top 10 moved to the swapped category, and the shares.

    Args:
        swaps: what was swapped in; None for users without.
        before_EK, after_EK: the top tens behind the trace and behind the swapped one.
        book: the catalogue.
    """
    follows: list[bool | None] = []
    shares = []
    for swap, before, after in zip(swaps, before_EK, after_EK, strict=True):
        if swap is None:
            follows.append(None)
            continue
        pair = [_share(items, swap.category, book) for items in (before, after)]
        follows.append(pair[1] > pair[0])
        shares.append(pair)
    figures = {"trace/swapped": len(shares) / max(len(swaps), 1)}
    if shares:
        before_share, after_share = np.mean(shares, axis=0).tolist()
        figures |= {
            "trace/decoder_follows": sum(bool(f) for f in follows) / len(shares),
            "trace/new_category/before": before_share,
            "trace/new_category/after": after_share,
        }
    return follows, figures


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all (Li et al. 2016, arXiv 1510.03055).

    >>> distinct_ngrams(["a b", "a c"], 1)
    0.75
    """
    words = [text.split() for text in texts]
    ngrams = [tuple(w[k : k + n]) for w in words for k in range(len(w) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def _read(text: str, book: FactBook, wording: Wording, finder: MentionFinder) -> Trace:
    trace = read_trace(text, book, wording=wording)
    return trace if trace.claims else read_free_text(text, finder)


def _shuffled(text: str, rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(text.split()).tolist())


def _agreement_figures(
    traces: Sequence[Trace], top_EK: np.ndarray, book: FactBook
) -> dict[str, float]:
    """Mean share of the top 10 that bears what was announced; the same with another's top 10."""
    found: dict[str, list[float]] = {}
    for n, trace in enumerate(traces):
        for name, row in (("", top_EK[n]), ("/others", top_EK[n - 1])):
            shares = agreement(trace.announced, book, row[row >= 0].tolist())
            for kind, share in shares.items():
                found.setdefault(f"trace/agreement/{kind}{name}", []).append(share)
    return {key: float(np.mean(values)) for key, values in sorted(found.items())}


def _kept(before_EK: np.ndarray, after_EK: np.ndarray) -> float:
    pairs = zip(before_EK.tolist(), after_EK.tolist(), strict=True)
    return float(np.mean([len({*a} & {*b} - {-1}) / max(len({*a} - {-1}), 1) for a, b in pairs]))


def _share(items: np.ndarray, category: Fact, book: FactBook) -> float:
    real = items[items >= 0].tolist()
    return sum(category in book.of(item) for item in real) / max(len(real), 1)


def _write(
    path: Path,
    dataset: Dataset,
    examples: Examples,
    shown: Sequence[Sequence[int]],
    traces: Sequence[Trace],
    checks: Sequence,
    swaps: Sequence[Swap | None],
    follows: Sequence[bool | None],
    tops: dict[str, np.ndarray],
) -> None:
    ids = [item.item_id for item in dataset.items]
    columns = {
        "user": [dataset.user_ids[user] for user in examples.users_E],
        "history": [[ids[item] for item in history] for history in shown],
        "target": [ids[item] for item in examples.targets_E],
        "trace": [trace.text for trace in traces],
        "well_formed": [trace.well_formed for trace in traces],
        "named": [check.named for check in checks],
        "true": [check.true for check in checks],
        "false": [[claim.name for claim in check.false] for check in checks],
        "announced": [[claim.name for claim in trace.announced] for trace in traces],
        "swapped_trace": [swap.text if swap else None for swap in swaps],
        "swapped_category": [swap.category.name if swap else None for swap in swaps],
        "follows": list(follows),
    }
    for name, top_EK in tops.items():
        key = "items" if name == "own" else f"items_{name}"
        columns[key] = [[ids[item] for item in row if item >= 0] for row in top_EK.tolist()]
    path.parent.mkdir(exist_ok=True)
    write_table(path, pa.table(columns))
