"""Pack training examples into rows of one fixed length, and say where each loss is taken.

Every micro-batch is one row of T tokens, so that kernels are compiled once and nothing is padded
but a row's end. Where the losses are taken, and which trie node stands before each SID code, is
worked out here, on the CPU by the loader's workers: the GPU never has to wait to be asked.

Dimensions: T tokens of a row, D documents (examples) in it, M positions of one kind.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from whyrec.prompting.encoder import IGNORED
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary

Row = dict[str, Tensor | list[Tensor] | int]


class Mix(Protocol):
    """Training examples of several epochs, rendered when they are asked for.

    Attributes:
        epoch_starts: index of each epoch's first example, and how many there are.
    """

    epoch_starts: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, list[int]]: ...

    def length(self, index: int) -> int:
        """At most how many tokens an example has, without rendering it."""


class PackedOrder:
    """The examples of all epochs, shuffled epoch by epoch and laid into rows; a batch sampler.

    The order is a function of (mix, seed): every process and every resumed run has the same one.

    Args:
        mix: the examples.
        tokens: T, tokens of a row at most.
        seed: of the order.

    Attributes:
        rows: by row, indices of its examples.
        longest: tokens of the longest example.
        most: D, documents that any row holds at most, padding included.

    Raises:
        ValueError: when an example is longer than a row.
    """

    def __init__(self, mix: Mix, *, tokens: int, seed: int) -> None:
        self.tokens = tokens
        self.longest = 0
        self.rows: list[list[int]] = [[]]
        room = tokens
        for epoch, start in enumerate(mix.epoch_starts[:-1]):
            rng = np.random.default_rng((seed, epoch, 3))
            for offset in rng.permutation(mix.epoch_starts[epoch + 1] - start).tolist():
                length = mix.length(start + offset)
                if length > room:
                    self.rows.append([])
                    room = tokens
                self.rows[-1].append(start + offset)
                room -= length
                self.longest = max(self.longest, length)
        if self.longest > tokens:
            raise ValueError(
                f"the longest training example has {self.longest} tokens and a row holds {tokens}; "
                "raise micro_batch_tokens in the recipe"
            )
        self.most = max(map(len, self.rows)) + -(-tokens // max(self.longest, 1))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows)


def pack(
    examples: Sequence[dict[str, list[int]]],
    *,
    tokens: int,
    longest: int,
    documents: int,
    vocabulary: SidVocabulary,
    trie: Trie,
    pad_id: int,
) -> Row:
    """Lay examples end to end; the rest of the row is documents of padding.

    Args:
        examples: each with `input_ids` and `labels` (unshifted, -100 where no loss is wanted).
        tokens: T; the examples must fit.
        longest: no document may have more tokens, or attention would leave its end unwritten.
        documents: D; so many at most, padding included. Rows with fewer end in empty ones, so that
            all have one shape.
        vocabulary: where the SID tokens are.
        trie: the catalogue's SIDs, on the CPU.
        pad_id: what the end of the row is filled with.

    Returns:
        `input_ids`, `labels`, `position_ids` [1, T]; `document_starts` int32 [D + 1];
        `num_tokens`, without padding; `text_positions` [M], whose next token is text that is
        wanted; and by level `sid_positions` [M] and `sid_nodes` [M], the trie node before the code.
        A code that the trie forces costs nothing and is in none of them.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    used = sum(lengths)
    assert used <= tokens, f"{used} tokens do not fit into a row of {tokens}"
    ids_T = np.full(tokens, pad_id, dtype=np.int64)
    labels_T = np.full(tokens, IGNORED, dtype=np.int64)
    ids_T[:used] = np.concatenate([example["input_ids"] for example in examples])
    labels_T[:used] = np.concatenate([example["labels"] for example in examples])
    starts_D = np.cumsum([0, *lengths])
    # The first token of a document is nobody's target: the one before it is another document's.
    labels_T[starts_D[:-1]] = IGNORED
    padding = [min(longest, tokens - start) for start in range(used, tokens, longest)]
    lengths = [*lengths, *padding]
    assert max(lengths) <= longest
    starts_D = np.cumsum([0, *lengths])
    assert len(lengths) <= documents, f"{len(lengths)} documents where {documents} were reckoned"
    text_M, sid_positions, sid_nodes = _targets(ids_T, labels_T, vocabulary, trie)
    return {
        "input_ids": torch.from_numpy(ids_T)[None],
        "labels": torch.from_numpy(labels_T)[None],
        "position_ids": torch.from_numpy(np.arange(tokens) - np.repeat(starts_D[:-1], lengths))[
            None
        ],
        "document_starts": torch.from_numpy(
            np.pad(starts_D.astype(np.int32), (0, documents - len(lengths)), mode="edge")
        ),
        "num_tokens": used,
        "text_positions": text_M,
        "sid_positions": sid_positions,
        "sid_nodes": sid_nodes,
    }


def _targets(
    ids_T: np.ndarray, labels_T: np.ndarray, vocabulary: SidVocabulary, trie: Trie
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Positions before wanted text tokens; by level, those before wanted codes and their nodes."""
    next_T = labels_T[1:]
    is_sid_T = (next_T >= vocabulary.first) & (next_T < vocabulary.stop)
    text_M = np.flatnonzero((next_T != IGNORED) & ~is_sid_T)
    sid_positions, sid_nodes = [], []
    for level, offset in enumerate(vocabulary.offsets):
        here_T = (next_T >= offset) & (next_T < offset + vocabulary.level_sizes[level])
        position_M = np.flatnonzero(here_T)
        # A wanted SID is always whole, so that its earlier codes stand right before.
        before_MD = ids_T[position_M[:, None] - np.arange(level)[::-1]]
        node_M = trie.walk(torch.from_numpy(before_MD - np.array(vocabulary.offsets[:level], int)))
        open_M = trie.fan_out(node_M) > 1
        sid_positions.append(torch.from_numpy(position_M)[open_M])
        sid_nodes.append(node_M[open_M])
    return torch.from_numpy(text_M), sid_positions, sid_nodes
