"""SID tokens: their order, their text, and where a tokenizer holds them."""

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from conftest import Extended
from whyrec.sid.vocabulary import MARKERS, SidVocabulary, code_token, sid_text


def test_tokens_are_the_markers_then_the_codes_by_level() -> None:
    assert SidVocabulary.tokens((2, 1)) == [*MARKERS, "<s_a_0>", "<s_a_1>", "<s_b_0>"]
    assert MARKERS == ("<|sid_begin|>", "<|sid_end|>", "<think>", "</think>")
    with pytest.raises(ValueError, match="at most 26 levels, not 27"):
        SidVocabulary.tokens([1] * 27)


def test_sid_text() -> None:
    assert code_token(2, 255) == "<s_c_255>"
    assert sid_text([3, 17]) == "<|sid_begin|><s_a_3><s_b_17><|sid_end|>"


def test_encode_is_what_the_tokenizer_says(extended: Extended) -> None:
    vocabulary, tokenizer = extended.vocabulary, extended.tokenizer
    codes = extended.codes_NL[5].tolist()
    ids = tokenizer.encode(sid_text(codes), add_special_tokens=False)
    assert ids == [vocabulary.begin, *vocabulary.encode(codes), vocabulary.end]
    assert vocabulary.num_levels == 3 and vocabulary.stop - vocabulary.first == 12
    with pytest.raises(ValueError):
        vocabulary.encode(codes[:2])


def test_tokens_survive_decoding_without_special_ones(extended: Extended) -> None:
    """TRL decodes completions so, and must not lose a SID."""
    text = sid_text(extended.codes_NL[0].tolist())
    ids = extended.tokenizer.encode(f"{text}<think>so</think>", add_special_tokens=False)
    assert extended.tokenizer.decode(ids, skip_special_tokens=True) == f"{text}<think>so</think>"


def test_no_space_is_swallowed_around_a_token(extended: Extended) -> None:
    text = f"a {sid_text([0, 1, 2])} b\n{sid_text([1, 1, 1])}."
    ids = extended.tokenizer.encode(text, add_special_tokens=False)
    assert extended.tokenizer.decode(ids) == text


def test_a_tokenizer_without_the_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="does not hold the SID tokens of levels"):
        SidVocabulary.bind(tokenizer, level_sizes=(4, 4))


def test_a_tokenizer_with_other_levels(extended: Extended) -> None:
    for sizes in ((4, 4, 5), (4, 4, 4, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match="whyrec align"):
            SidVocabulary.bind(extended.tokenizer, level_sizes=sizes)


def test_tokens_that_do_not_lie_together(tokenizer: PreTrainedTokenizerBase) -> None:
    scattered = copy.deepcopy(tokenizer)
    scattered.add_tokens([*MARKERS, "<s_b_0>", "<s_a_0>"])
    with pytest.raises(ValueError, match="does not hold the SID tokens"):
        SidVocabulary.bind(scattered, level_sizes=(1, 1))
