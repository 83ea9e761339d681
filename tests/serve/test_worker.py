"""Beams on vLLM's own model against `whyrec.decode` on the Hugging Face one."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served_models import one_llm, one_served

from whyrec import Recommender
from whyrec.decode.permitted import Rule
from whyrec.evaluation.beam_tree import Branch, beam_tree
from whyrec.sid.trie import Trie

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'whyrec[serve-cpu]'")
pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def served_folder(prepared_run, tokenizer) -> Path:
    return one_served(prepared_run, tokenizer)


@pytest.fixture(scope="module")
def llm(served_folder: Path) -> Any:
    return one_llm(served_folder)


@pytest.fixture(scope="module")
def recommender(served_folder: Path) -> Recommender:
    return Recommender.from_pretrained(served_folder, device="cpu")


@pytest.fixture(scope="module")
def worker(llm: Any) -> Any:
    """vLLM's worker, by its RPCs."""

    class Calls:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: llm.collective_rpc(f"whyrec_{name}", args=arguments)[0]

    calls = Calls()
    assert calls.load()["num_items"] == 30
    return calls


def histories(count: int, *, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 30, rng.integers(1, 9)).tolist() for _ in range(count)]


def same(found: Any, beams: Any) -> None:
    for (items, scores), expected, reference in zip(
        found, beams.items_UW.tolist(), beams.scores_UW.tolist(), strict=True
    ):
        kept = sum(item >= 0 for item in expected)
        assert items == expected[:kept]
        assert scores == pytest.approx(reference[:kept], abs=1e-4)


def alike(found: Any, before: Any) -> None:
    """The same items; scores differ by rounding where a prompt came out of the cache."""
    for (items, scores), (old_items, old_scores) in zip(found, before, strict=True):
        assert items == old_items and scores == pytest.approx(old_scores, abs=1e-4)


RULES = [
    [[], None, None],
    [[1, 5, 5, 29], None, None],
    [[], [3, 4, 8, 21], None],
    [[4], [3, 4, 8, 21], None],
    [[], None, [[0], [2, 1]]],
    [[7], list(range(20)), [[1], [3]]],
]


