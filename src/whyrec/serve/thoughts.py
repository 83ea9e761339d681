"""Thoughts on the engine, several of one request side by side, and their words as they come."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from whyrec.decode.think import ThoughtSettings
from whyrec.prompting.encoder import PromptEncoder
from whyrec.serve.engine_calls import EngineCalls

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a character looks whose last bytes are missing


@dataclass(frozen=True)
class Words:
    """A piece of a thought's text."""

    sample: int
    text: str


class WordsSoFar:
    """What has been said of one thought; the pieces together are its text.

    Text is given out once later tokens can no longer change it.

    Args:
        tokenizer: of the tokens.
        sample: which thought it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sample: int) -> None:
        self._tokenizer, self._sample, self._said = tokenizer, sample, ""

    def add(self, ids: list[int], *, last: bool = False) -> Words | None:
        """The new text of a thought that now has these tokens; None where there is none yet."""
        text = self._tokenizer.decode(ids)
        assert isinstance(text, str)
        if not last:
            text = text.rstrip(_BROKEN)
        if not text.startswith(self._said) or text == self._said:
            return None
        piece = text[len(self._said) :]
        self._said = text
        return Words(self._sample, piece)


async def write_thoughts(
    calls: EngineCalls,
    encoder: PromptEncoder,
    prompt: list[int],
    *,
    how: ThoughtSettings,
    into: list[list[int]],
    request_id: str,
) -> AsyncGenerator[Words, None]:
    """Sample a request's thoughts; to stop listening frees them all.

    Args:
        calls: the engine.
        encoder: of the model.
        prompt: ending in `<think>`.
        how: how many thoughts, how long, how warm. The seed of each is its number.
        into: is filled with their token ids.
        request_id: of the request.
    """
    pieces: asyncio.Queue[tuple[int, list[int]] | None] = asyncio.Queue()

    async def write(sample: int) -> None:
        thought = calls.think(
            prompt,
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            seed=sample,
            request_id=f"{request_id}-{sample}",
        )
        async with aclosing(thought):
            async for ids in thought:
                pieces.put_nowait((sample, ids))

    said = [WordsSoFar(encoder.tokenizer, sample) for sample in range(how.samples)]
    into[:] = [[] for _ in said]
    writers = [asyncio.create_task(write(sample)) for sample in range(how.samples)]
    for writer in writers:
        writer.add_done_callback(lambda _: pieces.put_nowait(None))
    unfinished = len(writers)
    try:
        while unfinished:
            piece = await pieces.get()
            if piece is None:
                unfinished -= 1
                for writer in writers:
                    if writer.done():
                        writer.result()  # raises what went wrong
                continue
            sample, ids = piece
            into[sample] += ids
            if words := said[sample].add(into[sample]):
                yield words
        for sample, thought in enumerate(into):
            if words := said[sample].add(thought, last=True):
                yield words
    finally:
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
