"""General language without a corpus: the backbone's own replies to a packaged prompt list."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrec.prompting.templates import load_templates
from whyrec.stage import write_json

_BATCH = 32


def own_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    cache: Path,
) -> list[tuple[str, str]]:
    """The untouched backbone's greedy replies; (prompt, reply) pairs, kept in a JSON file.

    Args:
        model: the backbone, before its vocabulary is extended.
        tokenizer: its tokenizer.
        prompts: general questions.
        max_tokens: of a reply at most.
        cache: where the pairs are kept, and read from when they are there.
    """
    if cache.exists():
        return [(prompt, reply) for prompt, reply in json.loads(cache.read_text("utf-8"))]
    system = load_templates("general")["system"]
    pairs: list[tuple[str, str]] = []
    starts = range(0, len(prompts), _BATCH)
    for start in tqdm(starts, desc="replies to replay", unit="batch", file=sys.stderr):
        batch = prompts[start : start + _BATCH]
        texts = [_chat(tokenizer, system, prompt) for prompt in batch]
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(model.device)
        with torch.no_grad():
            output_BT = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        new_BT = output_BT[:, inputs["input_ids"].shape[1] :]
        replies = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        pairs += zip(batch, replies, strict=True)
    write_json(cache, pairs)
    return pairs


def _chat(tokenizer: PreTrainedTokenizerBase, system: str, prompt: str) -> str:
    if tokenizer.chat_template is None:
        return f"{system}\n\nUser: {prompt}\nAssistant: "
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text
