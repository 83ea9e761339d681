"""Captions of SIDs: asked what an item is, does the model name its category and its brand?

The question is the first caption prompt of `prompts/align.yaml`, as alignment asks it; the reply is
decoded greedily. It is right where it names the item's most specific category: of the item's
categories the one that the fewest items of the catalogue have (of equally rare ones the last, since
catalogues list paths from the top down). A brand is right where the reply names it. Names are
compared as whole words, without regard to case.

Two sets of items are asked:

* *held out*, keys `caption/...`: items that alignment withheld (`withheld` in its recipe). Their
  SIDs stood in histories, their text was never shown: what the model says of them it can only know
  from items with a like SID, and from their company.
* *all*, keys `caption_all/...`: a fixed random sample of the whole catalogue.

Beside each figure stands that of the best constant answer: the set's most frequent category or
brand.

    figures = caption_figures(model, encoder, dataset, share=0.05)
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from whyrec.catalog.dataset import Dataset, Item
from whyrec.catalog.withheld import withheld
from whyrec.evaluation.language import greedy_replies
from whyrec.evaluation.metrics import bootstrap_interval
from whyrec.prompting.encoder import PromptEncoder
from whyrec.prompting.templates import load_templates

SAMPLE = 1000  # of all items; the 95 % interval of an accuracy is then at most ± .031
_CAPTION_TOKENS = 96  # a title, its categories and its brand


def caption_figures(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    dataset: Dataset,
    *,
    share: float,
    sample: int = SAMPLE,
) -> dict[str, float]:
    """Caption accuracies of an aligned model, each with a 95 % interval.

    Args:
        model: the aligned model.
        encoder: of the aligned model.
        dataset: the catalogue.
        share: of the items that alignment withheld; with 0 no item is held out.
        sample: how many items of the whole catalogue are asked at most.

    Returns:
        For `caption` (held-out items) and `caption_all`: `PREFIX/items`, how many were asked, and
        for `category` and `brand`, where any of these items has one, `PREFIX/category_accuracy`
        with `/low` and `/high`, and `PREFIX/category_majority`.
    """
    num_items = len(dataset.items)
    held_out = np.flatnonzero(withheld(dataset.items, share=share)).tolist()
    sampled = np.sort(np.random.default_rng(0).permutation(num_items)[:sample]).tolist()
    asked = sorted({*held_out, *sampled})
    texts = dict(zip(asked, captions(model, encoder, asked), strict=True))
    categories = specific_categories(dataset.items)
    figures: dict[str, float] = {}
    for prefix, chosen in (("caption", held_out), ("caption_all", sampled)):
        figures[f"{prefix}/items"] = len(chosen)
        for kind, names in (
            ("category", {item: categories[item] for item in chosen}),
            ("brand", {item: dataset.items[item].brand for item in chosen}),
        ):
            known = {item: name for item, name in names.items() if name}
            if known:
                right_E = np.array([names_it(texts[item], name) for item, name in known.items()])
                low, high = bootstrap_interval(right_E)
                key = f"{prefix}/{kind}_accuracy"
                figures |= {key: float(right_E.mean()), f"{key}/low": low, f"{key}/high": high}
                most = Counter(known.values()).most_common(1)[0][1]
                figures[f"{prefix}/{kind}_majority"] = most / len(known)
    return figures


def captions(model: PreTrainedModel, encoder: PromptEncoder, items: Sequence[int]) -> list[str]:
    """What the model says that each item is, decoded greedily."""
    templates = load_templates("align")
    frame = encoder.frame(templates["system"])
    prompts = []
    for item in items:
        question = encoder.render(templates["caption_user"][0], sid=encoder.sid(item))
        asked = [token for piece in question for token in piece]
        prompts.append([*frame.before_user, *asked, *frame.before_reply])
    replies = greedy_replies(
        model,
        prompts,
        max_tokens=_CAPTION_TOKENS,
        stop=frame.after_reply[0],
        progress="captions",
    )
    return [encoder.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]


def specific_categories(items: Sequence[Item]) -> list[str]:
    """Each item's most specific category, "" for an item without any.

    >>> specific_categories([Item("a", categories=("Hair", "Shampoos")),
    ...                      Item("b", categories=("Hair",))])
    ['Shampoos', 'Hair']
    """
    counts = Counter(name for item in items for name in set(item.categories))
    return [min(reversed(item.categories), key=counts.__getitem__, default="") for item in items]


def names_it(text: str, name: str) -> bool:
    """Whether the text holds the name as whole words, in any case.

    >>> names_it("Silk Shampoo (Hair Care, Shampoos)", "shampoos"), names_it("Shampoos", "Shampoo")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None
