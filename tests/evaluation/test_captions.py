"""Caption accuracy: what is asked, what counts as right, and what a constant answer would reach."""

from collections import Counter

import numpy as np
import pytest

from whyrec.catalog.dataset import Dataset, Item
from whyrec.evaluation import captions
from whyrec.prompting.encoder import item_text

ITEMS = [
    Item("a", "Silk", "Acme", ("Hair", "Shampoos")),
    Item("b", "Foam", "Acme", ("Hair", "Shampoos")),
    Item("c", "Rose", "Bloom", ("Face", "Creams")),
    Item("d", "Clay", "", ("Face",)),
    Item("e", "Unknown thing", "", ()),
    Item("r1", "Ink", "Coal (UK)", ("Face", "Creams")),
]


@pytest.fixture
def dataset() -> Dataset:
    """Of the items c and r1 are withheld at a share of .1."""
    sequences = [np.array([0, 1, 3, 0, 2], np.int32), np.array([4, 0, 2], np.int32)]
    splits = [np.array([0, 0, 0, 1, 2], np.int8), np.array([0, 1, 2], np.int8)]
    return Dataset(ITEMS, ["u", "v"], sequences, splits)


def replies(monkeypatch, texts: dict[int, str]) -> list[list[int]]:
    """Let the model say these texts; what is asked is collected."""
    asked: list[list[int]] = []

    def say(model, encoder, items) -> list[str]:
        asked.append(list(items))
        return [texts[item] for item in items]

    monkeypatch.setattr(captions, "captions", say)
    return asked


def test_perfect_captions(dataset, monkeypatch) -> None:
    asked = replies(monkeypatch, {n: item_text(item) for n, item in enumerate(ITEMS)})
    figures = captions.caption_figures(None, None, dataset, share=0.1)
    assert asked == [[0, 1, 2, 3, 4, 5]]
    assert figures["caption/items"] == 2 and figures["caption_all/items"] == 6
    for prefix in ("caption", "caption_all"):
        for kind in ("category", "brand"):
            for end in ("", "/low", "/high"):
                assert figures[f"{prefix}/{kind}_accuracy{end}"] == 1.0
    # The held-out items c and r1 are both Creams; of all five with a category two are.
    assert figures["caption/category_majority"] == 1.0
    assert figures["caption_all/category_majority"] == 2 / 5
    assert figures["caption/brand_majority"] == 1 / 2
    assert figures["caption_all/brand_majority"] == 2 / 4


def test_half_right_captions(dataset, monkeypatch) -> None:
    texts = ("SHAMPOOS by acme", "Hair", "Cream by Bloom", "", "", "Face, creams by coal (uk)")
    replies(monkeypatch, dict(enumerate(texts)))
    figures = captions.caption_figures(None, None, dataset, share=0.1)
    assert figures["caption/category_accuracy"] == 1 / 2
    assert figures["caption/brand_accuracy"] == 1.0
    assert figures["caption_all/category_accuracy"] == 2 / 5
    assert figures["caption_all/brand_accuracy"] == 3 / 4
    assert figures["caption_all/category_accuracy/low"] < 2 / 5


def test_a_sample_is_fixed_and_held_out_items_are_always_asked(dataset, monkeypatch) -> None:
    asked = replies(monkeypatch, dict.fromkeys(range(6), ""))
    for _ in range(2):
        figures = captions.caption_figures(None, None, dataset, share=0.1, sample=2)
    assert asked[0] == asked[1] and {2, 5} <= set(asked[0]) and len(asked[0]) <= 4
    assert figures["caption_all/items"] == 2


def test_nothing_is_said_of_what_the_catalogue_lacks(monkeypatch) -> None:
    dataset = Dataset([Item("a", "x")], ["u"], [np.array([0], np.int32)], [np.zeros(1, np.int8)])
    replies(monkeypatch, {0: "x"})
    assert captions.caption_figures(None, None, dataset, share=0.0) == {
        "caption/items": 0,
        "caption_all/items": 1,
    }


def test_the_most_specific_category_is_the_rarest_and_of_equals_the_last() -> None:
    assert captions.specific_categories(ITEMS) == [
        *("Shampoos", "Shampoos", "Creams", "Face", "", "Creams")
    ]
    assert Counter(captions.specific_categories(ITEMS))["Hair"] == 0


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("a (Hair, Eau de Parfum) by X", "eau de parfum", True),
        ("Shampoos", "Shampoo", False),
        ("Women's, Men's", "Men's", True),
        ("Women's", "Men's", False),
        ("C++ (Books)", "C++", True),
        ("", "x", False),
    ],
)
def test_names_are_whole_words(text: str, name: str, expected: bool) -> None:
    assert captions.names_it(text, name) is expected


def test_the_question_is_alignments_own(extended, monkeypatch) -> None:
    seen = {}

    def reply(model, prompts, *, max_tokens, stop, progress) -> list[list[int]]:
        seen.update(prompts=prompts, stop=stop)
        return [[*extended.encoder.text(f"Film {n}"), stop] for n in range(len(prompts))]

    monkeypatch.setattr(captions, "greedy_replies", reply)
    found = captions.captions(extended.model, extended.encoder, [3, 8])
    assert found == ["Film 0", "Film 1"]
    tokenizer = extended.tokenizer
    assert tokenizer.decode([seen["stop"]]) == "<|im_end|>"
    sid = tokenizer.decode(extended.encoder.sid(8))
    assert tokenizer.decode(seen["prompts"][1]).endswith(
        f"<|im_start|>user\nWhat is {sid}?<|im_end|>\n<|im_start|>assistant\n"
    )
