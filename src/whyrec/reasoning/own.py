"""The aligned model as its own writer: rationales sampled in batches (OneRec-Think §3.2).

The model answers the question of `asking.py` in its own words. Sampling is that of thoughts
(`decode/think.py`): text alone, no inherited sampling settings, the same draws in any batch.

    log = AnswerLog(folder / "own.jsonl", asked={"model": "aligned", "seed": 0})
    write_own(steps, thinker=own_writer(decoder, encoder), items=items, vectors_ND=vectors_ND,
              log=log, max_tokens=64, temperature=0.7, seed=0)
"""

import sys
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from whyrec.catalog.dataset import Item
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.think import Thinker
from whyrec.prompting.encoder import PromptEncoder
from whyrec.prompting.templates import load_templates
from whyrec.reasoning.asking import AnswerLog, Question, Step, question, tidy

_WORDS = 30  # asked for; a small model does not count, and the filter drops what is too long


def own_writer(decoder: BeamDecoder, encoder: PromptEncoder) -> Thinker:
    """A sampler of whole replies, which end as replies of the chat format do."""
    system = load_templates("rationale")["model"]["system"]
    return Thinker(decoder, encoder, stop=encoder.frame(system).after_reply[0])


def write_own(
    steps: Sequence[Step],
    *,
    thinker: Thinker,
    items: Sequence[Item],
    vectors_ND: np.ndarray,
    log: AnswerLog,
    max_tokens: int,
    temperature: float,
    seed: int,
    pruned: int = 10,
    batch_size: int = 16,
) -> dict[str, int]:
    """Write a rationale for each step that the log has none for; returns counts.

    An answer that the budget cut off is of no use and is noted as None.

    Args:
        steps: training steps.
        thinker: of `own_writer`.
        items: the catalogue.
        vectors_ND: item vectors of length 1.
        log: what is written already, and where the rest goes.
        max_tokens: budget of an answer.
        temperature, seed: of the sampling; an answer depends on these and its step alone.
        pruned: k, history items that the model is shown.
        batch_size: steps at once.
    """
    done = log.answers()
    left = [step for step in steps if step.key not in done]
    counts = {"already written": len(steps) - len(left), "written": 0, "cut off": 0}
    bar = tqdm(total=len(left), desc="rationales", unit="step", file=sys.stderr)
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        asked = [
            question(step, items, vectors_ND=vectors_ND, words=_WORDS, k=pruned) for step in batch
        ]
        thoughts = thinker.think(
            [_prompt(thinker.encoder, one) for one in asked],
            samples=1,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            keys=[(step.user << 32) + step.position for step in batch],
        )
        for row, step in enumerate(batch):
            whole = bool(thoughts.closed_UG[row, 0])
            text = thinker.encoder.tokenizer.decode(thoughts.thought(row, 0))
            log.add(step.key, text=tidy(text) if whole else None)
            counts["written" if whole else "cut off"] += 1
        bar.update(len(batch))
    bar.close()
    return counts


def _prompt(encoder: PromptEncoder, asked: Question) -> list[int]:
    frame = encoder.frame(asked.system)
    slots = {name: encoder.text(text) for name, text in asked.slots.items()}
    pieces = encoder.render(asked.template, **slots)
    return [*frame.before_user, *(t for piece in pieces for t in piece), *frame.before_reply]
