"""General language without a corpus: the backbone's own conversations, replayed in alignment.

The untouched backbone answers a packaged list of prompts. Where more are wanted it makes up the
questions too: shown the opening of a user's turn and nothing else, a chat model goes on with what
users ask (Magpie, Xu et al. 2024, arXiv 2406.08464). Replaying what a model would say itself is
what keeps it from forgetting how (Scialom et al. 2022, arXiv 2205.12393).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrec.prompting.templates import load_templates
from whyrec.stage import write_json

_BATCH = {"cpu": 32, "cuda": 1024}
_QUESTION_TOKENS = 64
_SENTINEL = "\x1a"


class Conversation(NamedTuple):
    """A question, the backbone's reply, and whether that came to its end within the tokens given.

    Training must not ask for an end where there was none, or the model learns to break off.
    """

    prompt: str
    reply: str
    ended: bool


def own_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_tokens: int,
    seed: int,
    cache: Path,
) -> list[Conversation]:
    """The untouched backbone's greedy replies, kept in a JSON file.

    Args:
        model: the backbone, before its vocabulary is extended.
        tokenizer: its tokenizer.
        count: how many; those beyond the packaged prompts have questions of the backbone's own,
            and there are fewer where it has no chat format or cannot think of as many.
        max_tokens: of a reply at most.
        seed: of the questions.
        cache: where the conversations are kept, and read from when they are there.
    """
    if cache.exists():
        return [Conversation(*kept) for kept in json.loads(cache.read_text("utf-8"))]
    templates = load_templates("general")
    prompts = templates["train"][:count]
    if count > len(prompts) and tokenizer.chat_template is not None:
        known = {*prompts, *templates["held_out"]}  # which are for measuring
        prompts += own_questions(model, tokenizer, count - len(prompts), known=known, seed=seed)
    conversations = own_replies(model, tokenizer, prompts, max_tokens)
    write_json(cache, conversations)
    return conversations


def own_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    known: set[str],
    seed: int,
) -> list[str]:
    """Questions that the backbone expects of users, all different; other random states are kept.

    Args:
        model: the backbone.
        tokenizer: its tokenizer, with a chat template.
        count: how many at most; tries end after three times as many.
        known: questions that must not come.
        seed: of the sampling.
    """
    before, after = _chat(tokenizer, _SENTINEL).split(_SENTINEL)
    stop = tokenizer.encode(after, add_special_tokens=False)[0]
    size = _BATCH[model.device.type]
    found: dict[str, None] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=count, desc="questions to replay", unit="question", file=sys.stderr)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for _ in range(-(-3 * count // size)):
            sampled_BT = _generate(
                model, tokenizer, [before] * size, _QUESTION_TOKENS, stop=stop, sampled=True
            )
            for row in sampled_BT.tolist():
                if stop in row:  # what is cut off is no question
                    text = tokenizer.decode(row[: row.index(stop)], skip_special_tokens=True)
                    if text.strip() and text not in known:
                        found[text] = None
            bar.update(min(len(found), count) - bar.n)
            if len(found) >= count:
                break
    bar.close()
    return list(found)[:count]


def own_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int,
) -> list[Conversation]:
    """The backbone's greedy reply to each prompt."""
    conversations: dict[int, Conversation] = {}
    ends = _end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # little padding
    size = _BATCH[model.device.type]
    starts = range(0, len(prompts), size)
    for start in tqdm(starts, desc="replies to replay", unit="batch", file=sys.stderr):
        batch = order[start : start + size]
        texts = [_chat(tokenizer, prompts[n]) for n in batch]
        new_BT = _generate(model, tokenizer, texts, max_tokens, stop=ends)
        replies = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        for n, reply, row in zip(batch, replies, new_BT.tolist(), strict=True):
            conversations[n] = Conversation(prompts[n], reply, not {*ends}.isdisjoint(row))
    return [conversations[n] for n in range(len(prompts))]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a reply: those that the model stops at by itself, and its tokenizer's."""
    ends = model.generation_config.eos_token_id
    known = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [*known, tokenizer.eos_token_id] if token is not None})


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_tokens: int,
    *,
    stop: int | list[int] | None = None,
    sampled: bool = False,
) -> Tensor:
    """New tokens after each text [B, T]; settings of the backbone's own are left out."""
    inputs = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    ).to(model.device)
    how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if sampled else {}
    output_BT = model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        **({"do_sample": False} | how),
        **({} if not stop else {"eos_token_id": stop}),
    )
    return output_BT[:, inputs["input_ids"].shape[1] :]


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt in the backbone's chat format, the reply opened."""
    system = load_templates("general")["system"]
    if tokenizer.chat_template is None:
        return f"{system}\n\nUser: {prompt}\nAssistant: "
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text
