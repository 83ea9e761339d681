"""Language kept: does the aligned model still find plain English as likely as its backbone does?

The untouched backbone answers held-out prompts of `prompts/general.yaml`, none of which alignment
replays. Both models then read these replies, and

    perplexity = exp(mean negative log-likelihood of a reply token, end of turn included)

is computed for each, the aligned model over its whole vocabulary, SID tokens included: probability
that leaks to them counts against it. A ratio of 1.1 is a loss of 10 %.

    figures = language_figures(model, encoder, backbone="smollm2-135m")

`greedy_replies` and `perplexity` work on token ids of any prompts.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from whyrec.backbone.load import load_backbone
from whyrec.prompting.encoder import PromptEncoder
from whyrec.prompting.templates import load_templates

_REPLY_TOKENS = 64
_BATCH = {"cpu": 16, "cuda": 256}  # prompts answered at once
_READ_BATCH = 8  # replies read at once: each token has logits over the whole vocabulary


def language_figures(
    model: PreTrainedModel, encoder: PromptEncoder, *, backbone: str
) -> dict[str, float]:
    """Perplexity of an aligned model and of its backbone on the backbone's own replies.

    Args:
        model: the aligned model, whose vocabulary extends the backbone's.
        encoder: of the aligned model.
        backbone: name of the backbone, as `load_backbone` takes it.

    Returns:
        `language/perplexity`, `language/base_perplexity`, `language/perplexity_ratio`.

    Raises:
        ValueError: when the backbone cannot be loaded.
    """
    templates = load_templates("general")
    frame = encoder.frame(templates["system"])
    prompts = [
        [*frame.before_user, *encoder.text(prompt), *frame.before_reply]
        for prompt in templates["held_out"]
    ]
    base, _ = load_backbone(backbone, dtype=model.dtype)
    base = base.to(model.device).eval()  # type: ignore[arg-type]
    replies = greedy_replies(
        base,
        prompts,
        max_tokens=_REPLY_TOKENS,
        stop=frame.after_reply[0],
        progress="the backbone's replies",
    )
    kept = perplexity(model, prompts, replies)
    before = perplexity(base, prompts, replies)
    return {
        "language/perplexity": kept,
        "language/base_perplexity": before,
        "language/perplexity_ratio": kept / before,
    }


@torch.inference_mode()
def greedy_replies(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: int,
    progress: str = "",
) -> list[list[int]]:
    """The most probable next token, again and again, for each prompt.

    Args:
        model: a causal LM.
        prompts: token ids.
        max_tokens: of a reply at most.
        stop: the token that ends a reply; it is part of it where it came in time.
        progress: a label for the progress bar; none is shown when it is empty.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    size = _BATCH[model.device.type]
    starts = range(0, len(order), size)
    for start in tqdm(starts, desc=progress, unit="batch", disable=not progress, file=sys.stderr):
        batch = order[start : start + size]
        longest = len(prompts[batch[-1]])
        ids = np.full((len(batch), longest), stop, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, index in enumerate(batch):
            ids[row, longest - len(prompts[index]) :] = prompts[index]
            mask[row, longest - len(prompts[index]) :] = 1
        output_BT = model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=stop,
            pad_token_id=stop,
        )
        for index, reply in zip(batch, output_BT[:, longest:].tolist(), strict=True):
            end = reply.index(stop) + 1 if stop in reply else len(reply)
            replies[index] = reply[:end]
    return replies


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> float:
    """exp of the mean negative log-likelihood of all reply tokens, each given all before it."""
    total, count = 0.0, 0
    for start in range(0, len(prompts), _READ_BATCH):
        pairs = list(zip(prompts, replies, strict=True))[start : start + _READ_BATCH]
        longest = max(len(prompt) + len(reply) for prompt, reply in pairs)
        ids_BT = torch.zeros(len(pairs), longest, dtype=torch.long)
        wanted_BT = torch.zeros(len(pairs), longest, dtype=torch.bool)
        for row, (prompt, reply) in enumerate(pairs):
            end = len(prompt) + len(reply)
            ids_BT[row, :end] = torch.tensor([*prompt, *reply])
            wanted_BT[row, len(prompt) : end] = True
        # Padding is on the right, where a causal model never looks from a real token.
        hidden_BTD = model.base_model(ids_BT.to(model.device), use_cache=False).last_hidden_state
        rows_M, columns_M = wanted_BT.nonzero(as_tuple=True)
        total += float(
            _nll(model, hidden_BTD[rows_M, columns_M - 1], ids_BT[rows_M, columns_M]).sum()
        )
        count += len(rows_M)
    assert count, "there is no reply to read"
    return math.exp(total / count)


def _nll(model: PreTrainedModel, hidden_MD: Tensor, targets_M: Tensor) -> Tensor:
    logits_MV = model.get_output_embeddings()(hidden_MD).float()
    return torch.nn.functional.cross_entropy(
        logits_MV, targets_M.to(logits_MV.device), reduction="none"
    )
