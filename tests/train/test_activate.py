"""`activate` from end to end on a tiny aligned model: what is trained, kept, chosen and refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from conftest import in_two_processes, make_run
from whyrec import Recommender
from whyrec.catalog.dataset import Dataset
from whyrec.decode.model_folder import load_model_folder
from whyrec.decode.think import ThoughtSettings
from whyrec.evaluation.evaluate import evaluate
from whyrec.prompting.encoder import IGNORED
from whyrec.reasoning.endpoint import EndpointReport
from whyrec.stage import fingerprint
from whyrec.train import activate as activate_module
from whyrec.train import rationales as rationales_module
from whyrec.train.activate import activate
from whyrec.train.activate_recipe import ActivateRecipe
from whyrec.train.align import align
from whyrec.train.align_recipe import AlignRecipe
from whyrec.train.continued import continued_model
from whyrec.train.rationales import Rationales, read_rationales, training_steps
from whyrec.train.thinking import ThinkingMix
from whyrec.train.trainer import AlignTrainer
from whyrec.train.validation import METRICS, MODES


def make_recipe(**settings: object) -> ActivateRecipe:
    """A few steps of everything."""
    quick = {
        "lora_rank": 4,
        "steps_per_user": 3,
        "no_think": 0.25,
        "thought_tokens": 40,
        "thoughts": 2,
        "epochs": 9,
        "max_steps": 6,
        "batch_tokens": 512,
        "micro_batch_tokens": 256,
        "evaluations": 3,
        "valid_users": 8,
        "beam_width": 10,
    }
    return ActivateRecipe(**(quick | settings))  # type: ignore[arg-type]


def copy_run(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def align_quickly(run: Path, backbone: Path, **settings: object) -> Path:
    quick = {"backbone": str(backbone), "lora_rank": 4, "lora_dropout": 0.0, "max_history": 8}
    quick |= {"warmup_epochs": 0, "epochs": 1, "max_steps": 1, "batch_tokens": 512, "replays": 0}
    quick |= {"evaluations": 1, "valid_users": 4, "beam_width": 10}
    align(run, AlignRecipe(**(quick | settings)))  # type: ignore[arg-type]
    return run


@pytest.fixture(scope="module")
def aligned_run(prepared_run, backbone, tmp_path_factory) -> Path:
    """A run with a small LoRA-aligned model; not to be changed."""
    run = copy_run(prepared_run, tmp_path_factory.mktemp("aligned") / "run")
    return align_quickly(run, backbone)


@pytest.fixture(scope="module")
def activated(aligned_run, tmp_path_factory):
    """A finished small run and its recipe; not to be changed."""
    run = copy_run(aligned_run, tmp_path_factory.mktemp("activated") / "run")
    recipe = make_recipe()
    activate(run, recipe)
    return run, recipe


def summary_of(run: Path) -> dict:
    return json.loads((run / "model" / "activated" / "stage.json").read_text())["summary"]


def training_log(run: Path) -> list[dict]:
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_N@10", "eval_think_N@10")
    return [
        {key: row[key] for key in keys if key in row}
        for row in summary_of(run)["log"]
        if "loss" in row or "eval_N@10" in row
    ]


def test_the_folder_holds_a_model_that_thinks(activated) -> None:
    run, _ = activated
    folder = run / "model" / "activated"
    recommender = Recommender.from_pretrained(folder)
    assert recommender.settings.stage == "activated"
    assert recommender.settings.thoughts == ThoughtSettings(2, 40, 1.0, 0.5)
    history = [item.item_id for item in recommender.items[:3]]
    thinking = recommender.recommend(history, k=5, think=True)
    assert len(thinking) == 5 and thinking.trace
    assert recommender.recommend(history, k=5, think=True).trace == thinking.trace
    plain = recommender.recommend(history, k=5)
    assert len(plain) == 5 and plain.trace == ""
    assert [p.score for p in plain] != [t.score for t in thinking]
    assert (folder / "prompts" / "rationale.yaml").exists()
    assert not list((run / "model").glob(".*")) and not list(folder.glob(".*"))


def test_think_and_no_think_have_equal_inputs(activated) -> None:
    """In training, in validation and in the saved model, but for the thought itself."""
    run, _ = activated
    parts = load_model_folder(run / "model" / "activated")
    encoder, vocabulary = parts.encoder, parts.vocabulary
    history = [3, 4, 5]
    silent = encoder.recommendation_prompt(history)
    asked = encoder.thinking_prompt(history)
    assert silent == [*asked, vocabulary.think_end, vocabulary.begin]
    thought = encoder.text("Next: Genre 1.")
    assert encoder.answer_prompt(history, thought) == [*asked, *thought, *silent[-2:]]
    sequence = np.array([3, 4, 5, 6])
    mixes = [
        ThinkingMix(
            encoder,
            sequences=[sequence],
            rationales=Rationales([(0, 3)], ["Next: Genre 1."]),
            no_think=share,
            max_history=8,
            epochs=1,
            seed=0,
        )
        for share in (0.0, 1.0)
    ]
    thinks, closed = (mix[0] for mix in mixes)
    assert closed["input_ids"][: len(silent)] == silent
    answer = encoder.answer_prompt(history, thought)
    assert thinks["input_ids"][: len(answer)] == answer
    assert thinks["input_ids"][len(answer) :] == closed["input_ids"][len(silent) :]
    for mix, example in zip(mixes, (thinks, closed), strict=True):
        assert mix.length(0) == len(example["input_ids"]) == len(example["labels"])


def test_what_a_loss_is_taken_on(activated) -> None:
    run, _ = activated
    encoder = load_model_folder(run / "model" / "activated").encoder

    def trained_text(no_think: float) -> str:
        mix = ThinkingMix(
            encoder,
            sequences=[np.arange(12)],
            rationales=Rationales([(0, 11)], ["Next: Genre 1."]),
            no_think=no_think,
            max_history=4,
            epochs=1,
            seed=0,
        )
        labels = mix[0]["labels"]
        assert all(a in (IGNORED, b) for a, b in zip(labels, mix[0]["input_ids"], strict=True))
        return encoder.tokenizer.decode([label for label in labels if label != IGNORED])

    sid = encoder.tokenizer.decode(encoder.sid(11)).removeprefix("<|sid_begin|>")
    assert trained_text(0.0) == f"Next: Genre 1.</think>{sid}<|im_end|>"
    assert trained_text(1.0) == f"{sid}<|im_end|>"


def test_an_epoch_holds_every_step_once(extended) -> None:
    keys = [(0, n) for n in range(1, 9)]
    mix = ThinkingMix(
        extended.encoder,
        sequences=[np.arange(9)],
        rationales=Rationales(keys, [f"Genre {n} next." for n in range(8)]),
        no_think=0.25,
        max_history=4,
        epochs=3,
        seed=0,
    )
    assert mix.epoch_starts == [0, 8, 16, 24] and len(mix) == 24
    assert mix.tasks() == {"think": 18, "no_think": 6}
    silent = []
    for epoch in range(3):
        shown = [mix[epoch * 8 + n]["input_ids"] for n in range(8)]
        texts = [extended.tokenizer.decode(ids) for ids in shown]
        silent.append(tuple("<think></think>" in text for text in texts))
        assert sum(silent[-1]) == 2
        for n, text in enumerate(texts):
            sid = extended.tokenizer.decode(extended.encoder.sid(n + 1))
            assert sid in text and (f"Genre {n} next." in text) != silent[-1][n]
        assert [mix.length(epoch * 8 + n) for n in range(8)] == [len(ids) for ids in shown]
    assert len(set(silent)) > 1


def test_steps_are_the_last_training_events(extended) -> None:
    dataset = extended.dataset
    steps = training_steps(dataset, steps_per_user=2, max_history=3)
    training = dataset.training_sequences()
    assert len(steps) == 2 * len(training)
    for step in steps:
        sequence = training[step.user]
        assert step.position in (len(sequence) - 2, len(sequence) - 1)
        assert step.target == sequence[step.position]
        assert list(step.history) == sequence[step.position - 3 : step.position].tolist()
    every = training_steps(dataset, steps_per_user=0, max_history=3)
    assert len(every) == sum(len(sequence) - 1 for sequence in training)


def test_the_summary_tells_the_rationales_and_the_training(activated) -> None:
    run, recipe = activated
    summary = summary_of(run)
    report = summary["rationales"]
    table = pq.read_table(run / "model" / "activated" / "rationales.parquet").to_pylist()
    assert report["steps"] == report["written"] == len(table) == 3 * 24
    assert report["kept"] == sum(row["dropped"] is None for row in table) > 0
    assert report["share_kept"] == pytest.approx(report["kept"] / report["written"], abs=1e-4)
    assert sum(report["dropped"].values()) == report["written"] - report["kept"]
    evaluated = {
        row["step"]: row["eval_think_N@10"] for row in summary["log"] if "eval_N@10" in row
    }
    assert list(evaluated) == [2, 4, 6]
    assert summary["valid_think_N@10"] == max(evaluated.values())
    row = next(row for row in summary["log"] if "eval_N@10" in row)
    assert {"eval_R@5", "eval_think_R@10", "eval_fused_N@5", "eval_thought_tokens"} <= row.keys()
    assert 0 < row["eval_thought_tokens"] <= recipe.thought_tokens


def test_validation_ranks_as_the_saved_model_does(activated) -> None:
    run, recipe = activated
    dataset = Dataset.load(run / "dataset")
    valid = dataset.examples("valid").take(recipe.valid_users, seed=0)
    recommender = Recommender.from_pretrained(run / "model" / "activated")
    ranked = recommender.rank_thinking(valid.histories, width=10, keys=valid.users_E.tolist())
    found = ranked.rankings[0].items_EW == valid.targets_E[:, None]
    n10 = (found / np.log2(np.arange(10) + 2)).sum(1).mean()
    best = summary_of(run)["valid_think_N@10"]
    assert n10 == pytest.approx(best, abs=0.1)  # bf16 rounding changes a few draws


def test_the_checkpoint_is_one_adapter_on_the_plain_backbone(activated) -> None:
    run, _ = activated
    adapted, tokenizer, _ = continued_model(run, run / "model" / "activated", lora_rank=4, seed=0)
    merged = load_model_folder(run / "model" / "activated").model
    ids = tokenizer("A user chose <s_a_1><s_b_2><s_c_0><think>", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            adapted.eval()(ids).logits, merged(ids).logits, atol=0.05, rtol=0.05
        )
    before, after = (
        load_file(run / "model" / stage / "checkpoint" / "adapter_model.safetensors")
        for stage in ("aligned", "activated")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in (run / "model" / "activated" / "checkpoint").iterdir()} >= {
        "adapter_config.json",
        "sids.parquet",
        "codebooks.safetensors",
    }


class Stopped(Exception):
    pass


def test_a_killed_activation_resumes(activated, aligned_run, tmp_path, monkeypatch) -> None:
    expected_run, recipe = activated
    run = copy_run(aligned_run, tmp_path / "run")
    partial = run / "model" / ".activated.partial"
    train_step = AlignTrainer.training_step

    def dying(self, *arguments, **settings):
        if self.state.global_step == 5:
            raise Stopped
        return train_step(self, *arguments, **settings)

    monkeypatch.setattr(AlignTrainer, "training_step", dying)
    with pytest.raises(Stopped):
        activate(run, recipe)
    assert not (run / "model" / "activated").exists()
    assert (partial / "rationales.parquet").exists()
    assert (partial / ".steps" / "checkpoint-4").is_dir()
    monkeypatch.setattr(AlignTrainer, "training_step", train_step)
    monkeypatch.setattr(
        activate_module, "write_rationales", lambda *_, **__: pytest.fail("written again")
    )
    activate(run, recipe)
    assert training_log(run) == training_log(expected_run)
    ours, theirs = (
        load_file(r / "model" / "activated" / "checkpoint" / "adapter_model.safetensors")
        for r in (run, expected_run)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def checkpoint_of(run: Path) -> Path:
    return run / "model" / "activated" / "checkpoint"


def test_start_from_a_thinking_checkpoint(activated, aligned_run, tmp_path) -> None:
    first_run, first = activated
    run = copy_run(aligned_run, tmp_path / "run")
    settings = {"max_steps": 2, "lr": 1e-5, "evaluations": 1}
    activate(run, replace(first, checkpoint=str(checkpoint_of(first_run)), **settings))
    summary = summary_of(run)
    # It starts where the first run ended, but for bf16, which changes a few draws.
    ended = summary_of(first_run)["valid_think_N@10"]
    assert summary["start"]["think_N@10"] == pytest.approx(ended, abs=0.1)
    assert summary["valid_think_N@10"] >= summary["start"]["think_N@10"]
    stage = json.loads((run / "model" / "activated" / "stage.json").read_text())
    assert stage["inputs"]["checkpoint"] == fingerprint(checkpoint_of(first_run))
    assert summary_of(first_run)["start"] is None  # the aligned model is no candidate


def test_a_checkpoint_that_no_step_betters_stays_as_it_was(
    activated, aligned_run, tmp_path, monkeypatch
) -> None:
    first_run, first = activated
    run = copy_run(aligned_run, tmp_path / "run")
    ranks = iter([0.9, 0.1, 0.9])  # as good is not better
    names = [mode + name for mode in MODES for name in METRICS]
    monkeypatch.setattr(AlignTrainer, "rank_valid", lambda _: dict.fromkeys(names, next(ranks)))
    settings = {"max_steps": 2, "lr": 1e-1, "evaluations": 2}
    activate(run, replace(first, checkpoint=str(checkpoint_of(first_run)), **settings))
    assert summary_of(run)["valid_think_N@10"] == 0.9
    assert summary_of(run)["best_checkpoint_step"] == 0
    ours, theirs = (
        load_file(checkpoint_of(each) / "adapter_model.safetensors") for each in (run, first_run)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    history = ["item003", "item004"]
    assert Recommender.from_pretrained(run / "model" / "activated").recommend(history, think=True)


def test_a_killed_start_is_not_measured_again(
    activated, aligned_run, tmp_path, monkeypatch
) -> None:
    first_run, first = activated
    run = copy_run(aligned_run, tmp_path / "run")
    recipe = replace(first, checkpoint=str(checkpoint_of(first_run)), max_steps=1, evaluations=1)

    def dying(*_, **__):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(AlignTrainer, "training_step", dying)
        activate(run, recipe)
    ranked, seen = AlignTrainer.rank_valid, []

    def watched(self):
        seen.append(self.state.global_step)
        return ranked(self)

    monkeypatch.setattr(AlignTrainer, "rank_valid", watched)
    activate(run, recipe)
    assert seen == [1] and summary_of(run)["start"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_rank": 0}, "is an adapter of rank 4; set lora_rank: 4, not 0, or start without"),
        ({"lora_rank": 8}, "is an adapter of rank 4; set lora_rank: 4, not 8, or start without"),
        ({"writer": "own"}, "writer: own asks the aligned model, and a checkpoint stands in its"),
    ],
)
def test_settings_that_no_checkpoint_goes_with(
    activated, aligned_run, tmp_path, settings, sentence
) -> None:
    first_run, first = activated
    run = copy_run(aligned_run, tmp_path / "run")
    with pytest.raises(ValueError, match=sentence):
        activate(run, replace(first, checkpoint=str(checkpoint_of(first_run)), **settings))
    assert not list((run / "model").glob("*activated*"))


def test_an_all_weights_model_takes_a_checkpoint_of_its_backbone(
    activated, prepared_run, backbone, tmp_path
) -> None:
    first_run, first = activated
    run = align_quickly(copy_run(prepared_run, tmp_path / "run"), backbone, lora_rank=0)
    settings = {"max_steps": 1, "evaluations": 1}
    activate(run, replace(first, checkpoint=str(checkpoint_of(first_run)), **settings))
    assert summary_of(run)["start"]["think_N@10"] >= 0


def test_a_killed_own_writer_keeps_its_answers(aligned_run, tmp_path, monkeypatch) -> None:
    run = copy_run(aligned_run, tmp_path / "run")
    recipe = make_recipe(writer="own", own_tokens=4, max_steps=1, evaluations=1)
    write_own, asked = rationales_module.write_own, []

    def dying(steps, **settings):
        write_own(steps[:20], **settings)
        raise Stopped

    monkeypatch.setattr(rationales_module, "write_own", dying)
    with pytest.raises(Stopped):
        activate(run, recipe)

    def counted(steps, **settings):
        counts = write_own(steps, **settings)
        asked.append(counts["already written"])
        return counts

    monkeypatch.setattr(rationales_module, "write_own", counted)
    with pytest.raises(ValueError, match="none of 72 rationales by the own writer is fit"):
        # Another learning rate makes the partial folder another one; the answers stay.
        activate(run, replace(recipe, lr=1e-5))
    assert asked == [20]
    assert len(list((run / "rationales").glob("own-*.jsonl"))) == 1


def test_an_endpoint_writes(aligned_run, tmp_path, monkeypatch) -> None:
    run = copy_run(aligned_run, tmp_path / "run")
    endpoint = {"endpoint_url": "http://127.0.0.1:9/v1", "endpoint_model": "teacher"}
    recipe = make_recipe(writer="endpoint", max_steps=1, evaluations=1, **endpoint)
    seen = {}

    def answered(steps, *, settings, log, **_):
        seen["settings"], seen["log"] = settings, log
        answers = {step.key: "They like some kind of film." for step in steps[:10]}
        answers |= {step.key: None for step in steps[10:12]}
        return EndpointReport(answers, {"left over": len(steps) - 12})

    monkeypatch.setattr(rationales_module, "write_with_endpoint", answered)
    activate(run, recipe)
    report = summary_of(run)["rationales"]
    assert report["steps"] == 72 and report["written"] == 12 and report["kept"] == 10
    assert report["dropped"] == {"nothing written": 2} and report["writer"] == {"left over": 60}
    assert seen["settings"].model == "teacher" and seen["settings"].max_requests is None
    kept, _ = read_rationales(run / "model" / "activated" / "rationales.parquet")
    assert set(kept.texts) == {"They like some kind of film."}


def test_all_weights(aligned_run, tmp_path) -> None:
    run = copy_run(aligned_run, tmp_path / "run")
    activate(run, make_recipe(lora_rank=0, max_steps=2, evaluations=1))
    assert not (run / "model" / "activated" / "checkpoint").exists()
    found = Recommender.from_pretrained(run / "model" / "activated").recommend([], think=True)
    assert len(found) == 10
    aligned, activated = (
        load_file(run / "model" / stage / "model.safetensors") for stage in ("aligned", "activated")
    )
    assert aligned.keys() == activated.keys()
    assert all(not torch.equal(aligned[name], activated[name]) for name in aligned)


def test_a_planted_pattern_is_thought_of_and_found(prepared_run, make_backbone, tmp_path) -> None:
    """Item n is followed by n + 1: the model says so in the writer's words, and does so."""
    backbone = make_backbone(hidden_size=64, head_dim=16, intermediate_size=128)
    run = copy_run(prepared_run, tmp_path / "run")
    still = {"dropout": 0.0, "label_smoothing": 0.0, "lora_rank": 0, "lr": 5e-3, "valid_users": 0}
    sizes = {"max_history": 3, "captions": 0.0, "personas": 0.0, "batch_tokens": 1024}
    align_quickly(run, backbone, epochs=100, max_steps=50, **sizes, **still)
    recipe = make_recipe(
        steps_per_user=0, epochs=40, max_steps=60, batch_tokens=512, evaluations=1, **still
    )
    activate(run, replace(recipe, micro_batch_tokens=512))
    model = run / "model" / "activated"
    figures = evaluate(model, run, split="test", beams=10, think="both", traces=True)
    assert figures["trace/well_formed"] > 0.4  # of random weights: 0
    assert figures["trace/median_tokens"] < 30  # it closes its thoughts itself
    for name in ("whyrec", "whyrec-think", "whyrec-fused"):
        assert figures[f"{name}/test/excluded/N@10"] > 0.6  # by chance 0.23


