"""`enhance` from end to end on a tiny activated model: what is trained, kept and refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from conftest import in_two_processes
from whyrec import Recommender
from whyrec.decode import think as think_module
from whyrec.decode.model_folder import load_model_folder
from whyrec.decode.think import ThoughtSettings
from whyrec.recipe import load_recipe
from whyrec.train import enhance as enhance_module
from whyrec.train import rewards as rewards_module
from whyrec.train import sampling as sampling_module
from whyrec.train.activate import activate
from whyrec.train.activate_recipe import ActivateRecipe
from whyrec.train.align import align
from whyrec.train.align_recipe import AlignRecipe
from whyrec.train.enhance import enhance
from whyrec.train.enhance_recipe import EnhanceRecipe, check_recipe
from whyrec.train.validation import ValidatedTrainer, Validation


def make_recipe(**settings: object) -> EnhanceRecipe:
    """A few steps of everything."""
    quick = {
        "samples": 4,
        "prompts": 4,
        "micro_batch": 8,
        "rollout_width": 10,
        "rollout_rows": 16,
        "thought_tokens": 8,
        "steps_per_user": 2,
        "lora_rank": 4,
        "lr": 1e-3,
        "max_steps": 4,
        "evaluations": 2,
        "valid_users": 4,
        "beam_width": 10,
        "negatives": 2,
        "preference_shard": 10,
    }
    return EnhanceRecipe(**(quick | settings))  # type: ignore[arg-type]


def copy_run(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def make_activated(prepared_run: Path, backbone: Path, folder: Path) -> Path:
    """A run with a small LoRA-activated model."""
    run = copy_run(prepared_run, folder)
    quick = {"lora_rank": 4, "epochs": 1, "max_steps": 1, "batch_tokens": 512}
    quick |= {"evaluations": 1, "valid_users": 4, "beam_width": 10}
    aligning = {"backbone": str(backbone), "max_history": 8, "warmup_epochs": 0, "replays": 0}
    align(run, AlignRecipe(**(quick | aligning)))  # type: ignore[arg-type]
    activating = {"steps_per_user": 1, "thought_tokens": 40, "thoughts": 2}
    activate(run, ActivateRecipe(**(quick | activating)))  # type: ignore[arg-type]
    return run


@pytest.fixture(scope="module")
def activated_run(prepared_run, backbone, tmp_path_factory) -> Path:
    """A run that thinks; not to be changed."""
    return make_activated(prepared_run, backbone, tmp_path_factory.mktemp("activated") / "run")


def enhanced(activated_run: Path, folder: Path, **settings: object) -> Path:
    run = copy_run(activated_run, folder)
    enhance(run, make_recipe(**settings))
    return run


def summary_of(run: Path) -> dict:
    return json.loads((run / "model" / "enhanced" / "stage.json").read_text())["summary"]


def steps_of(run: Path) -> list[dict]:
    """What was logged of each optimizer step."""
    return [row for row in summary_of(run)["log"] if "loss" in row]


@pytest.fixture(scope="module")
def grpo_run(activated_run, tmp_path_factory) -> Path:
    """A finished run with GRPO; not to be changed."""
    return enhanced(activated_run, tmp_path_factory.mktemp("grpo") / "run")


@pytest.fixture(scope="module")
def dpo_run(activated_run, tmp_path_factory) -> Path:
    """A finished run with DPO; not to be changed."""
    return enhanced(activated_run, tmp_path_factory.mktemp("dpo") / "run", method="dpo")


@pytest.fixture(params=["grpo", "dpo"])
def finished(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_run")


def test_the_folder_holds_a_model_that_thinks(finished) -> None:
    folder = finished / "model" / "enhanced"
    recommender = Recommender.from_pretrained(folder)
    assert recommender.settings.stage == "enhanced"
    assert recommender.settings.thoughts == ThoughtSettings(2, 8, 1.0, 0.5)
    found = recommender.recommend([recommender.items[3].item_id], k=5, think=True)
    assert len(found) == 5 and found.trace
    assert (folder / "checkpoint" / "adapter_model.safetensors").exists()
    assert not list((finished / "model").glob(".*")) and not list(folder.glob(".*"))


def test_every_step_of_grpo_is_logged(grpo_run) -> None:
    steps = steps_of(grpo_run)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        for name in ("reciprocal_rank", "likelihood", "format"):
            assert 0 <= row[f"rewards/{name}/mean"] <= 1 and 0 <= row[f"dead_groups/{name}"] <= 1
        assert row["legal"] == 1 and 0 < row["trace_tokens"] <= 8
        assert 0 <= row["dead_groups"] <= 1 and 0 <= row["dead_groups_left"] <= 1
        assert row["entropy"] > 0 and row["kl"] >= 0 and 0 < row["text_mass"] < 1
        mean = row["rewards/reciprocal_rank/mean"] + row["rewards/likelihood/mean"]
        assert row["reward"] == pytest.approx(mean + 0.1 * row["rewards/format/mean"], abs=1e-5)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the start
    assert steps[-1]["kl"] > 1e-6
    assert summary_of(grpo_run)["dead_groups"] == np.mean([row["dead_groups"] for row in steps])


def test_every_step_of_dpo_is_logged(dpo_run) -> None:
    steps, report = steps_of(dpo_run), summary_of(dpo_run)["preferences"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    first, last = steps[0], steps[-1]
    assert first["margin"] == first["chosen_log_ratio"] == first["kl"] == 0
    assert first["loss"] == pytest.approx(math.log(3) + 0.1 * first["chosen_nll"], abs=1e-3)
    assert last["margin"] > 0 and last["accuracy"] > 0.5 and last["kl"] > 0
    assert last["entropy"] > 0 and last["trace_tokens"] > 0
    assert report["chosen_reward"] > report["rejected_reward"] and report["kept"] == 48
    table = pq.read_table(dpo_run / "model" / "enhanced" / "preferences.parquet")
    assert len(table) == 48


def test_the_best_on_validation_is_kept_the_start_among_them(finished) -> None:
    summary = summary_of(finished)
    evaluated = {r["step"]: r["eval_think_N@10"] for r in summary["log"] if "eval_N@10" in r}
    assert list(evaluated) == [2, 4]
    row = next(row for row in summary["log"] if "eval_N@10" in row)
    assert {"eval_R@10", "eval_think_R@10", "eval_fused_N@10", "eval_thought_tokens"} <= row.keys()
    candidates = {0: summary["start"]["think_N@10"]} | evaluated
    best = summary["best_checkpoint_step"]
    assert summary["valid_think_N@10"] == candidates[best] == max(candidates.values())
    folder = finished / "model"
    start, end = (
        load_file(folder / name / "model.safetensors") for name in ("activated", "enhanced")
    )
    assert start.keys() == end.keys()
    same = all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)
    assert same == (best == 0)


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_all_weights(activated_run, tmp_path, method, monkeypatch) -> None:
    never = {name: -1.0 for name in ("think_N@10", "N@10")}
    monkeypatch.setattr(ValidatedTrainer, "validated_start", lambda *_: never)  # any step is better
    # The first step warms up from a learning rate of 0.
    settings = {"method": method, "lora_rank": 0, "max_steps": 2, "evaluations": 1}
    run = enhanced(activated_run, tmp_path / "run", **settings)
    assert summary_of(run)["best_checkpoint_step"] == 2
    assert not (run / "model" / "enhanced" / "checkpoint").exists()
    start, end = (
        load_file(run / "model" / name / "model.safetensors") for name in ("activated", "enhanced")
    )
    assert start.keys() == end.keys()
    assert not any(torch.equal(start[name], end[name]) for name in start)


class Stopped(Exception):
    """A kill."""


def check_resuming(activated_run: Path, folder: Path, monkeypatch, **settings: object) -> None:
    """Killed in step 4, behind the checkpoint of step 2: all is as if nothing had been."""
    whole = enhanced(activated_run, folder / "whole", **settings)
    trained = Trainer.training_step

    def dying(self, *arguments, **named):
        if self.state.global_step == 3:
            raise Stopped
        return trained(self, *arguments, **named)

    run = copy_run(activated_run, folder / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying)
        with pytest.raises(Stopped):
            enhance(run, make_recipe(**settings))
    assert not (run / "model" / "enhanced").exists()
    partial = run / "model" / ".enhanced.partial"
    assert [p.name for p in (partial / ".steps").glob("checkpoint-*")] == ["checkpoint-2"]
    seen, ranked = [], Validation.columns

    def watched(self, *arguments, **named):
        seen.append(1)
        return ranked(self, *arguments, **named)

    monkeypatch.setattr(Validation, "columns", watched)
    enhance(run, make_recipe(**settings))
    assert len(seen) == 1  # step 4: neither the start nor step 2 again
    kept = ("step", "loss", "reward", "entropy", "grad_norm", "eval_think_N@10", "eval_N@10")
    logs = [
        [{key: row[key] for key in kept if key in row} for row in summary_of(each)["log"]]
        for each in (whole, run)
    ]
    assert len(logs[0]) == len(logs[1]) == 7
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    ours, theirs = (
        load_file(each / "model" / "enhanced" / "model.safetensors") for each in (whole, run)
    )
    for name, weights in ours.items():
        torch.testing.assert_close(weights, theirs[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"updates_per_rollout": 2}, {"method": "dpo"}])
def test_a_killed_training_goes_on_as_it_would_have(
    activated_run, tmp_path, monkeypatch, settings
) -> None:
    check_resuming(activated_run, tmp_path, monkeypatch, **settings)


def check_raising(
    activated_run: Path, folder: Path, monkeypatch, *, rules: tuple, **more: object
) -> None:
    """Planted: of eight words one is worth something. The model comes to say it nearly always.

    Args:
        rules: modules that know which words there are.
        more: settings.
    """
    encoder = load_model_folder(activated_run / "model" / "activated").encoder
    names = ("cat", "dog", "red", "blue", "one", "two", "sun", "sea")
    words = [token for name in names for token in encoder.text(f" {name}")]
    assert len(words) == len(names)

    def few_words(_tokenizer, *, num_rows, stop):
        text_V = torch.zeros(num_rows, dtype=torch.bool)
        text_V[words] = True
        return text_V

    def planted(outcomes, _catalogue):
        return np.array([text.count("cat") for text in outcomes.texts]) / 4

    for module in rules:
        monkeypatch.setattr(module, "text_tokens", few_words)
    monkeypatch.setitem(rewards_module.REWARDS, "planted", planted)
    settings = {"rewards": ("planted",), "reward_weights": (1.0,), "thought_tokens": 4}
    settings |= {"samples": 8, "prompts": 2, "micro_batch": 16, "lora_rank": 0, "lr": 1e-2}
    settings |= {"max_steps": 16, "evaluations": 1}
    run = enhanced(activated_run, folder / "run", **(settings | more))
    rewards = [row["reward"] for row in steps_of(run)]
    assert np.mean(rewards[:3]) < 0.35  # by chance 0.125
    assert np.mean(rewards[-3:]) > 0.8
    kl = [row["kl"] for row in steps_of(run)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0.1


def test_grpo_raises_a_reward_that_can_be_raised(activated_run, tmp_path, monkeypatch) -> None:
    rules = (think_module, enhance_module)  # what is drawn, and what is trained
    check_raising(activated_run, tmp_path, monkeypatch, rules=rules)


def test_the_item_is_trained_behind_the_thoughts_where_asked(activated_run, tmp_path) -> None:
    """Nothing else of the losses changes: without a step the words are as likely as ever."""
    settings = {"evaluations": 1, "kl_weight": 0.0, "lora_rank": 0, "lr": 3e-3, "samples": 2}
    settings |= {"steps_per_user": 1, "prompts": 24, "micro_batch": 24, "epochs": 8}  # all at once
    run = enhanced(activated_run, tmp_path / "run", item_weight=1.0, max_steps=8, **settings)
    plain = enhanced(activated_run, tmp_path / "plain", max_steps=1, **settings)
    steps, others = steps_of(run), steps_of(plain)
    # The first step warms up: its loss is GRPO's, which is 0, and the item's.
    for name in ("reward", "entropy", "trace_tokens", "text_mass"):
        assert steps[0][name] == pytest.approx(others[0][name], rel=1e-5)
    assert steps[0]["loss"] == pytest.approx(others[0]["loss"] + steps[0]["item_nll"], abs=1e-4)
    assert steps[-1]["item_nll"] < 0.8 * steps[0]["item_nll"]
    assert "item_nll" not in others[0] and "kl" not in others[0]


def test_preferences_are_sampled_for_as_many_steps_as_the_recipe_says(
    activated_run, tmp_path
) -> None:
    run = enhanced(activated_run, tmp_path / "run", method="dpo", preferences=12, max_steps=1)
    assert summary_of(run)["preferences"]["kept"] == 12  # of 48


def test_dpo_makes_the_chosen_more_likely_than_the_rejected(activated_run, tmp_path) -> None:
    run = enhanced(
        activated_run, tmp_path / "run", method="dpo", lora_rank=0, epochs=2, max_steps=20
    )
    last = steps_of(run)[-3:]
    assert np.mean([row["accuracy"] for row in last]) > 0.9
    assert np.mean([row["margin"] for row in last]) > 0.5
    assert np.mean([row["chosen_log_ratio"] for row in last]) > 0  # not only less unlikely


def test_two_processes_train_as_one(activated_run, tmp_path) -> None:
    """The same thoughts for the same steps, wherever they are drawn."""
    settings = {"resample_rounds": 0, "max_steps": 3, "evaluations": 1, "micro_batch": 4}
    alone = enhanced(activated_run, tmp_path / "alone", **settings)
    together = copy_run(activated_run, tmp_path / "together")
    recipe = make_recipe(**settings)
    arguments = [f"--set={key}={json.dumps(value)}" for key, value in vars(recipe).items()]
    in_two_processes("-m", "--", "whyrec.train.enhance", "--run", str(together), *arguments)
    for ours, theirs in zip(steps_of(alone), steps_of(together), strict=True):
        for name in ("reward", "entropy", "kl", "grad_norm", "trace_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    ours, theirs = (summary_of(run)["start"] for run in (alone, together))
    assert ours == pytest.approx(theirs)


def test_unchanged_returns_at_once(grpo_run, capsys, monkeypatch) -> None:
    monkeypatch.setattr(enhance_module, "continued_model", lambda *_, **__: pytest.fail("again"))
    enhance(grpo_run, make_recipe())
    assert "enhance: unchanged" in capsys.readouterr().err


def test_no_activated_model(prepared_run, tmp_path) -> None:
    run = copy_run(prepared_run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"activated is missing or incomplete; run `whyrec activ"):
        enhance(run, make_recipe())
    assert not (run / "model").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "ppo"}, "method: 'ppo' is none of grpo, dpo"),
        ({"rewards": ("prefx",), "reward_weights": (1.0,)}, "'prefx'; did you mean 'prefix'"),
        ({"thought_tokens": 480}, r"make \d+ tokens, but the model reads 512; lower thought_tok"),
        ({"best_metric": "N@20"}, "best_metric: 'N@20' is none of"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"rollout_rows": 3}, "has no room for the 4 thoughts of one prompt"),
        ({"updates_per_rollout": 3}, "updates_per_rollout 3 does not divide the 16 thoughts"),
        ({"micro_batch": 3, "prompts": 5}, "make prompts a multiple"),
        ({"prompts": 64}, "wants 64 prompts and there are 48 training steps"),
        ({"rollouts": "sglang"}, "rollouts: 'sglang' is none of decoder, vllm"),
        ({"scale_rewards": "all"}, "scale_rewards: 'all' is none of group, batch, none"),
        ({"lora_rank": 8}, "has rank 4 and goes on training; set lora_rank: 4, or 0"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
    ],
)
def test_settings_that_cannot_be(activated_run, tmp_path, settings, sentence) -> None:
    run = copy_run(activated_run, tmp_path / "run")
    with pytest.raises(ValueError, match=sentence):
        enhance(run, make_recipe(**settings))
    assert not (run / "model" / "enhanced").exists()


def test_vllm_is_not_installed(activated_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sampling_module.importlib.util, "find_spec", lambda _: None)
    run = copy_run(activated_run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"needs vLLM; install whyrec\[serve\] for CUDA or"):
        enhance(run, make_recipe(rollouts="vllm"))
    assert not (run / "model" / "enhanced").exists()


def test_the_shipped_recipes_are_read() -> None:
    files = sorted(Path(__file__).parents[2].glob("recipes/*/*po.yaml"))
    assert len(files) == 4
    for file in files:
        recipe = load_recipe(EnhanceRecipe, file)
        check_recipe(recipe)
        assert recipe.method == file.stem
