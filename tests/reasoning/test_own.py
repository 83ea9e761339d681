"""The model as its own writer: what is asked, what is kept, what a kill costs."""

from pathlib import Path

import numpy as np
import pytest

from conftest import Extended
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.think import Thinker
from whyrec.reasoning.asking import AnswerLog, Step
from whyrec.reasoning.own import own_writer, write_own
from whyrec.reasoning.pruning import read_vectors

STEPS = [Step(user, 3, [user, user + 1, user + 2], user + 3, []) for user in range(7)]


@pytest.fixture(scope="module")
def thinker(extended: Extended) -> Thinker:
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    thinker = own_writer(decoder, extended.encoder)
    # A random model never stops by itself; with few words it does.
    thinker._text_V[:] = False
    thinker._text_V[[1100, 2200, 3300, thinker._stop]] = True
    return thinker


def write(
    thinker: Thinker, extended: Extended, vectors_ND: np.ndarray, path: Path, **options: object
) -> tuple[dict[str, int], dict]:
    log = AnswerLog(path, asked={"model": "tiny"})
    usual = {"steps": STEPS, "max_tokens": 12, "temperature": 1.0, "seed": 0, "batch_size": 3}
    merged = usual | options
    counts = write_own(
        merged.pop("steps"),  # type: ignore[arg-type]
        thinker=thinker,
        items=extended.dataset.items,
        vectors_ND=vectors_ND,
        log=log,
        **merged,  # type: ignore[arg-type]
    )
    return counts, log.answers()


@pytest.fixture(scope="module")
def vectors_ND(prepared_run: Path) -> np.ndarray:
    return read_vectors(prepared_run / "sids" / "embeddings.safetensors")


def test_it_ends_as_replies_end(thinker: Thinker, extended: Extended) -> None:
    assert thinker._stop == extended.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_run_that_is_killed_writes_the_same(
    thinker: Thinker, extended: Extended, vectors_ND: np.ndarray, tmp_path: Path
) -> None:
    counts, whole = write(thinker, extended, vectors_ND, tmp_path / "whole.jsonl")
    assert counts["written"] + counts["cut off"] == len(whole) == len(STEPS)
    assert counts["written"] > 0
    assert list(whole.values()).count(None) == counts["cut off"]
    path = tmp_path / "killed.jsonl"
    write(thinker, extended, vectors_ND, path, steps=STEPS[2:4])
    path.write_bytes(path.read_bytes()[:-3])
    counts, pieces = write(thinker, extended, vectors_ND, path, batch_size=2)
    assert counts["already written"] == 1
    assert pieces == whole


def test_a_budget_cuts_off(
    thinker: Thinker, extended: Extended, vectors_ND: np.ndarray, tmp_path: Path
) -> None:
    counts, answers = write(thinker, extended, vectors_ND, tmp_path / "x.jsonl", max_tokens=1)
    assert counts["cut off"] == sum(text is None for text in answers.values()) > 0
