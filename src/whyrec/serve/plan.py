"""A request in item indices, and the beams that answer it."""

from collections.abc import Sequence
from dataclasses import dataclass

from whyrec.serve.beam_request import BeamRequest
from whyrec.serve.catalogue import Catalogue
from whyrec.serve.schema import RecommendationRequest
from whyrec.serve.settings import Limits


@dataclass(frozen=True)
class Plan:
    """A request, in item indices of one catalogue."""

    catalogue: Catalogue
    version: int
    shown: list[int]  # the newest events, as the prompt holds them
    barred: list[int]
    allowed: list[int] | None
    width: int
    k: int


def make_plan(
    request: RecommendationRequest,
    catalogue: Catalogue,
    version: int,
    history: list[int],
    *,
    limits: Limits,
) -> Plan:
    """What a request asks for, in item indices of one version of the catalogue.

    Raises:
        ServeError: for an unknown item, category or brand.
    """
    if request.exclude is None:
        barred = history
    else:
        barred = [catalogue.index(item_id, param="exclude") for item_id in request.exclude]
    usual = min(2 * request.k, limits.beam_width)
    width = max(request.beam_width or usual, request.k)
    return Plan(
        catalogue,
        version,
        shown=history[-catalogue.max_history :],
        barred=sorted({n for n in barred if n < catalogue.num_live}),
        allowed=catalogue.allowed(request.filter),
        width=min(width, catalogue.num_live),
        k=request.k,
    )


def searches(
    plan: Plan,
    thoughts: Sequence[Sequence[int]],
    prefixes: Sequence[list[list[int]]] | None,
) -> list[BeamRequest]:
    """The beam behind each thought, or behind none; no beams where no item may come."""
    encoder = plan.catalogue.encoder
    prompts = [encoder.answer_prompt(plan.shown, thought) for thought in thoughts]
    prompts = prompts or [encoder.recommendation_prompt(plan.shown)]
    if plan.allowed == []:
        return []
    return [
        BeamRequest(
            prompt_ids=prompt,
            width=plan.width,
            k=plan.width,
            excluded=plan.barred,
            allowed=plan.allowed,
            prefixes=None if prefixes is None else prefixes[row],
            catalogue=plan.version,
        )
        for row, prompt in enumerate(prompts)
    ]


def wanted(plan: Plan) -> int:
    """How many items an unhindered beam would find, k at most."""
    barred = set(plan.barred)
    if plan.allowed is None:
        possible = plan.catalogue.num_live - len(barred)
    else:
        possible = sum(n not in barred for n in plan.allowed)
    return min(plan.k, possible)
