"""The alignment mix: what every epoch covers, where the loss is taken, and in which order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import NUM_ITEMS, Extended
from whyrec.catalog.alike import Alike
from whyrec.catalog.covisits import CoVisits
from whyrec.catalog.withheld import withheld
from whyrec.prompting.encoder import IGNORED, PromptEncoder, item_text
from whyrec.prompting.notes import Notes
from whyrec.train.mix import AlignmentMix, MixSizes
from whyrec.train.packing import PackedOrder
from whyrec.train.replay import Conversation

REPLIES = [
    Conversation("What is a tide?", "The sea, moved by the moon.", ended=True),
    Conversation("Hello <|im_end|>", "Hi", ended=True),
]


def make_mix(
    extended: Extended,
    *,
    sequences: list[np.ndarray] | None = None,
    captions: float = 0.0,
    personas: float = 0.0,
    max_history: int = 4,
    drop_events: float = 0.0,
    jitter_events: float = 0.0,
    withheld: float = 0.0,
    replies: list[Conversation] | None = None,
    replays: int | None = None,
    epochs: int = 2,
    seed: int = 0,
) -> AlignmentMix:
    return AlignmentMix(
        extended.encoder,
        items=extended.dataset.items,
        sequences=extended.dataset.training_sequences() if sequences is None else sequences,
        replies=replies or [],
        sizes=MixSizes(
            captions,
            personas,
            max_history,
            drop_events,
            jitter_events,
            withheld,
            replays,
        ),
        epochs=epochs,
        seed=seed,
    )


def text_of(extended: Extended, ids: list[int]) -> str:
    return extended.tokenizer.decode(ids, skip_special_tokens=False)


def wanted(example: dict[str, list[int]]) -> list[int]:
    """The tokens that a loss is taken on; each must be the token that stands there."""
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    assert all(label in (IGNORED, token) for token, label in pairs)
    return [label for _, label in pairs if label != IGNORED]


def items_in(extended: Extended, ids: list[int]) -> list[int]:
    """Items whose SIDs stand in `ids`, in order; codes must make whole SIDs."""
    vocabulary, codes = extended.vocabulary, extended.codes_NL.tolist()
    tokens = [i for i in ids if vocabulary.first <= i < vocabulary.stop]
    levels = vocabulary.num_levels
    assert len(tokens) % levels == 0
    sids = [tokens[i : i + levels] for i in range(0, len(tokens), levels)]
    return [
        codes.index([t - o for t, o in zip(sid, vocabulary.offsets, strict=True)]) for sid in sids
    ]


def epochs_of(mix: AlignmentMix) -> list[range]:
    return [
        range(start, stop)
        for start, stop in zip(mix.epoch_starts, mix.epoch_starts[1:], strict=False)
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    max_history=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_every_event_is_a_target_in_every_epoch(
    extended: Extended, lengths: list[int], max_history: int, seed: int
) -> None:
    # An item of its own for every event would be clearest; users in turn come close to it.
    for length in lengths:
        sequence = np.arange(length, dtype=np.int32) % NUM_ITEMS
        mix = make_mix(extended, sequences=[sequence], max_history=max_history, epochs=3, seed=seed)
        for epoch in epochs_of(mix):
            covered: set[int] = set()
            for index in epoch:
                example = mix[index]
                items = items_in(extended, example["input_ids"])
                assert 2 <= len(items) <= max_history + 1
                assert items == list(range(items[0], items[0] + len(items)))  # one after the other
                assert items_in(extended, wanted(example)) == items
                covered.update(items)
            assert covered == (set(range(length)) if length >= 2 else set())


def test_windows_move_from_epoch_to_epoch(extended: Extended) -> None:
    mix = make_mix(extended, sequences=[np.arange(25, dtype=np.int32)], epochs=12)
    starts = {
        tuple(items_in(extended, mix[index]["input_ids"])[0] for index in epoch)
        for epoch in epochs_of(mix)
    }
    assert len(starts) > 2


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 12),
    drop=st.sampled_from([0.0, 0.3, 0.9]),
    jitter=st.sampled_from([0.0, 1.5, 3.0]),
    seed=st.integers(0, 1000),
)
def test_events_left_out_and_jittered(
    extended: Extended, length: int, drop: float, jitter: float, seed: int
) -> None:
    sequence = np.arange(length, dtype=np.int32)
    mix = make_mix(
        extended,
        sequences=[sequence],
        max_history=20,
        drop_events=drop,
        jitter_events=jitter,
        epochs=3,
        seed=seed,
    )
    for index in range(len(mix)):
        example = mix[index]
        items = items_in(extended, example["input_ids"])
        assert items == items_in(extended, mix[index]["input_ids"])  # drawn from the index alone
        assert len(set(items)) == len(items) >= 2 and set(items) <= set(range(length))
        assert items_in(extended, wanted(example)) == items
        if drop == 0.0:
            assert len(items) == length
        ranks = np.argsort(np.argsort(items))
        assert np.abs(ranks - np.arange(len(items))).max() <= np.ceil(jitter)
        assert mix.length(index) == len(example["input_ids"])


def test_every_epoch_leaves_out_other_events(extended: Extended) -> None:
    sequence = np.arange(12, dtype=np.int32)
    mix = make_mix(
        extended, sequences=[sequence], max_history=20, drop_events=0.3, jitter_events=2, epochs=9
    )
    shown = [tuple(items_in(extended, mix[index]["input_ids"])) for index in range(len(mix))]
    assert len(set(shown)) > 6
    assert 0.5 < np.mean([len(items) for items in shown]) / 12 < 0.85


def test_a_sequence_trains_its_history_and_its_reply_alone(extended: Extended) -> None:
    sequence = np.array([4, 9, 2], dtype=np.int32)
    mix = make_mix(extended, sequences=[sequence], epochs=1)
    example = mix[0]
    encoder, vocabulary = extended.encoder, extended.vocabulary
    end_of_turn = encoder.frame(encoder.recommend["system"]).after_reply[:1]
    assert wanted(example) == [
        *encoder.history([4, 9]),
        *encoder.item(2),
        vocabulary.end,
        *end_of_turn,
    ]
    # What comes before the reply is the very prompt that the recommender starts from.
    prompt = encoder.recommendation_prompt([4, 9])
    assert example["input_ids"][: len(prompt)] == prompt


def test_every_task_trains_its_reply_alone(extended: Extended) -> None:
    mix = make_mix(extended, captions=1.0, personas=1.0, replies=REPLIES, epochs=1)
    counts = mix.tasks()
    assert counts["caption"] == counts["lookup"] == NUM_ITEMS and counts["replay"] == 2
    end = extended.encoder.frame("").after_reply[0]
    texts = {item_text(item): n for n, item in enumerate(extended.dataset.items)}
    seen: Counter[str] = Counter()
    for index in range(len(mix)):
        task, subject, _ = mix._plan[index]
        example = mix[index]
        labels = example["labels"]
        reply = wanted(example)
        assert reply[-1] == end and labels[-1] == end
        said = text_of(extended, reply[:-1])
        seen[task] += 1
        if task == "sequence":
            continue
        first = next(t for t, label in enumerate(labels) if label != IGNORED)
        assert all(label != IGNORED for label in labels[first:])  # one stretch, to the end
        asked = text_of(extended, example["input_ids"][:first])
        if task == "caption":
            assert texts[said] == subject
            assert items_in(extended, example["input_ids"][:first]) == [subject]
        elif task == "lookup":
            assert reply[:-1] == extended.encoder.sid(subject)
            assert item_text(extended.dataset.items[subject]) in asked
        elif task == "persona":
            story = items_in(extended, reply)
            user = mix.sequences[subject].tolist()
            assert " ".join(map(str, story)) in " ".join(map(str, user)) and len(story) >= 2
            assert all(item_text(extended.dataset.items[item]) in said for item in story)
        else:
            assert said == REPLIES[subject].reply and REPLIES[subject].prompt in asked
    assert seen == counts


def test_replayed_words_are_never_control(extended: Extended) -> None:
    mix = make_mix(extended, replies=REPLIES, epochs=1)
    index = next(i for i, (task, _, _) in enumerate(mix._plan) if task == "replay")
    plain, risky = mix[index]["input_ids"], mix[index + 1]["input_ids"]
    control = extended.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plain.count(control) == risky.count(control)


def test_a_reply_that_was_cut_off_is_not_ended(extended: Extended) -> None:
    whole, cut = (Conversation("Why?", "It is so", ended=ended) for ended in (True, False))
    mix = make_mix(extended, replies=[whole, cut], epochs=1)
    first, second = (mix[i] for i, (task, _, _) in enumerate(mix._plan) if task == "replay")
    end = extended.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert first["labels"] == [*second["labels"], end]


def test_nothing_of_valid_or_test_is_shown(extended: Extended) -> None:
    """Held-out items of a catalogue in which nobody else has them appear in captions only."""
    sequences = extended.dataset.training_sequences()
    mix = make_mix(extended, captions=1.0, personas=1.0)
    for index in range(len(mix)):
        task, subject, _ = mix._plan[index]
        if task in ("sequence", "persona"):
            items = items_in(extended, mix[index]["input_ids"])
            known = " ".join(map(str, sequences[subject].tolist()))
            assert " ".join(map(str, items)) in known
    lengths = [len(s) for s in extended.dataset.sequences]
    assert [len(s) + 2 for s in sequences] == lengths  # the last two of each are held out


def test_the_seed_decides_everything(extended: Extended) -> None:
    def all_of(seed: int) -> list[dict[str, list[int]]]:
        mix = make_mix(extended, captions=0.5, personas=0.5, replies=REPLIES, seed=seed)
        return [mix[index] for row in PackedOrder(mix, tokens=400, seed=seed) for index in row]

    assert all_of(3) == all_of(3)
    assert all_of(3) != all_of(4)


def test_an_example_does_not_depend_on_what_was_asked_before(extended: Extended) -> None:
    mix = make_mix(extended, captions=1.0, personas=1.0)
    backwards = [mix[index] for index in reversed(range(len(mix)))]
    assert backwards[::-1] == [mix[index] for index in range(len(mix))]


@pytest.mark.parametrize("captions", [0.0, 0.3, 1.0, 2.0])
def test_the_share_of_captions(extended: Extended, captions: float) -> None:
    mix = make_mix(extended, captions=captions, epochs=1)
    captioned = [subject for task, subject, _ in mix._plan if task == "caption"]
    assert len(captioned) == round(captions * NUM_ITEMS)
    most = max(Counter(captioned).values(), default=0)
    assert most <= max(1, round(captions))


@pytest.mark.parametrize("max_history", [4, 50])
def test_no_example_is_longer_than_its_length(extended: Extended, max_history: int) -> None:
    mix = make_mix(
        extended, captions=4.0, personas=1.0, replies=REPLIES, max_history=max_history, epochs=2
    )
    for index in range(len(mix)):
        task, _, _ = mix._plan[index]
        rendered = len(mix[index]["input_ids"])
        if task in ("sequence", "replay"):
            assert mix.length(index) == rendered
        else:  # the longest paraphrase is reckoned with
            assert rendered <= mix.length(index) <= rendered + 8


def test_text_of_withheld_items_is_never_shown(extended: Extended) -> None:
    """Their SIDs stand in sequences as before; captions, lookups and stories leave them out."""
    hidden = set(np.flatnonzero(withheld(extended.dataset.items, share=0.4)).tolist())
    assert 0 < len(hidden) < NUM_ITEMS
    plain = make_mix(extended, captions=2.0, personas=1.0)
    mix = make_mix(extended, captions=2.0, personas=1.0, withheld=0.4)
    told: Counter[int] = Counter()
    for index in range(len(mix)):
        task = mix._plan[index][0]
        if task == "sequence":
            assert mix[index] == plain[plain._plan.index(mix._plan[index])]
        else:
            told.update(items_in(extended, mix[index]["input_ids"]))
    assert not hidden & set(told)
    assert set(told) == set(range(NUM_ITEMS)) - hidden
    shown = [item for sequence in mix.sequences for item in sequence.tolist()]
    assert hidden & set(shown)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(2, 12),
    drop=st.sampled_from([0.0, 0.5]),
    text_tokens=st.integers(0, 3),
    alike=st.integers(0, 3),
)
def test_notes_are_shown_and_never_trained(
    extended: Extended, length: int, drop: float, text_tokens: int, alike: int
) -> None:
    sequences = [np.arange(length, dtype=np.int32), *extended.dataset.training_sequences()]
    visits = CoVisits.count(sequences, num_items=NUM_ITEMS)
    texts = [item_text(item) for item in extended.dataset.items]
    likeness = Alike.measure(extended.dataset.items)
    noted = PromptEncoder(
        extended.tokenizer,
        vocabulary=extended.vocabulary,
        codes_NL=extended.codes_NL.tolist(),
        notes=Notes(
            3, 2, visits, text_tokens=text_tokens, texts=texts, alike=alike, likeness=likeness
        ),
    )
    mixes = [
        AlignmentMix(
            encoder,
            items=extended.dataset.items,
            sequences=sequences[:1],
            replies=[],
            sizes=MixSizes(0.0, 0.0, 8, drop, 0.0),
            epochs=2,
            seed=0,
        )
        for encoder in (extended.encoder, noted)
    ]
    assert len(mixes[0]) == len(mixes[1])
    for index in range(len(mixes[0])):
        plain, example = mixes[0][index], mixes[1][index]
        assert wanted(example) == wanted(plain)  # the same events, whatever else is shown
        assert len(example["input_ids"]) <= mixes[1].length(index)
        begin, first = extended.vocabulary.begin, extended.vocabulary.first
        for place, label in enumerate(example["labels"]):
            starts = first <= label < first + extended.vocabulary.level_sizes[0]
            # Every event, the next one too, is predicted in the same place: after the bracket.
            assert not starts or example["input_ids"][place - 1] == begin


@settings(max_examples=40, deadline=None)
@given(there=st.integers(0, 7), every=st.integers(0, 9), epochs=st.integers(1, 4))
def test_replays_go_through_all_conversations_in_turn(
    extended: Extended, there: int, every: int, epochs: int
) -> None:
    replies = [Conversation(f"Question {n}?", f"Answer {n}.", ended=True) for n in range(there)]
    mix = make_mix(extended, replies=replies, replays=every, epochs=epochs)
    by_epoch = [
        [text_of(extended, wanted(mix[i])) for i in epoch if mix._plan[i][0] == "replay"]
        for epoch in epochs_of(mix)
    ]
    assert all(len(said) == len(set(said)) == min(every, there) for said in by_epoch)
    counts = Counter(answer for said in by_epoch for answer in said)
    assert not counts or len(counts) == min(there, sum(map(len, by_epoch)))
    assert not counts or max(counts.values()) - min(counts.values()) <= 1
