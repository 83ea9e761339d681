"""What a thought is worth: small functions of what came of it, chosen and weighted in the recipe.

A thought is followed by an exact beam over the catalogue; most rewards look at that beam and at the
item that the user really took next.

* `rollout_beam`: the most levels of the target's SID that any item of the beam shares, place by
  place (OneRec-Think, arXiv 2510.11639); between 0 and 1. The same for most thoughts of a prompt.
* `prefix`: what an item drawn from the beam earns on average, ½^(L−m) where the first m of L codes
  are the target's (SIDReasoner's reward) and 0 where none is. It moves with every probability.
* `likelihood`: the geometric mean of the probabilities of the target's codes, in the beam or not.
* `reciprocal_rank`: 1 / rank of the target in the beam, 0 where the beam has not got it.
* `similarity`: mean cosine of the beam's items with the target, by the items' text vectors.
* `format`: 1 for a thought of at least one word, in one line, that the model closed itself.
* `truthful`: the share of named facts that hold of the history and the catalogue; 0 where nothing
  is named, or silence would be the safest truth.
* `length`: 1 − tokens / budget, for short thoughts.

    check_rewards(names, weights)
    rewards = rewards_of(names, outcomes, catalogue)       # name → [R]
    totals_R = total(rewards, weights)

Dimensions: R thoughts, W items of a beam, L levels, N items, D vector size.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.reasoning.trace import check_trace, read_free_text, read_trace


@dataclass(frozen=True)
class Outcomes:
    """What came of R thoughts.

    Attributes:
        items_RW: the beam behind each, best first; -1 is no item.
        scores_RW: log-probabilities; -inf where there is no item.
        targets_R: the items that were really next.
        target_scores_R: their log-probabilities after the thoughts.
        texts: the thoughts.
        tokens_R: tokens of each, without `</think>`.
        closed_R: whether the model closed the thought itself; else the budget did.
        histories: item indices as the prompts showed them, oldest first.
        max_tokens: budget of a thought.
    """

    items_RW: np.ndarray
    scores_RW: np.ndarray
    targets_R: np.ndarray
    target_scores_R: np.ndarray
    texts: Sequence[str]
    tokens_R: np.ndarray
    closed_R: np.ndarray
    histories: Sequence[Sequence[int]]
    max_tokens: int


@dataclass(frozen=True)
class Catalogue:
    """What rewards know of the items.

    Attributes:
        codes_NL: SIDs.
        vectors_ND: text vectors of length 1.
        book: facts.
        finder: finds facts in free text.
    """

    codes_NL: np.ndarray
    vectors_ND: np.ndarray
    book: FactBook
    finder: MentionFinder


def rollout_beam(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """Best share of matching levels in the beam [R]."""
    same_RWL = _same_codes(outcomes, catalogue)
    return same_RWL.mean(-1).max(-1)


def prefix(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """Expected ½^(L−m) of the beam, m matching codes from the first on [R]."""
    same_RWL = _same_codes(outcomes, catalogue)
    levels = same_RWL.shape[-1]
    matching_RW = np.cumprod(same_RWL, axis=-1).sum(-1)
    worth_RW = np.where(matching_RW > 0, 0.5 ** (levels - matching_RW), 0.0)
    return (np.exp(outcomes.scores_RW) * worth_RW).sum(-1)


def likelihood(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """Geometric mean probability of the target's codes [R]."""
    return np.exp(outcomes.target_scores_R / catalogue.codes_NL.shape[1])


def reciprocal_rank(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """1 / rank of the target in the beam, or 0 [R]."""
    hit_RW = outcomes.items_RW == outcomes.targets_R[:, None]
    return (hit_RW / np.arange(1, hit_RW.shape[1] + 1)).sum(-1)


def similarity(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """Mean cosine of the beam's items with the target, 0 for an empty beam [R]."""
    there_RW = outcomes.items_RW >= 0
    vectors_RWD = catalogue.vectors_ND[np.maximum(outcomes.items_RW, 0)]
    cosines_RW = np.einsum("rwd,rd->rw", vectors_RWD, catalogue.vectors_ND[outcomes.targets_R])
    return (cosines_RW * there_RW).sum(-1) / np.maximum(there_RW.sum(-1), 1)


def well_formed(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """1 for a thought with a word, in one line, closed by the model [R]."""
    tidy = [bool(text.strip()) and "\n" not in text.strip() for text in outcomes.texts]
    return (outcomes.closed_R & np.array(tidy, dtype=bool)).astype(np.float64)


def truthful(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """Share of named facts that hold, 0 where none is named [R]."""
    shares = []
    for text, history in zip(outcomes.texts, outcomes.histories, strict=True):
        trace = read_trace(text, catalogue.book)
        if not trace.claims:
            trace = read_free_text(text, catalogue.finder)
        # What is announced holds if the catalogue has it. `check_trace` would go on to ask whether
        # one item has all of it, which takes milliseconds a thought.
        said = check_trace(replace(trace, claims=trace.evidence), history, catalogue.book)
        true = said.true + sum(bool(claim.facts) for claim in trace.announced)
        shares.append(true / max(len(trace.claims), 1))
    return np.array(shares)


def length(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """1 − tokens / budget [R]."""
    return 1 - outcomes.tokens_R / outcomes.max_tokens


REWARDS: dict[str, Callable[[Outcomes, Catalogue], np.ndarray]] = {
    "rollout_beam": rollout_beam,
    "prefix": prefix,
    "likelihood": likelihood,
    "reciprocal_rank": reciprocal_rank,
    "similarity": similarity,
    "format": well_formed,
    "truthful": truthful,
    "length": length,
}


def check_rewards(names: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse, before any work, rewards that cannot be.

    Raises:
        ValueError: for an unknown name (with the nearest known one), a name given twice, weights
            that are not as many, or none above 0.
    """
    for name in names:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known ones: {', '.join(REWARDS)}"
            raise ValueError(f"rewards: there is no reward {name!r}; {hint}")
    if len(set(names)) != len(names):
        raise ValueError("rewards: a reward is named twice; name it once, with its whole weight")
    if len(names) != len(weights):
        raise ValueError(
            f"rewards names {len(names)} and reward_weights has {len(weights)}; give one a reward"
        )
    if not any(weight > 0 for weight in weights):
        raise ValueError("reward_weights: at least one reward must weigh more than 0")


def rewards_of(
    names: Sequence[str], outcomes: Outcomes, catalogue: Catalogue
) -> dict[str, np.ndarray]:
    """Rewards by name, [R] each."""
    return {name: REWARDS[name](outcomes, catalogue) for name in names}


def total(rewards: Mapping[str, np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted sum [R]."""
    columns = zip(rewards.values(), weights, strict=True)
    return np.sum([weight * column for column, weight in columns], axis=0)


def _same_codes(outcomes: Outcomes, catalogue: Catalogue) -> np.ndarray:
    """Which codes of the beam's items are the target's: bool [R, W, L]; none of a missing item."""
    codes_RWL = catalogue.codes_NL[np.maximum(outcomes.items_RW, 0)]
    same_RWL = codes_RWL == catalogue.codes_NL[outcomes.targets_R][:, None]
    return same_RWL & (outcomes.items_RW >= 0)[..., None]