def test_two_processes_activate_as_one(aligned_run, tmp_path) -> None:
    recipe = make_recipe(dropout=0.0, max_steps=4, evaluations=2, valid_users=7, temperature=0.0)
    recipe = replace(recipe, thoughts=1)
    alone = copy_run(aligned_run, tmp_path / "alone")
    activate(alone, recipe)
    together = copy_run(aligned_run, tmp_path / "together")
    arguments = [f"--set={key}={json.dumps(value)}" for key, value in vars(recipe).items()]
    in_two_processes("-m", "--", "whyrec.train.activate", "--run", str(together), *arguments)
    for ours, theirs in zip(training_log(alone), training_log(together), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-3)
    assert not list((together / "model").glob(".*"))
    ours, theirs = (
        pq.read_table(run / "model" / "activated" / "rationales.parquet")
        for run in (alone, together)
    )
    assert ours.equals(theirs)


def test_unchanged_returns_at_once(activated, capsys, monkeypatch) -> None:
    run, recipe = activated
    monkeypatch.setattr(activate_module, "continued_model", lambda *_, **__: pytest.fail("again"))
    activate(run, replace(recipe))
    assert "activate: unchanged" in capsys.readouterr().err


def test_no_aligned_model(prepared_run, tmp_path) -> None:
    run = copy_run(prepared_run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"aligned is missing or incomplete; run `whyrec align"):
        activate(run, make_recipe())
    assert not (run / "model").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"writer": "oracle"}, "writer: 'oracle' is none of grounded, own, endpoint"),
        ({"writer": "endpoint"}, "needs endpoint_url and endpoint_model"),
        ({"announce": ("all",)}, "announce: 'all' is none of broad"),
        ({"best_metric": "N@20"}, "best_metric: 'N@20' is none of"),
        ({"thought_tokens": 480}, r"make \d+ tokens, but the model reads 512; lower thought_tok"),
        ({"no_think": 1.5}, "no_think must lie between 0 and 1"),
        ({"thoughts": 0}, "thoughts must be at least 1"),
        ({"thoughts": 4, "temperature": 0.0}, "set thoughts: 1"),
        ({"lora_rank": 8}, "has rank 4 and goes on training; set lora_rank: 4, or 0"),
        ({"beam_width": 5}, "beam_width must be at least 10"),
        ({"thought_tokens": 5}, "none of 72 rationales by the grounded writer is fit"),
        ({"readable": True}, "prompts hold no text; set readable: false, or text_tokens"),
    ],
)
def test_settings_that_cannot_be(aligned_run, tmp_path, settings, sentence) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for part in ("dataset", "sids", "model"):
        shutil.copytree(aligned_run / part, run / part)
    with pytest.raises(ValueError, match=sentence):
        activate(run, make_recipe(**settings))
    assert not (run / "model" / "activated").exists()


