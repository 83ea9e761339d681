import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.catalog.dataset import SPLITS, Dataset, Item
from whyrec.catalog.splits import leave_one_out, temporal

lengths = st.lists(st.integers(1, 8), min_size=1, max_size=12)


def positions_of(lengths_U: list[int]) -> np.ndarray:
    return np.concatenate([np.arange(length) for length in lengths_U])


def dataset_of(lengths_U: list[int], codes_E: np.ndarray) -> Dataset:
    sequences = [np.arange(length, dtype=np.int32) for length in lengths_U]
    return Dataset(
        [Item(str(i)) for i in range(8)],
        [str(u) for u in range(len(lengths_U))],
        sequences,
        np.split(codes_E, np.cumsum(lengths_U)[:-1]),
    )


def check_examples(dataset: Dataset) -> None:
    """Every history is the strict prefix before its target; every event is in one split."""
    seen = {
        (user, position)
        for user, sequence in enumerate(dataset.training_sequences())
        for position in sequence  # items of these data sets are their own positions
    }
    for split in ("valid", "test"):
        examples = dataset.examples(split)
        for user, history, target in zip(
            examples.users_E, examples.histories, examples.targets_E, strict=True
        ):
            assert 0 < len(history) < len(dataset.sequences[user])
            assert history.tolist() == dataset.sequences[user][: len(history)].tolist()
            assert target == dataset.sequences[user][len(history)]
            assert (int(user), int(target)) not in seen
            seen.add((int(user), int(target)))
    none = sum(int((codes == SPLITS.index("none")).sum()) for codes in dataset.splits)
    assert len(seen) + none == sum(map(len, dataset.sequences))


@settings(deadline=None)
@given(lengths)
def test_leave_one_out(lengths_U: list[int]) -> None:
    codes_E = leave_one_out(positions_of(lengths_U), np.repeat(lengths_U, lengths_U))
    dataset = dataset_of(lengths_U, codes_E)
    check_examples(dataset)
    for length, codes in zip(lengths_U, dataset.splits, strict=True):
        names = [SPLITS[code] for code in codes]
        last = ["valid", "test"] if length >= 3 else []
        assert names == ["train"] * (length - len(last)) + last


@settings(deadline=None)
@given(lengths, st.randoms(use_true_random=False))
def test_temporal(lengths_U: list[int], random) -> None:
    events = sum(lengths_U)
    owners = np.repeat(np.arange(len(lengths_U)), lengths_U)
    ranks = list(range(events))
    random.shuffle(ranks)
    ranks_E = np.array(ranks)
    for user in range(len(lengths_U)):  # a user's events are in order of time
        ranks_E[owners == user] = np.sort(ranks_E[owners == user])
    codes_E = temporal(positions_of(lengths_U), ranks_E)
    dataset = dataset_of(lengths_U, codes_E)
    check_examples(dataset)
    assert (codes_E[ranks_E < events * 8 // 10] == SPLITS.index("train")).all()
    late = codes_E[ranks_E >= events * 9 // 10]
    assert np.isin(late, [SPLITS.index("test"), SPLITS.index("none")]).all()
    firsts = positions_of(lengths_U) == 0
    assert ((codes_E == SPLITS.index("none")) <= firsts).all()
