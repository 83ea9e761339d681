"""The tokens that a backbone's vocabulary is extended with: SID codes and their brackets.

Level 0 has the tokens `<s_a_0>`, `<s_a_1>`, …, level 1 `<s_b_0>`, …, as in OneRec-Think
(arXiv 2510.11639). All are *non-special* added tokens: TRL decodes with
`skip_special_tokens=True`, which would delete special ones.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

SID_BEGIN, SID_END = "<|sid_begin|>", "<|sid_end|>"
THINK_BEGIN, THINK_END = "<think>", "</think>"
MARKERS = (SID_BEGIN, SID_END, THINK_BEGIN, THINK_END)


def code_token(level: int, code: int) -> str:
    """The text of one code, e.g. `<s_b_17>` for code 17 at level 1."""
    return f"<s_{string.ascii_lowercase[level]}_{code}>"


def sid_text(codes: Sequence[int]) -> str:
    """A whole SID as text, brackets included.

    >>> sid_text([3, 17])
    '<|sid_begin|><s_a_3><s_b_17><|sid_end|>'
    """
    return SID_BEGIN + "".join(code_token(i, c) for i, c in enumerate(codes)) + SID_END


@dataclass(frozen=True)
class SidVocabulary:
    """Token ids of the SID codes in a tokenizer.

    Attributes:
        level_sizes: number of codes at each level, L entries.
        offsets: token id of code 0 at each level; the codes of a level are consecutive ids,
            and so are the levels.
        begin: token id of `<|sid_begin|>`.
        end: token id of `<|sid_end|>`.
        think_begin, think_end: token ids of `<think>` and `</think>`; -1 in a vocabulary that has
            no words to think in.
    """

    level_sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    begin: int
    end: int
    think_begin: int = -1
    think_end: int = -1

    @staticmethod
    def tokens(level_sizes: Sequence[int]) -> list[str]:
        """The markers, then every code token in the order of their ids."""
        if len(level_sizes) > len(string.ascii_lowercase):
            raise ValueError(f"an SID has at most 26 levels, not {len(level_sizes)}")
        codes = [code_token(lv, c) for lv, size in enumerate(level_sizes) for c in range(size)]
        return [*MARKERS, *codes]

    @classmethod
    def bind(
        cls, tokenizer: PreTrainedTokenizerBase, *, level_sizes: Sequence[int]
    ) -> "SidVocabulary":
        """Look the tokens up in a tokenizer that already holds them.

        Raises:
            ValueError: when they are not there, or do not lie one after the other.
        """
        sizes = tuple(int(size) for size in level_sizes)
        ids = tokenizer.convert_tokens_to_ids(cls.tokens(sizes))
        codes = ids[len(MARKERS) :]
        if None in ids or codes != list(range(codes[0], codes[0] + sum(sizes))):
            raise ValueError(
                f"this tokenizer does not hold the SID tokens of levels {list(sizes)}; "
                "extend the backbone with `whyrec align` first"
            )
        starts = [sum(sizes[:level]) for level in range(len(sizes))]
        offsets = tuple(codes[0] + start for start in starts)
        return cls(sizes, offsets, *ids[: len(MARKERS)])

    @property
    def num_levels(self) -> int:
        return len(self.level_sizes)

    @property
    def first(self) -> int:
        """Token id of the first code of the first level."""
        return self.offsets[0]

    @property
    def stop(self) -> int:
        """One past the token id of the last code of the last level."""
        return self.offsets[-1] + self.level_sizes[-1]

    def rows_by_level(self, head_VD: Tensor) -> tuple[Tensor, ...]:
        """The rows of a head, or of an embedding, that belong to each level's codes [K, D]."""
        return head_VD[self.first : self.stop].split(list(self.level_sizes))

    def encode(self, codes: Sequence[int]) -> list[int]:
        """Codes of one item → token ids, without brackets."""
        return [offset + int(code) for offset, code in zip(self.offsets, codes, strict=True)]