def test_rationales_that_can_be_read_in_the_notes(prepared_run, backbone, tmp_path) -> None:
    run = align_quickly(
        copy_run(prepared_run, tmp_path / "run"), backbone, note_events=4, text_tokens=6
    )
    told = {}
    for readable in (False, True):
        activate(run, make_recipe(readable=readable, max_steps=1, thoughts=1, temperature=0.0))
        kept, _ = read_rationales(run / "model" / "activated" / "rationales.parquet")
        told[readable] = kept.texts
    encoder = Recommender.from_pretrained(run / "model" / "activated").encoder
    items = Dataset.load(run / "dataset").items
    shown = " ".join(encoder.note_text(item) for item in range(len(items)))
    assert any("shares" in text for text in told[False])
    for text in told[True]:
        if text.startswith("The history shares "):
            names = text.removeprefix("The history shares ").split(". ")[0].split("; ")
            assert all(name in shown for name in names)
    assert told[True] != told[False]


def test_an_aligned_model_of_another_catalogue(aligned_run, tmp_path) -> None:
    other = make_run(tmp_path / "other", num_items=35)
    shutil.copytree(aligned_run / "model", other / "model")
    with pytest.raises(ValueError, match="belongs to another catalogue or other SIDs"):
        activate(other, make_recipe())


def test_an_all_weights_model_has_no_adapter_to_go_on_with(prepared_run, backbone, tmp_path):
    run = align_quickly(copy_run(prepared_run, tmp_path / "run"), backbone, lora_rank=0)
    with pytest.raises(ValueError, match="without an adapter on a plain backbone; set lora_rank"):
        activate(run, make_recipe())
