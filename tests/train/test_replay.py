"""Replays: the backbone's own words, questions too, kept once made."""

import copy
from pathlib import Path

import pytest
import torch

from conftest import make_model
from whyrec.prompting.templates import load_templates
from whyrec.train import replay
from whyrec.train.replay import Conversation, own_conversations, own_questions, own_replies


@pytest.fixture(scope="module")
def backbone(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    return make_model(vocab_size=len(tokenizer)), tokenizer


def test_packaged_prompts_come_first_and_are_kept(backbone, tmp_path: Path) -> None:
    model, tokenizer = backbone
    cache = tmp_path / "replies.json"
    train = load_templates("general")["train"]

    def made(count: int, cache: Path) -> list[Conversation]:
        return own_conversations(model, tokenizer, count=count, max_tokens=4, seed=0, cache=cache)

    said = made(3, cache)
    assert [conversation.prompt for conversation in said] == train[:3]
    assert made(99, cache) == said  # a run that goes on must see the same examples
    assert made(0, tmp_path / "none.json") == []


def test_only_a_reply_that_came_to_its_end_has_one(backbone, monkeypatch) -> None:
    """A model that is taught an end where its tokens ran out breaks off there ever after."""
    model, tokenizer = backbone
    end = tokenizer.eos_token_id

    def generated(model, tokenizer, texts, max_tokens, *, stop: list[int]):
        assert end in stop
        return torch.tensor(
            [[11, 12, 13, 14] if "long" in text else [11, end] * 2 for text in texts]
        )

    monkeypatch.setattr(replay, "_generate", generated)
    said = own_replies(model, tokenizer, ["a long one", "short", "long"], 4)
    assert [conversation.ended for conversation in said] == [False, True, False]


def test_questions_are_whole_new_and_the_seeds_alone(backbone, monkeypatch) -> None:
    """Sampled turns of a backbone: some are cut off, blank, known, or come twice."""
    model, tokenizer = backbone
    stop = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    drawn: list[int] = []

    def sampled(model, tokenizer, texts, max_tokens, *, stop: int, sampled: bool):
        assert sampled and all(text.endswith("<|im_start|>user\n") for text in texts)
        drawn.append(int(torch.randint(1000, (1,))))
        said = ["Why is rain wet?", "Known one?", " ", "Why is rain wet?", f"Number {drawn[-1]}?"]
        rows = [[*tokenizer.encode(text), stop] for text in said]
        rows.append(tokenizer.encode("This one never ends and has no stop"))
        longest = max(map(len, rows))
        pad = tokenizer.encode("x")
        # A row ends at its stop; behind it may stand anything.
        return torch.tensor([row + pad * (longest - len(row)) for row in rows])

    monkeypatch.setattr(replay, "_generate", sampled)
    before = torch.random.get_rng_state()
    ask = {"known": {"Known one?"}, "seed": 3}
    first = own_questions(model, tokenizer, 3, **ask)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)  # nothing but the seed decides
    assert own_questions(model, tokenizer, 3, **ask) == first
    assert first[0] == "Why is rain wet?" and first[1].startswith("Number ")
    assert len(first) == len(set(first)) and "Known one?" not in first
    assert stop  # the fixture's chat format has one


def test_a_backbone_that_has_no_more_to_ask_gives_what_it_has(backbone, monkeypatch) -> None:
    model, tokenizer = backbone

    def always(model, tokenizer, texts, max_tokens, *, stop: int, sampled: bool):
        return torch.tensor([[*tokenizer.encode("Again?"), stop]] * len(texts))

    monkeypatch.setattr(replay, "_generate", always)
    assert own_questions(model, tokenizer, 50, known=set(), seed=0) == ["Again?"]


def test_sampling_is_the_backbones_own_distribution(backbone) -> None:
    """Neither its generation settings nor ours may bend it: a frequency test on one token."""
    model, tokenizer = backbone
    model = copy.deepcopy(model)
    model.generation_config.top_k = 1  # an inherited setting that would
    text = "<|im_start|>user\n"
    torch.manual_seed(0)
    drawn_B = torch.cat(
        [
            replay._generate(model, tokenizer, [text] * 64, 1, stop=None, sampled=True)[:, 0]
            for _ in range(4)
        ]
    )
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        expected_V = model(ids).logits[0, -1].softmax(-1)
    most = int(expected_V.argmax())
    share = float((drawn_B == most).float().mean())
    spread = float((expected_V[most] * (1 - expected_V[most]) / len(drawn_B)).sqrt())
    assert abs(share - float(expected_V[most])) < 5 * spread + 1e-3
    assert len(drawn_B.unique()) > 1
