"""Rollouts by a vLLM in this process: its weights, its rules, its draws, and training by them."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import LEVEL_SIZES, Extended, make_model, save_model
from whyrec.backbone.extend import extend_vocabulary, new_token_ids
from whyrec.backbone.lora import add_lora, plain_model
from whyrec.decode import think as think_module
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.think import Thinker, text_tokens
from whyrec.prompting.encoder import PromptEncoder
from whyrec.train import enhance as enhance_module
from whyrec.train.policy import Policy, attach_policy, score
from whyrec.train.sampling import Sampled, VllmSampler, sampled

from test_enhance import (  # isort: skip
    check_raising, check_resuming, enhanced, make_activated, steps_of, summary_of,
)  # fmt: skip
from test_rollouts import check_groups, make_roller  # isort: skip

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'whyrec[serve-cpu]'")
pytestmark = [pytest.mark.serve, pytest.mark.xdist_group("vllm_rollouts")]

# vLLM's CPU attention wants heads of a multiple of 32.
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
HISTORIES = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8], []]
MAX_TOKENS, SAMPLES = 5, 3


@pytest.fixture(scope="module")
def wide(extended: Extended, tokenizer) -> Extended:
    """The tiny catalogue with a model that vLLM can hold; not to be changed."""
    tokenizer = copy.deepcopy(tokenizer)
    model = make_model(vocab_size=len(tokenizer), **SIZES)
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVEL_SIZES)
    encoder = PromptEncoder(tokenizer, vocabulary=vocabulary, codes_NL=extended.codes_NL.tolist())
    known = (extended.dataset, extended.codes_NL, extended.trie)
    return Extended(*known, model, tokenizer, vocabulary, encoder)


@pytest.fixture(scope="module")
def folder(wide: Extended, prepared_run: Path, tmp_path_factory) -> Path:
    """Its model folder, with a GenerationConfig that would ruin all thoughts."""
    made = save_model(tmp_path_factory.mktemp("models") / "wide", prepared_run, wide)
    config = {"do_sample": False, "top_k": 1, "top_p": 0.1, "max_new_tokens": 2}
    (made / "generation_config.json").write_text(json.dumps(config))
    return made


def make_sampler(folder: Path, wide: Extended, *, temperature: float) -> VllmSampler:
    return VllmSampler(
        folder,
        think_end=wide.vocabulary.think_end,
        samples=SAMPLES,
        max_tokens=MAX_TOKENS,
        temperature=temperature,
        rows=8,
        longest=wide.encoder.longest_prompt(8),
    )


@pytest.fixture(scope="module")
def sampler(folder: Path, wide: Extended) -> Iterator[VllmSampler]:
    made = make_sampler(folder, wide, temperature=0.8)
    yield made
    made.close()


def prompts_of(wide: Extended) -> list[list[int]]:
    return [wide.encoder.thinking_prompt(history) for history in HISTORIES]


def drawn(sampler: VllmSampler, wide: Extended, model, *, seed: int = 0) -> Sampled:
    sampler.load(model)
    return sampler.sample(prompts_of(wide), seed=seed, keys=range(len(HISTORIES)))


def text_of(wide: Extended) -> torch.Tensor:
    num_rows = wide.model.get_output_embeddings().weight.shape[0]
    return text_tokens(wide.tokenizer, num_rows=num_rows, stop=wide.vocabulary.think_end)


def leaning(wide: Extended, **tokens: float) -> torch.nn.Module:
    """A copy whose hidden states all point along one axis, and some tokens more or less with it."""
    model = copy.deepcopy(wide.model)
    rows_VD = model.get_input_embeddings().weight.data
    rows_VD[:, 0] = 1000.0
    for token, more in tokens.items():
        rows_VD[int(token), 0] += more
    return model


def test_thoughts_hold_text_alone(sampler, wide) -> None:
    """All that is no text is made nearly certain, and `</think>` as likely as all text."""
    text_V = text_of(wide)
    control = {str(token): 5.0 for token in (~text_V).nonzero()[:, 0].tolist()}
    model = leaning(wide, **control, **{str(wide.vocabulary.think_end): 0.95})
    thoughts = drawn(sampler, wide, model)
    assert len(thoughts.words) == len(HISTORIES) * SAMPLES
    for words, bare, closed in zip(thoughts.words, thoughts.bare, thoughts.closed_R, strict=True):
        assert text_V[words].all() and 0 < len(words) <= MAX_TOKENS
        assert closed == (words[-1] == wide.vocabulary.think_end)
        assert wide.vocabulary.think_end not in bare
        assert closed or len(words) == MAX_TOKENS
    assert 0 < thoughts.closed_R.mean() < 1


def test_it_thinks_with_the_weights_of_now(sampler, wide) -> None:
    (word,) = wide.encoder.text(" cat")
    said = drawn(sampler, wide, leaning(wide, **{str(word): 5.0}))
    assert all(words == [word] * MAX_TOKENS for words in said.words) and not said.closed_R.any()
    ended = drawn(sampler, wide, leaning(wide, **{str(wide.vocabulary.think_end): 5.0}))
    assert all(words == [wide.vocabulary.think_end] for words in ended.words)
    assert ended.closed_R.all() and ended.bare == [[]] * len(ended.words)


@pytest.mark.parametrize("adapter", [False, True])
def test_log_probabilities_are_the_policys(sampler, wide, adapter: bool) -> None:
    """Those of now: what trains has changed, in all blocks."""
    model = copy.deepcopy(wide.model)
    if adapter:
        token_ids = new_token_ids(wide.vocabulary, wide.tokenizer)
        adapted = add_lora(model, token_ids=token_ids, rank=4, alpha=8.0, dropout=0.0)
        model = plain_model(adapted)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            noise = 0.3 * torch.randn(weight.shape, generator=generator)
            weight.data += noise * weight.data.abs().mean().clamp(min=0.1)
    thoughts = drawn(sampler, wide, model)
    attach_policy(model, Policy(wide.vocabulary, wide.trie, text_of(wide), 0.8))
    prompts = [prompt for prompt in prompts_of(wide) for _ in range(SAMPLES)]
    for prompt, words, found in zip(prompts, thoughts.words, thoughts.log_probs, strict=True):
        ids_1T = torch.tensor([[*prompt, *words]])
        text_1T = torch.arange(ids_1T.shape[1])[None] >= len(prompt)
        with torch.no_grad():
            scored = score(model, ids_BT=ids_1T, mask_BT=torch.ones_like(ids_1T), text_BT=text_1T)
        expected = scored.words_BT[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(found), expected, atol=2e-3, rtol=1e-3)
        assert math.fsum(found) < -1  # nothing was certain


def test_draws_depend_on_seed_step_and_sample_alone(sampler, wide) -> None:
    first, other = (drawn(sampler, wide, wide.model, seed=seed).words for seed in (1, 2))
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert len({tuple(words) for words in first}) == len(first)
    turned = sampler.sample(prompts_of(wide)[2:0:-1], seed=1, keys=[2, 1])
    assert turned.words == [*first[2 * SAMPLES : 3 * SAMPLES], *first[SAMPLES : 2 * SAMPLES]]
    assert sampler.sample(prompts_of(wide)[:1], seed=1, keys=[9]).words != first[:SAMPLES]


def test_cold_thoughts_are_those_of_our_decoder(folder, wide) -> None:
    model = copy.deepcopy(wide.model)
    model.model.norm.weight.data *= 4  # nothing is nearly as good as the best
    sampler = make_sampler(folder, wide, temperature=0.01)
    found = drawn(sampler, wide, model)
    sampler.close()
    decoder = BeamDecoder(model, vocabulary=wide.vocabulary, trie=wide.trie)
    thoughts = Thinker(decoder, wide.encoder).think(
        prompts_of(wide), samples=SAMPLES, max_tokens=MAX_TOKENS, temperature=0.01, seed=0
    )
    assert found.words == sampled(thoughts).words
    assert len({tuple(words) for words in found.words}) > 1


def test_beams_and_rewards_are_those_of_one_thought_at_a_time(sampler, wide) -> None:
    roller = make_roller(wide)
    roller.sampler = sampler
    check_groups(wide, roller, [0, 5, 17, 40], seed=3)
    again, other = (roller.live_groups(wide.model, [0, 5], seed=seed)[0] for seed in (3, 4))
    assert [group.words for group in again] == [
        group.words for group in roller.live_groups(wide.model, [0, 5], seed=3)[0]
    ]
    assert [group.words for group in again] != [group.words for group in other]


def test_what_vllm_cannot_hold(folder, wide) -> None:
    with pytest.raises(
        ValueError, match=r"cannot hold .* \(.*max_model_len.*\); lower roll"
    ) as error:
        VllmSampler(
            folder, think_end=0, samples=1, max_tokens=9, temperature=1.0, rows=2, longest=1_000
        )
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def activated_run(prepared_run, make_backbone, tmp_path_factory) -> Path:
    """A run with a LoRA-activated model that vLLM can hold; not to be changed."""
    made = tmp_path_factory.mktemp("activated") / "run"
    return make_activated(prepared_run, make_backbone(**SIZES), made)


def test_a_killed_training_goes_on_as_it_would_have(
    activated_run, tmp_path, monkeypatch, grpo_columns
) -> None:
    check_resuming(activated_run, tmp_path, monkeypatch, rollouts="vllm", lr=3e-2)
    steps = steps_of(tmp_path / "whole")
    assert all(row.keys() == grpo_columns for row in steps)
    assert all(row["legal"] == 1 and 0 < row["trace_tokens"] <= 8 for row in steps)


@pytest.fixture(scope="module")
def grpo_columns(activated_run, tmp_path_factory) -> set[str]:
    """What is logged of a step whose thoughts our decoder samples."""
    settings = {"max_steps": 1, "evaluations": 1}
    run = enhanced(activated_run, tmp_path_factory.mktemp("ours") / "run", **settings)
    return steps_of(run)[0].keys()


def test_grpo_raises_a_reward_that_can_be_raised(activated_run, tmp_path, monkeypatch) -> None:
    from whyrec.serve import tries

    rules = (think_module, enhance_module, tries)
    # A wider model learns quicker.
    settings = {"rollouts": "vllm", "lr": 1e-3}
    check_raising(activated_run, tmp_path, monkeypatch, rules=rules, **settings)


def test_preferences_are_sampled_too(activated_run, tmp_path) -> None:
    settings = {"method": "dpo", "rollouts": "vllm", "max_steps": 1, "evaluations": 1}
    run = enhanced(activated_run, tmp_path / "run", **settings)
    assert summary_of(run)["preferences"]["kept"] == 48
