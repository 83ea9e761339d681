"""Perplexity and greedy replies against one token at a time; prompts that training never sees."""

import copy
import math

import pytest
import torch

from whyrec.evaluation import language
from whyrec.prompting.templates import load_templates


@torch.no_grad()
def next_log_probs(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1].log_softmax(0)


@pytest.fixture
def prompts(extended) -> list[list[int]]:
    return [extended.encoder.text(text) for text in ("Why?", "What is a lake and where?", "Go on")]


def test_greedy_replies_equal_one_step_at_a_time(extended, prompts, monkeypatch) -> None:
    monkeypatch.setitem(language._BATCH, "cpu", 2)  # more than one batch, unlike lengths in one
    expected, chosen = [], []
    for prompt in prompts:
        reply: list[int] = []
        for _ in range(6):
            reply.append(int(next_log_probs(extended.model, [*prompt, *reply]).argmax()))
        expected.append(reply)
        chosen.append(reply[2])
    assert language.greedy_replies(extended.model, prompts, max_tokens=6, stop=0) == expected
    stop = chosen[1]  # what the second says third ends every reply that says it
    cut = [r[: r.index(stop) + 1] if stop in r else r for r in expected]
    assert language.greedy_replies(extended.model, prompts, max_tokens=6, stop=stop) == cut


def test_perplexity_equals_one_token_at_a_time(extended, prompts, monkeypatch) -> None:
    monkeypatch.setattr(language, "_READ_BATCH", 2)
    replies = [[5, 9, 11], [7], [400, 3]]
    total = 0.0
    for prompt, reply in zip(prompts, replies, strict=True):
        for place, token in enumerate(reply):
            log_probs = next_log_probs(extended.model, [*prompt, *reply[:place]])
            total -= float(log_probs[token])
    found = language.perplexity(extended.model, prompts, replies)
    assert found == pytest.approx(math.exp(total / 6), rel=1e-4)


def test_an_unchanged_model_keeps_its_language_and_a_broken_one_does_not(
    make_backbone, extended, tokenizer
) -> None:
    folder = make_backbone(initializer_range=0.3)
    model, _ = language.load_backbone(str(folder))
    plain = language.language_figures(model.eval(), extended.encoder, backbone=str(folder))
    assert plain["language/perplexity_ratio"] == 1.0
    assert plain["language/perplexity"] == plain["language/base_perplexity"] > 1
    broken = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in broken.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    worse = language.language_figures(broken, extended.encoder, backbone=str(folder))
    assert worse["language/base_perplexity"] == plain["language/base_perplexity"]
    assert worse["language/perplexity_ratio"] > 1.5
    ratio = worse["language/perplexity"] / worse["language/base_perplexity"]
    assert worse["language/perplexity_ratio"] == pytest.approx(ratio)


def test_held_out_prompts_are_not_replayed() -> None:
    templates = load_templates("general")
    held_out = templates["held_out"]
    assert len(held_out) == len(set(held_out)) >= 48
    assert not {prompt.casefold() for prompt in templates["train"]} & {
        prompt.casefold() for prompt in held_out
    }
