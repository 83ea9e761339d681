"""Teachers: what they say of a row, how it is learnt, and who cannot be one."""

import shutil
from pathlib import Path

import pytest
import torch
from test_align import copy_run, make_recipe
from test_loss import LEVELS, TRIE, VOCABULARY, legal_codes, make, make_examples, packed

from whyrec import Recommender
from whyrec.sid.legal_loss import legal_cross_entropy
from whyrec.train.align import align
from whyrec.train.loss import SidLoss
from whyrec.train.teachers import Teachers

_ROW = ("input_ids", "position_ids", "document_starts", "sid_positions", "sid_nodes")


def test_they_say_what_each_says_of_each_example_by_itself() -> None:
    models, examples = [make(seed=1), make(seed=2, tied=False)], make_examples(seed=4)
    teachers = Teachers(models, vocabulary=VOCABULARY, trie=TRIE)
    teachers.read(longest=1000)
    row = packed(examples)
    found = teachers.probabilities(**{name: row[name] for name in _ROW})
    expected: list[list[torch.Tensor]] = [[] for _ in LEVELS]
    first, sizes = VOCABULARY.first, LEVELS
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        by_model = [model(torch.tensor([ids])).logits[0].double() for model in models]
        for place in range(1, len(ids)):
            if labels[place] < first:
                continue
            level = sum(labels[place] >= offset for offset in VOCABULARY.offsets) - 1
            offset = VOCABULARY.offsets[level]
            before = [
                token - start
                for token, start in zip(
                    ids[place - level : place], VOCABULARY.offsets[:level], strict=True
                )
            ]
            legal = legal_codes(before)
            if len(legal) == 1:  # forced codes are in no list
                continue
            mean_K = torch.zeros(sizes[level], dtype=torch.float64)
            for logits_TV in by_model:
                codes_K = logits_TV[place - 1, offset : offset + sizes[level]]
                mean_K[legal] += codes_K[legal].softmax(0) / len(models)
            expected[level].append(mean_K)
    assert sum(map(len, expected)) > 10
    for ours_MK, theirs in zip(found, expected, strict=True):
        assert len(ours_MK) == len(theirs)
        if theirs:
            torch.testing.assert_close(ours_MK.double(), torch.stack(theirs), rtol=1e-4, atol=1e-6)
    assert not any(weight.requires_grad for model in models for weight in model.parameters())


def test_what_is_told_is_learnt_by_its_share() -> None:
    torch.manual_seed(0)
    legal_MK = torch.tensor([[True, True, False], [True, True, True]])
    logits_MK = torch.randn(2, 3, requires_grad=True)
    wanted_MK = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    loss = legal_cross_entropy(logits_MK, wanted_MK, legal_MK=legal_MK)
    by_hand = torch.zeros(())
    for row in range(2):
        codes = legal_MK[row].nonzero()[:, 0]
        by_hand = by_hand - (wanted_MK[row, codes] * logits_MK[row, codes].log_softmax(0)).sum()
    assert float(loss) == pytest.approx(float(by_hand))
    loss.backward()
    assert logits_MK.grad is not None and logits_MK.grad[0, 2] == 0
    assert logits_MK.grad.isfinite().all()

    # In the whole loss: teachers that are sure of the true codes say what the labels say.
    row, hidden_TD = packed(make_examples(seed=5)), torch.randn(200, 6)
    head_VD = torch.randn(VOCABULARY.stop, 6)
    labels_T = row["labels"][0]
    places = {name: row[name] for name in ("text_positions", "sid_positions", "sid_nodes")}
    sure = [
        torch.nn.functional.one_hot(labels_T[at_M + 1] - offset, size).float()
        for at_M, offset, size in zip(row["sid_positions"], VOCABULARY.offsets, LEVELS, strict=True)
    ]
    given = (hidden_TD[: len(labels_T)], labels_T, head_VD)
    plain = SidLoss(VOCABULARY, TRIE).total(*given, **places)
    for share in (0.0, 0.3, 1.0):
        told = SidLoss(VOCABULARY, TRIE, taught=share).total(*given, **places, teachings=sure)
        assert float(told) == pytest.approx(float(plain), rel=1e-5)
    legal = [TRIE.mask(nodes_M, level=level) for level, nodes_M in enumerate(row["sid_nodes"])]
    even = [mask_MK / mask_MK.sum(-1, keepdim=True) for mask_MK in legal]
    half = SidLoss(VOCABULARY, TRIE, taught=0.5).total(*given, **places, teachings=even)
    whole = SidLoss(VOCABULARY, TRIE, taught=1.0).total(*given, **places, teachings=even)
    none = SidLoss(VOCABULARY, TRIE, taught=0.0).total(*given, **places, teachings=even)
    assert float(half) == pytest.approx(float((whole + none) / 2), rel=1e-5)
    assert whole != none


@pytest.fixture(scope="module")
def teacher(prepared_run, backbone, tmp_path_factory) -> Path:
    """A model that was trained for longer than its students will be."""
    run = copy_run(prepared_run, tmp_path_factory.mktemp("teacher") / "run")
    align(run, make_recipe(backbone, **TAUGHT | {"max_steps": 60, "epochs": 20, "seed": 7}))
    return run / "model" / "aligned"


TAUGHT = {"lora_rank": 0, "dropout": 0.0, "lr": 3e-3, "evaluations": 1, "max_steps": 20}


def first_codes(folder: Path) -> torch.Tensor:
    """Distributions over first codes after a few histories."""
    recommender = Recommender.from_pretrained(folder)
    encoder, model = recommender.encoder, recommender.decoder.model
    first, size = encoder.vocabulary.first, encoder.vocabulary.level_sizes[0]
    rows = []
    for history in ([1], [2, 5], [7, 3, 4], [8, 9], [11, 6, 2, 1]):
        logits = model(torch.tensor([encoder.recommendation_prompt(history)])).logits[0, -1]
        rows.append(logits[first : first + size].detach().softmax(0))
    return torch.stack(rows)


def test_a_student_comes_nearer_to_its_teacher(prepared_run, backbone, tmp_path, teacher) -> None:
    distance = {}
    for taught in (0.0, 1.0):
        run = copy_run(prepared_run, tmp_path / str(taught))
        align(run, make_recipe(backbone, **TAUGHT, teachers=[str(teacher)], taught=taught))
        ours = first_codes(run / "model" / "aligned")
        distance[taught] = float((ours - first_codes(teacher)).abs().sum(-1).mean())
    assert distance[1.0] < 0.7 * distance[0.0]


def test_who_cannot_teach(prepared_run, backbone, tmp_path, teacher) -> None:
    how = {**TAUGHT, "teachers": [str(teacher)]}
    with pytest.raises(ValueError, match="taught must lie between 0 and 1"):
        align(prepared_run, make_recipe(backbone, **how, taught=1.5))
    with pytest.raises(ValueError, match=r"reads other prompts.*with another seed"):
        align(prepared_run, make_recipe(backbone, **how, text_tokens=3, note_events=2))
    with pytest.raises(ValueError, match="is not a WhyRec model folder"):
        align(prepared_run, make_recipe(backbone, **how | {"teachers": [str(tmp_path)]}))
    other = shutil.copytree(teacher, tmp_path / "other")
    (other / "sids.parquet").write_bytes(b"others")
    with pytest.raises(ValueError, match="has other SIDs than"):
        align(prepared_run, make_recipe(backbone, **how | {"teachers": [str(other)]}))
