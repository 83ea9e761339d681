"""Thoughts against plain forward passes, and the beam behind them against one from scratch."""

import itertools
import math
from collections import Counter

import pytest
import torch

from conftest import Extended
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.think import Thinker, Thoughts

HISTORIES = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture(scope="module")
def thinker(extended: Extended) -> Thinker:
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    return Thinker(decoder, extended.encoder)


@pytest.fixture
def few_words(extended: Extended) -> Thinker:
    """A thinker with six words and `</think>`, so that thoughts end and repeat."""
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    thinker = Thinker(decoder, extended.encoder)
    thinker._text_V[:] = False
    thinker._text_V[[100, 200, 300, 400, 500, 600, thinker._stop]] = True
    return thinker


def prompts(extended: Extended) -> list[list[int]]:
    return [extended.encoder.thinking_prompt(history) for history in HISTORIES]


def think(thinker: Thinker, asked: list[list[int]], **options: object) -> Thoughts:
    usual = {"samples": 3, "max_tokens": 6, "temperature": 1.0, "seed": 0}
    return thinker.think(asked, **(usual | options))  # type: ignore[arg-type]


@torch.no_grad()
def plain_log_probs(
    extended: Extended, prompt: list[int], ids: list[int], temperature: float
) -> list[float]:
    """Log-probabilities of `ids` after a prompt, by one plain forward pass."""
    logits_TV = extended.model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
    log_probs_TV = (logits_TV / (temperature or 1.0)).log_softmax(-1)
    return [float(log_probs_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_equal_a_plain_forward_pass(
    few_words: Thinker, extended: Extended, temperature: float
) -> None:
    asked = prompts(extended)
    thoughts = think(few_words, asked, samples=4, max_tokens=8, temperature=temperature)
    for user, sample in itertools.product(range(len(asked)), range(4)):
        ids = [token for token in thoughts.ids_UGT[user, sample].tolist() if token >= 0]
        expected = plain_log_probs(extended, asked[user], ids, temperature)
        found = thoughts.log_probs_UGT[user, sample]
        assert found[: len(ids)].tolist() == pytest.approx(expected, abs=1e-4)
        assert not found[len(ids) :].any()


def test_draws_follow_the_distribution(few_words: Thinker, extended: Extended) -> None:
    asked = prompts(extended)[:1]
    samples = 800
    thoughts = think(few_words, asked, samples=samples, max_tokens=2, temperature=1.3)
    allowed = few_words._text_V.nonzero()[:, 0].tolist()

    def expected(begun: list[int]) -> dict[int, float]:
        log_probs = [plain_log_probs(extended, asked[0], [*begun, t], 1.3)[-1] for t in allowed]
        total = sum(math.exp(value) for value in log_probs)
        return {t: math.exp(v) / total for t, v in zip(allowed, log_probs, strict=True)}

    first = Counter(thoughts.ids_UGT[0, :, 0].tolist())
    for token, share in expected([]).items():
        assert first[token] / samples == pytest.approx(share, abs=0.05)
    begun = next(t for t, _ in first.most_common() if t != few_words._stop)
    second = Counter(b for a, b in thoughts.ids_UGT[0].tolist() if a == begun)
    for token, share in expected([begun]).items():
        assert second[token] / first[begun] == pytest.approx(share, abs=0.12)


def test_greedy_takes_the_best_text_token(thinker: Thinker, extended: Extended) -> None:
    asked = prompts(extended)
    thoughts = think(thinker, asked, samples=1, temperature=0.0)
    for user, prompt in enumerate(asked):
        ids = list(prompt)
        for token in thoughts.ids_UGT[user, 0].tolist():
            with torch.no_grad():
                logits_V = extended.model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token == int(logits_V.masked_fill(~thinker._text_V, -torch.inf).argmax())
            ids.append(token)


def test_a_model_that_wants_control_tokens_gets_none(extended: Extended) -> None:
    """The planted fault: every row of the head is nothing beside the control tokens' ones."""
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    thinker = Thinker(decoder, extended.encoder)
    head = extended.model.get_output_embeddings()
    control = {*extended.tokenizer.added_tokens_decoder, *extended.tokenizer.all_special_ids}
    assert {extended.vocabulary.begin, extended.vocabulary.first} <= control
    bias_V = torch.zeros(head.weight.shape[0])
    bias_V[list(control - {thinker._stop})] = 50.0
    hook = head.register_forward_hook(lambda _module, _args, logits: logits + bias_V)
    try:
        thoughts = think(thinker, prompts(extended), samples=8, max_tokens=12)
    finally:
        hook.remove()
    found = set(thoughts.ids_UGT.flatten().tolist()) - {-1}
    assert found and not found & (control - {thinker._stop})


def test_budget_and_stop(few_words: Thinker, extended: Extended) -> None:
    thoughts = think(few_words, prompts(extended), samples=60, max_tokens=5)
    assert thoughts.ids_UGT.shape[-1] <= 5
    closed, lengths = thoughts.closed_UG, thoughts.lengths_UG
    assert closed.any() and not closed.all()
    for user, sample in itertools.product(range(3), range(60)):
        ids = thoughts.ids_UGT[user, sample].tolist()
        thought = thoughts.thought(user, sample)
        assert few_words._stop not in thought and -1 not in thought
        if closed[user, sample]:
            end = ids.index(few_words._stop)
            assert ids[:end] == thought and set(ids[end + 1 :]) <= {-1}
        else:
            assert len(thought) == int(lengths[user, sample]) == 5


def test_another_stop_token(extended: Extended, thinker: Thinker) -> None:
    stop = extended.tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = Thinker(thinker.decoder, extended.encoder, stop=stop)
    assert other._text_V[stop] and not other._text_V[thinker._stop]


def test_a_batch_equals_each_prompt_alone(few_words: Thinker, extended: Extended) -> None:
    asked = prompts(extended)
    together = think(few_words, asked, keys=[11, 12, 13], max_tokens=10)
    for user, prompt in enumerate(asked):
        alone = think(few_words, [prompt], keys=[11 + user], max_tokens=10)
        for sample in range(3):
            assert alone.thought(0, sample) == together.thought(user, sample)
            length = int(alone.lengths_UG[0, sample])
            torch.testing.assert_close(
                alone.log_probs_UGT[0, sample, :length],
                together.log_probs_UGT[user, sample, :length],
                atol=1e-4,
                rtol=0,
            )


def test_draws_depend_on_seed_key_and_sample_alone(few_words: Thinker, extended: Extended) -> None:
    asked = prompts(extended)[:1]
    few = think(few_words, asked, samples=2, max_tokens=4, keys=[5])
    more = think(few_words, asked, samples=5, max_tokens=9, keys=[5])
    for sample in range(2):
        assert more.thought(0, sample)[:4] == few.thought(0, sample)
    drawn = [
        [think(few_words, asked, max_tokens=9, samples=5, **how).thought(0, s) for s in range(5)]
        for how in ({"keys": [5]}, {"keys": [6]}, {"keys": [5], "seed": 1})
    ]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2]
    assert len({tuple(thought) for thought in drawn[0]}) > 1


def test_a_generation_config_is_never_read(few_words: Thinker, extended: Extended) -> None:
    asked = prompts(extended)
    before = think(few_words, asked)
    config = extended.model.generation_config
    old = (config.do_sample, config.top_k, config.temperature)
    config.do_sample, config.top_k, config.temperature = True, 1, 0.01
    try:
        after = think(few_words, asked)
    finally:
        config.do_sample, config.top_k, config.temperature = old
    assert torch.equal(before.ids_UGT, after.ids_UGT)


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_answers_equal_beams_from_scratch(
    few_words: Thinker, extended: Extended, max_tokens: int
) -> None:
    thoughts = think(few_words, prompts(extended), max_tokens=max_tokens)
    whole = [
        extended.encoder.answer_prompt(history, thoughts.thought(user, sample))
        for user, history in enumerate(HISTORIES)
        for sample in range(3)
    ]
    decoder = few_words.decoder
    excluded = [history for history in HISTORIES for _ in range(3)]
    expected = decoder.search(decoder.prefill(whole, width=8), width=8, excluded=excluded)
    prefilled = few_words.answer(thoughts, width=8)
    assert prefilled.store.lengths_U.tolist() == [len(prompt) for prompt in whole]
    for _ in range(2):  # any number of searches may start from it
        found = decoder.search(prefilled, width=8, excluded=excluded)
        assert torch.equal(found.items_UW, expected.items_UW)
        torch.testing.assert_close(found.scores_UW, expected.scores_UW, atol=1e-4, rtol=0)


def test_thoughts_that_are_empty_equal_no_think(extended: Extended) -> None:
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    thinker = Thinker(decoder, extended.encoder)
    thinker._text_V[:] = False
    thinker._text_V[thinker._stop] = True  # nothing else can be said
    thoughts = think(thinker, prompts(extended), samples=2)
    assert thoughts.closed_UG.all() and not thoughts.lengths_UG.any()
    found = decoder.search(thinker.answer(thoughts, width=5), width=5)
    plain = [extended.encoder.answer_prompt(history) for history in HISTORIES for _ in range(2)]
    expected = decoder.search(decoder.prefill(plain, width=5), width=5)
    assert torch.equal(found.items_UW, expected.items_UW)


def test_prompts_differ_in_the_thought_alone(extended: Extended) -> None:
    encoder, tokenizer = extended.encoder, extended.tokenizer
    plain = encoder.answer_prompt([3, 4])
    thinking = encoder.answer_prompt([3, 4], encoder.text("Next: shoes."))
    recommended = tokenizer.decode(encoder.recommendation_prompt([3, 4])[:-1])
    assert tokenizer.decode(plain) == f"{recommended}<think></think><|sid_begin|>"
    assert tokenizer.decode(thinking) == f"{recommended}<think>Next: shoes.</think><|sid_begin|>"
    assert encoder.thinking_prompt([3, 4]) == plain[:-2]
