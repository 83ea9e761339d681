"""The policy's log-probabilities against plain forward passes and against the sampler's own."""

import copy

import pytest
import torch

from conftest import Extended
from whyrec.backbone.lora import add_lora
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.think import Thinker, Thoughts, text_tokens
from whyrec.train.policy import (
    Policy,
    attach_policy,
    code_log_probs,
    item_log_probs,
    score,
)

HISTORIES = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
SAMPLES, TEMPERATURE = 4, 0.8


def text_of(extended: Extended) -> torch.Tensor:
    num_rows = extended.model.get_output_embeddings().weight.shape[0]
    return text_tokens(extended.tokenizer, num_rows=num_rows, stop=extended.vocabulary.think_end)


def policy_of(extended: Extended) -> Policy:
    return Policy(extended.vocabulary, extended.trie, text_of(extended), TEMPERATURE)


@pytest.fixture
def model(extended: Extended):
    copied = copy.deepcopy(extended.model)
    attach_policy(copied, policy_of(extended))
    return copied


def drawn(extended: Extended) -> tuple[Thinker, Thoughts, list[list[int]]]:
    decoder = BeamDecoder(extended.model, vocabulary=extended.vocabulary, trie=extended.trie)
    thinker = Thinker(decoder, extended.encoder)
    prompts = [extended.encoder.thinking_prompt(history) for history in HISTORIES]
    thoughts = thinker.think(
        prompts, samples=SAMPLES, max_tokens=6, temperature=TEMPERATURE, seed=0
    )
    return thinker, thoughts, prompts


def padded(prompts: list[list[int]], words: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left and words on the right, as TRL has them."""
    longest, most = max(map(len, prompts)), max(map(len, words))
    ids, mask, text = [], [], []
    for prompt, own in zip(prompts, words, strict=True):
        left, right = longest - len(prompt), most - len(own)
        ids.append([0] * left + prompt + own + [0] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(own)) + [0] * right)
        text.append([0] * longest + [1] * len(own) + [0] * right)
    return {
        "ids_BT": torch.tensor(ids),
        "mask_BT": torch.tensor(mask),
        "text_BT": torch.tensor(text),
    }


def test_the_ratio_to_the_sampler_is_one(extended: Extended, model) -> None:
    """The sampler's log-probability, renormalised over text, is what is trained."""
    _, thoughts, prompts = drawn(extended)
    words = [[t for t in row.tolist() if t >= 0] for row in thoughts.ids_UGT.flatten(0, 1)]
    batch = padded([p for p in prompts for _ in range(SAMPLES)], words)
    scored = score(model, **batch)
    found = scored.words_BT[:, -max(map(len, words)) :]
    mass = scored.mass_BT[:, -max(map(len, words)) :]
    sampler = thoughts.log_probs_UGT.flatten(0, 1)[:, : found.shape[1]]
    said = sampler < 0
    ratio = (found - (sampler - mass.log().nan_to_num(neginf=0.0)))[said].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
    assert (mass[said] < 1).all() and (mass[said] > 0).all()


def test_words_against_a_plain_forward_pass(extended: Extended, model) -> None:
    """Masked, at the temperature, renormalised; entropies too; nothing outside the thought."""
    prompt = extended.encoder.thinking_prompt(HISTORIES[0])
    words = [100, 200, extended.vocabulary.think_end]
    batch = padded([prompt, prompt[3:]], [words, [300]])
    scored = score(model, **batch)
    text_V = text_of(extended)
    with torch.no_grad():
        logits_TV = extended.model(input_ids=torch.tensor([prompt + words])).logits[0].double()
    log_probs_TV = (logits_TV / TEMPERATURE).masked_fill(~text_V, -torch.inf).log_softmax(-1)
    before_TV = log_probs_TV[len(prompt) - 1 : -1]
    expected = [float(before_TV[place, word]) for place, word in enumerate(words)]
    assert scored.words_BT[0, -3:].tolist() == pytest.approx(expected, abs=1e-4)
    entropies = [-float((row.exp() * row.nan_to_num(neginf=0.0)).sum()) for row in before_TV]
    assert scored.entropies_BT[0, -3:].tolist() == pytest.approx(entropies, abs=1e-3)
    assert not scored.words_BT[:, :-3].any() and not scored.words_BT[1, -2:].any()
    assert scored.codes_BL.shape == (2, 0)


def test_codes_are_scored_as_the_beam_scores_them(extended: Extended, model) -> None:
    thinker, thoughts, _ = drawn(extended)
    prefilled = thinker.answer(thoughts, width=20)
    beams = thinker.decoder.search(prefilled, width=20)
    third_R = beams.items_UW[:, 2]
    codes_RL = extended.codes_NL[third_R]
    behind = item_log_probs(thinker.decoder, prefilled, codes_RL)
    torch.testing.assert_close(behind.sum(1), beams.scores_UW[:, 2], atol=1e-4, rtol=0)
    rows = []
    for user, history in enumerate(HISTORIES):
        for sample in range(SAMPLES):
            prompt = extended.encoder.answer_prompt(history, thoughts.thought(user, sample))
            item = int(third_R[user * SAMPLES + sample])
            rows.append([*prompt, *extended.encoder.item(item)])
    batch = padded([[] for _ in rows], rows)
    batch["text_BT"] = torch.zeros_like(batch["text_BT"])
    scored = score(model, **batch, codes_BL=codes_RL)
    torch.testing.assert_close(scored.codes_BL, behind, atol=1e-4, rtol=0)
    again = thinker.decoder.search(prefilled, width=20)
    assert torch.equal(again.items_UW, beams.items_UW)  # the beam can start anew behind it


def test_legal_codes_share_all_probability(extended: Extended) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_1LD = torch.randn(1, 3, 16, generator=generator)
    head_VD = extended.model.get_output_embeddings().weight
    settings = {"vocabulary": extended.vocabulary, "trie": extended.trie}
    # The hidden states do not depend on the codes here, so all items' probabilities add up to 1.
    log_probs_NL = code_log_probs(
        hidden_1LD.expand(len(extended.codes_NL), -1, -1), extended.codes_NL, head_VD, **settings
    )
    assert float(log_probs_NL.sum(1).exp().sum()) == pytest.approx(1, abs=1e-4)


def test_gradients_are_those_of_a_plain_forward_pass(extended: Extended) -> None:
    """Also through LoRA, whose wrapper passes every argument on."""
    copied = copy.deepcopy(extended.model)
    adapted = add_lora(copied, token_ids=[100, 200], rank=2, alpha=4.0, dropout=0.0)
    plain = copy.deepcopy(adapted)
    attach_policy(adapted.get_base_model(), policy_of(extended))
    prompt, words = extended.encoder.thinking_prompt([1, 2]), [100, 200, 300]
    score(adapted, **padded([prompt], [words])).words_BT.sum().backward()
    logits_TV = plain(input_ids=torch.tensor([prompt + words])).logits[0] / TEMPERATURE
    text_V = text_of(extended)
    log_probs_TV = logits_TV.masked_fill(~text_V, -torch.inf).log_softmax(-1)
    place = torch.arange(len(prompt) - 1, len(prompt) + 2)
    log_probs_TV[place, torch.tensor(words)].sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    others = [p for p in plain.parameters() if p.requires_grad]
    assert trained and any(p.grad.abs().max() > 0 for p in trained)
    for ours, theirs in zip(trained, others, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)