@pytest.mark.parametrize("width", [1, 5, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_beams_equal_the_reference(worker, recommender, width: int, seed: int) -> None:
    prompts = [recommender.encoder.recommendation_prompt(h) for h in histories(6, seed=seed)]
    decoder = recommender.decoder
    permitted = decoder.permitted([Rule(*rule) for rule in RULES])
    expected = decoder.search(
        decoder.prefill(prompts, width=width), width=width, permitted=permitted
    )
    for _ in range(2):  # the second time out of the prompts' cache
        same(worker.recommend(0, prompts, [width] * 6, RULES), expected)


def test_widths_may_differ_in_a_batch(worker, recommender) -> None:
    prompts = [recommender.encoder.recommendation_prompt(h) for h in histories(4, seed=2)]
    widths = [3, 9, 3, 1]
    found = worker.recommend(0, prompts, widths, [RULES[0]] * 4)
    decoder = recommender.decoder
    for prompt, width, one in zip(prompts, widths, found, strict=True):
        expected = decoder.search(decoder.prefill([prompt], width=width), width=width)
        same([one], expected)


def test_a_beam_after_a_thought_pays_for_the_thought_alone(worker, recommender) -> None:
    encoder, history = recommender.encoder, [5, 17, 9, 2, 11]
    thought = encoder.text(" something light for the evening, as before")
    worker.recommend(0, [encoder.answer_prompt(history)], [4], [RULES[0]])
    before = worker.statistics()
    prompt = encoder.answer_prompt(history, thought)
    found = worker.recommend(0, [prompt], [4], [RULES[0]])
    after = worker.statistics()
    asked = after["prompt_tokens"] - before["prompt_tokens"]
    known = after["prompt_tokens_known"] - before["prompt_tokens_known"]
    assert asked - known == len(thought) + 1  # and `</think>`; the last token always runs
    decoder = recommender.decoder
    same(found, decoder.search(decoder.prefill([prompt], width=4), width=4))


def test_ordinary_requests_are_what_they_were(llm, worker, recommender) -> None:
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": recommender.encoder.text("Once upon a time there was")}
    params = SamplingParams(max_tokens=12, temperature=0.0)
    before = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    worker.recommend(0, [recommender.encoder.recommendation_prompt([1])], [9], [RULES[0]])
    after = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    assert list(after) == list(before)
    with torch.no_grad():
        logits_TV = recommender.decoder.model(
            input_ids=torch.tensor([prompt["prompt_token_ids"]])
        ).logits
    assert before[0] == int(logits_TV[0, -1].argmax())


def test_two_catalogues_side_by_side(worker, recommender, served_folder, tmp_path) -> None:
    prompts = [recommender.encoder.recommendation_prompt([2, 3])]
    codes_NL = recommender._codes_NL[10:]  # ten items are retired: indices shift
    sizes = recommender.decoder.trie.level_sizes
    Trie.build(codes_NL, level_sizes=sizes).save(tmp_path / "trie.safetensors")
    old = worker.recommend(0, prompts, [40], [RULES[0]])
    assert worker.add_catalogue(str(tmp_path), 7) == 20
    alike(worker.recommend(0, prompts, [40], [RULES[0]]), old)
    ((items, scores),) = worker.recommend(7, prompts, [40], [RULES[0]])
    assert sorted(items) == list(range(20)) and sum(np.exp(scores)) == pytest.approx(1, abs=1e-4)
    assert worker.add_catalogue(str(served_folder), 8) == 30
    worker.drop_catalogue(7)
    alike(worker.recommend(8, prompts, [40], [RULES[0]]), old)
    with pytest.raises(Exception, match="7"):
        worker.recommend(7, prompts, [40], [RULES[0]])
    Trie.build(codes_NL[:, :2].unique(dim=0), level_sizes=sizes[:2]).save(
        tmp_path / "trie.safetensors"
    )
    with pytest.raises(Exception, match="the model's codebooks"):
        worker.add_catalogue(str(tmp_path), 9)


def test_fixed_shapes_on_vllm_equal_the_reference(llm, worker, recommender) -> None:
    """What a CUDA graph would hold, uncaptured."""
    from whyrec.serve.cuda_graphs import GraphedBeams

    prompts = [recommender.encoder.recommendation_prompt(h) for h in histories(5, seed=4)]
    rules = [Rule(*rule) for rule in RULES[:5]]
    decoder = recommender.decoder
    expected = decoder.search(
        decoder.prefill(prompts, width=7), width=7, permitted=decoder.permitted(rules)
    )

    def graphed(vllm_worker: Any) -> Any:
        beams = GraphedBeams(vllm_worker.whyrec_beams.decoder(0))
        return [beams(prompts, width=7, rules=rules) for _ in range(2)]

    for found in llm.collective_rpc(graphed)[0]:
        assert torch.equal(found.items_UW, expected.items_UW)
        torch.testing.assert_close(found.scores_UW, expected.scores_UW, atol=1e-4, rtol=0)


def test_the_tree_is_that_of_the_reference(worker: Any, recommender: Recommender) -> None:
    prompt = recommender.encoder.recommendation_prompt([3, 4, 5])
    rule = Rule(excluded=[3, 4, 5, 8])
    _, expected = beam_tree(recommender.decoder, prompt, width=6, rule=rule)

    def same_branches(told: list[dict[str, Any]], branches: list[Branch]) -> None:
        for one, branch in zip(told, branches, strict=True):
            assert (one["code"], one["item"], one["left"]) == (
                branch.code,
                branch.item,
                branch.left,
            )
            assert one["log_prob"] == pytest.approx(branch.log_prob, abs=1e-4)
            same_branches(one["children"], branch.children)

    same_branches(worker.beam_tree(0, prompt, 6, [rule.excluded, None, None]), expected)


def test_replicas_that_share_experts_are_refused(llm) -> None:
    """Of these vLLM keeps the number; replicas of other models are told that they are alone."""
    from whyrec.serve.tree_model import check_supported

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    config = copy.copy(worker.vllm_config)
    layers = config.compilation_config.static_forward_context
    check_supported(config, worker.get_model(), layers)
    config.parallel_config = copy.copy(config.parallel_config)
    config.parallel_config.data_parallel_size = 2
    with pytest.raises(ValueError, match="leave --data-parallel-size out"):
        check_supported(config, worker.get_model(), layers)
