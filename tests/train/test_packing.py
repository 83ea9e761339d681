"""Packed rows: what lies in them, where losses are taken, and that documents keep apart."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mix import REPLIES, epochs_of, make_mix

from conftest import Extended, make_model
from whyrec.backbone.packed_attention import PACKED, attention_of
from whyrec.prompting.encoder import IGNORED
from whyrec.train.packing import PackedOrder, pack


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(250, 2000), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_rows_hold_every_example_once_and_fit(
    extended: Extended, tokens: int, epochs: int, seed: int
) -> None:
    mix = make_mix(extended, captions=1.0, personas=1.0, replies=REPLIES, epochs=epochs, seed=seed)
    order = PackedOrder(mix, tokens=tokens, seed=seed)
    assert list(order) == list(PackedOrder(mix, tokens=tokens, seed=seed))
    assert len(order) == len(list(order))
    flat = [index for row in order for index in row]
    position = 0
    for epoch in epochs_of(mix):  # one epoch after the other, each shuffled
        part = flat[position : position + len(epoch)]
        assert sorted(part) == list(epoch)
        position += len(epoch)
    assert position == len(flat)
    filled = [sum(len(mix[index]["input_ids"]) for index in row) for row in order]
    assert max(filled) <= tokens
    assert order.longest >= max(len(mix[index]["input_ids"]) for index in flat)
    for row, used in zip(order, filled, strict=True):
        assert len(row) + -(-(tokens - used) // order.longest) <= order.most
    # A row ends only where the next example does not fit.
    for row, following in pairwise(order.rows):
        assert sum(map(mix.length, row)) + mix.length(following[0]) > tokens


def test_shuffled_within_and_between_epochs(extended: Extended) -> None:
    mix = make_mix(extended, captions=1.0, epochs=2)
    flat = [index for row in PackedOrder(mix, tokens=500, seed=0) for index in row]
    first, second = flat[: mix.epoch_starts[1]], flat[mix.epoch_starts[1] :]
    assert first != sorted(first)
    assert [index + mix.epoch_starts[1] for index in first] != second


def test_a_row_too_short_for_an_example_is_refused(extended: Extended) -> None:
    mix = make_mix(extended, personas=1.0)
    with pytest.raises(ValueError, match=r"has \d+ tokens and a row holds 40; raise micro_batch"):
        PackedOrder(mix, tokens=40, seed=0)


def row_of(
    extended: Extended,
    indices: list[int],
    *,
    tokens: int = 1200,
    longest: int = 200,
    documents: int = 40,
):
    mix = make_mix(extended, captions=1.0, personas=1.0, replies=REPLIES)
    examples = [mix[index] for index in indices]
    row = pack(
        examples,
        tokens=tokens,
        longest=longest,
        documents=documents,
        vocabulary=extended.vocabulary,
        trie=extended.trie,
        pad_id=7,
    )
    return examples, row


@settings(max_examples=30, deadline=None)
@given(indices=st.lists(st.integers(0, 80), min_size=1, max_size=8))
def test_what_lies_in_a_row(extended: Extended, indices: list[int]) -> None:
    examples, row = row_of(extended, indices)
    ids, labels, positions = (
        row[name][0].tolist() for name in ("input_ids", "labels", "position_ids")
    )
    starts = row["document_starts"].tolist()
    assert row["document_starts"].dtype == torch.int32
    assert starts[0] == 0 and starts[-1] == len(ids) == 1200
    assert row["num_tokens"] == sum(len(example["input_ids"]) for example in examples)
    starts = sorted(set(starts))  # documents at the end may be empty
    for start, stop in pairwise(starts):
        assert 0 < stop - start <= 200
        assert positions[start:stop] == list(range(stop - start))
    for example, start in zip(examples, starts, strict=False):
        stop = start + len(example["input_ids"])
        assert ids[start:stop] == example["input_ids"] and labels[start:stop] == example["labels"]
    assert ids[row["num_tokens"] :] == [7] * (1200 - row["num_tokens"])
    assert all(label == IGNORED for label in labels[row["num_tokens"] :])

    # Where losses are taken, by brute force.
    vocabulary, codes = extended.vocabulary, extended.codes_NL.tolist()
    text, sids = [], [[] for _ in vocabulary.offsets]
    for t in range(1, len(labels)):
        if labels[t] == IGNORED:
            continue
        if not vocabulary.first <= labels[t] < vocabulary.stop:
            text.append(t - 1)
            continue
        level = max(d for d, offset in enumerate(vocabulary.offsets) if labels[t] >= offset)
        before = [ids[t - level + d] - vocabulary.offsets[d] for d in range(level)]
        if len({code[level] for code in codes if code[:level] == before}) > 1:
            sids[level].append((t - 1, before))
    assert row["text_positions"].tolist() == text
    for level, wanted in enumerate(sids):
        assert row["sid_positions"][level].tolist() == [position for position, _ in wanted]
        nodes = extended.trie.walk(
            torch.tensor([before for _, before in wanted], dtype=torch.long).reshape(
                len(wanted), level
            )
        )
        assert row["sid_nodes"][level].tolist() == nodes.tolist()


def test_a_nearly_empty_row_pads_with_documents_no_longer_than_others(extended: Extended) -> None:
    """The kernel leaves the end of a longer document unwritten: NaN, and so every weight."""
    examples, row = row_of(extended, [0], tokens=2000, longest=150)
    used = len(examples[0]["input_ids"])
    starts = row["document_starts"].tolist()
    assert sorted(set(starts)) == [0, *range(used, 2000, 150), 2000]
    assert len(starts) == 41 and starts == sorted(starts)  # empty documents behind the last
    with pytest.raises(AssertionError):
        row_of(extended, [0], longest=used - 1)


def test_a_full_row_has_no_padding_document(extended: Extended) -> None:
    mix = make_mix(extended)
    length = len(mix[0]["input_ids"])
    _, row = row_of(extended, [0], tokens=length, documents=1)
    assert row["document_starts"].tolist() == [0, length]
    with pytest.raises(AssertionError, match="do not fit"):
        row_of(extended, [0], tokens=length - 1)
    with pytest.raises(AssertionError, match="2 documents where 1"):
        row_of(extended, [0], tokens=length + 1, documents=1)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_documents_do_not_see_each_other(extended: Extended, kind: str) -> None:
    """Hidden states of a packed row are those of each document by itself."""
    model = make_model(kind, vocab_size=len(extended.tokenizer))
    examples, row = row_of(extended, [3, 40, 70, 1])
    starts = row["document_starts"].tolist()
    with torch.no_grad():
        with attention_of(model, PACKED):
            hidden_1TD = model.base_model(
                input_ids=row["input_ids"],
                position_ids=row["position_ids"],
                use_cache=False,
                document_starts=row["document_starts"],
                longest=200,
            ).last_hidden_state
        for example, start in zip(examples, starts, strict=False):
            alone_1TD = model.base_model(torch.tensor([example["input_ids"]])).last_hidden_state
            stop = start + alone_1TD.shape[1]
            torch.testing.assert_close(hidden_1TD[:, start:stop], alone_1TD, atol=1e-5, rtol=1e-4)
