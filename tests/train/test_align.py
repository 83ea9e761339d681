"""`align` from end to end on a tiny backbone and a catalogue with a planted pattern."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import LEVEL_SIZES, NUM_ITEMS, in_two_processes, make_run
from whyrec import Recommender
from whyrec.backbone import packed_attention
from whyrec.backbone.extend import extend_vocabulary, new_token_ids
from whyrec.backbone.load import load_backbone
from whyrec.backbone.lora import load_adapter
from whyrec.catalog.alike import Alike
from whyrec.catalog.dataset import Dataset
from whyrec.decode import add_items as add_items_module
from whyrec.decode.add_items import add_items
from whyrec.decode.model_folder import load_model_folder
from whyrec.sid.quantizers import load_quantizer
from whyrec.train import align as align_module
from whyrec.train.align import align
from whyrec.train.align_recipe import AlignRecipe
from whyrec.train.replay import Conversation
from whyrec.train.trainer import AlignTrainer

REPOSITORY = Path(__file__).parents[2]


def make_recipe(backbone: Path, **settings: object) -> AlignRecipe:
    """A few steps of everything."""
    quick = {
        "backbone": str(backbone),
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "max_history": 8,
        "warmup_epochs": 1,
        "epochs": 3,
        "max_steps": 6,
        "batch_tokens": 512,
        "micro_batch_tokens": 256,
        "captions": 0.2,
        "replays": 2,
        "replay_tokens": 4,
        "evaluations": 3,
        "valid_users": 8,
        "beam_width": 10,
    }
    return AlignRecipe(**(quick | settings))  # type: ignore[arg-type]


def summary_of(run: Path) -> dict:
    return json.loads((run / "model" / "aligned" / "stage.json").read_text())["summary"]


def training_log(run: Path) -> list[dict]:
    """What must be the same in every way to train the same: no times."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_N@10", "eval_R@10")
    return [
        {key: row[key] for key in keys if key in row}
        for row in summary_of(run)["log"]
        if "loss" in row or "eval_N@10" in row
    ]


def copy_run(prepared_run: Path, folder: Path) -> Path:
    for part in ("dataset", "sids"):
        shutil.copytree(prepared_run / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def aligned(prepared_run, backbone, tmp_path_factory):
    """A finished small run and its recipe; not to be changed."""
    run = copy_run(prepared_run, tmp_path_factory.mktemp("aligned") / "run")
    recipe = make_recipe(backbone, average=0.5, note_events=4, neighbours=2, text_tokens=4)
    align(run, recipe)
    return run, recipe


def history_ids(run: Path, user: int = 0) -> list[str]:
    dataset = Dataset.load(run / "dataset")
    return [dataset.items[i].item_id for i in dataset.training_sequences()[user]]


def test_the_folder_holds_a_model_that_recommends(aligned) -> None:
    run, recipe = aligned
    folder = run / "model" / "aligned"
    recommender = Recommender.from_pretrained(folder)
    history = history_ids(run)
    found = recommender.recommend(history, k=5)
    assert len(found) == 5 and not {f.item_id for f in found} & set(history)
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    assert recommender.settings.max_history == recipe.max_history
    everything = recommender.recommend([], k=NUM_ITEMS + 5)
    assert sorted(f.item_id for f in everything) == [i.item_id for i in recommender.items]
    assert sum(np.exp([f.score for f in everything])) == pytest.approx(1, abs=1e-4)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert left == [] and not list((run / "model").glob(".*"))


def adapted_model(run: Path, recipe: AlignRecipe):
    """The PEFT model of `checkpoint/`, unmerged, made as `align` makes it."""
    model, tokenizer = load_backbone(recipe.backbone)
    quantizer = load_quantizer(run / "sids" / "codebooks.safetensors")
    vocabulary = extend_vocabulary(
        model, tokenizer, level_sizes=LEVEL_SIZES, codebooks=quantizer.codebooks
    )
    token_ids = new_token_ids(vocabulary, tokenizer)
    checkpoint = run / "model" / "aligned" / "checkpoint"
    return load_adapter(model, checkpoint, token_ids=token_ids).eval()


def check_merged(run: Path, recipe: AlignRecipe) -> None:
    folder = run / "model" / "aligned"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("A user chose <s_a_1><s_b_2><s_c_0>", return_tensors="pt").input_ids
    with torch.no_grad():
        merged = plain(ids).logits
        unmerged = adapted_model(run, recipe)(ids).logits
    assert merged.shape[-1] == len(tokenizer)
    # The checkpoint is rounded to bf16, the merged weights are not.
    torch.testing.assert_close(merged, unmerged, atol=0.05, rtol=0.05)
    base, _ = load_backbone(recipe.backbone)
    with torch.no_grad():
        untrained = base(ids.clamp(max=base.config.vocab_size - 1)).logits
    changed = (untrained - merged[..., : untrained.shape[-1]]).abs().max()
    assert changed > 10 * (merged - unmerged).abs().max()


def test_merged_equals_the_peft_model(aligned) -> None:
    check_merged(*aligned)


def test_merged_equals_the_peft_model_with_an_untied_head(run, make_backbone) -> None:
    recipe = make_recipe(make_backbone("qwen3", tied=False), max_steps=2)
    align(run, recipe)
    check_merged(run, recipe)
    assert not AutoModelForCausalLM.from_pretrained(
        run / "model" / "aligned"
    ).config.tie_word_embeddings


def test_the_summary_tells_the_training(aligned) -> None:
    run, _ = aligned
    summary = summary_of(run)
    log = training_log(run)
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4, 5, 6]
    evaluated = {row["step"]: row["eval_N@10"] for row in log if "eval_N@10" in row}
    assert list(evaluated) == [2, 4, 6]
    assert summary["valid_N@10"] == max(evaluated.values())
    assert evaluated[summary["best_checkpoint_step"]] == summary["valid_N@10"]
    assert summary["trained_tokens"] > 0 and summary["start"] is None


def test_the_model_that_is_kept_is_the_best_on_validation(aligned) -> None:
    run, recipe = aligned
    dataset = Dataset.load(run / "dataset")
    valid = dataset.examples("valid").take(recipe.valid_users, seed=0)
    recommender = Recommender.from_pretrained(run / "model" / "aligned")
    (ranking,) = recommender.rank(valid.histories, width=recipe.beam_width)
    ranks = [
        row.tolist().index(target) if target in row else None
        for row, target in zip(ranking.items_EW, valid.targets_E, strict=True)
    ]
    n10 = np.mean([0.0 if r is None else 1 / np.log2(r + 2) for r in ranks])
    assert n10 == pytest.approx(summary_of(run)["valid_N@10"], abs=0.05)


def test_unchanged_returns_at_once(aligned, monkeypatch, capsys) -> None:
    run, recipe = aligned
    monkeypatch.setattr(align_module, "load_backbone", lambda *_, **__: pytest.fail("ran again"))
    align(run, replace(recipe))
    assert "align: unchanged" in capsys.readouterr().err


def test_a_planted_pattern_is_learnt(run, make_backbone) -> None:
    """Item n is followed by n + 1: by chance R@10 would be 1 / 2 and N@10 about 0.23."""
    backbone = make_backbone(hidden_size=64, head_dim=16, intermediate_size=128)
    recipe = make_recipe(
        backbone,
        lora_rank=0,
        max_history=3,
        lr=5e-3,
        epochs=100,
        max_steps=80,
        batch_tokens=1024,
        micro_batch_tokens=1024,
        captions=0.0,
        personas=0.0,
        replays=0,
        dropout=0.0,
        label_smoothing=0.0,
        evaluations=4,
        valid_users=0,
    )
    align(run, recipe)
    first = next(row for row in training_log(run) if "loss" in row)["loss"]
    last = [row for row in training_log(run) if "loss" in row][-1]["loss"]
    assert last < 0.5 * first
    assert summary_of(run)["valid_N@10"] > 0.6
    recommender = Recommender.from_pretrained(run / "model" / "aligned")
    # The pattern is the catalogue's, not the user's: it holds on the test events too.
    test = Dataset.load(run / "dataset").examples("test")
    (ranking,) = recommender.rank(test.histories, width=10)
    assert np.mean(ranking.items_EW[:, :3] == test.targets_E[:, None]) * 3 > 0.6


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, *, phase: str) -> None:
    """Let training die in the middle of a phase, as a killed process does."""
    train_step = AlignTrainer.training_step

    def dying(self, *arguments, **settings):
        if self.state.global_step == step and Path(self.args.output_dir).name == f".{phase}":
            raise Stopped
        return train_step(self, *arguments, **settings)

    monkeypatch.setattr(AlignTrainer, "training_step", dying)


def test_a_killed_training_resumes_from_its_checkpoint(
    aligned, prepared_run, tmp_path, monkeypatch
) -> None:
    expected_run, recipe = aligned
    run = copy_run(prepared_run, tmp_path / "run")
    partial = run / "model" / ".aligned.partial"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, phase="warmup")
        with pytest.raises(Stopped):
            align(run, recipe)
    assert not (run / "model" / "aligned").exists() and (partial / ".replies.json").exists()
    with monkeypatch.context() as patch:
        stop_after(patch, 5, phase="mix")
        with pytest.raises(Stopped):
            align(run, recipe)
    assert (partial / ".mix" / "checkpoint-4").is_dir()
    assert (partial / ".warmup.safetensors").exists()
    steps = []
    train_step = AlignTrainer.training_step

    def counting(self, *arguments, **settings):
        steps.append((Path(self.args.output_dir).name, self.state.global_step))
        return train_step(self, *arguments, **settings)

    monkeypatch.setattr(AlignTrainer, "training_step", counting)
    monkeypatch.setattr(align_module, "own_conversations", replies_from_cache)
    align(run, recipe)
    assert set(steps) == {(".mix", 4), (".mix", 5)}  # neither the warm-up nor steps 0 to 3 again
    assert training_log(run) == training_log(expected_run)
    ours, theirs = (
        load_file(r / "model" / "aligned" / "checkpoint" / "adapter_model.safetensors")
        for r in (run, expected_run)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def replies_from_cache(*_arguments: object, cache: Path, **_settings: object) -> list:
    assert cache.exists(), "the replies were made again"
    return [Conversation(*said) for said in json.loads(cache.read_text("utf-8"))]


def test_start_from_its_own_checkpoint(aligned, prepared_run, tmp_path) -> None:
    first_run, first = aligned
    checkpoint = first_run / "model" / "aligned" / "checkpoint"
    assert {path.name for path in checkpoint.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "sids.parquet",
        "codebooks.safetensors",
    }
    run = copy_run(prepared_run, tmp_path / "run")
    align(run, replace(first, checkpoint=str(checkpoint), max_steps=2, lr=1e-5, evaluations=1))
    summary = summary_of(run)
    # It starts where the first run ended, but for bf16.
    assert summary["start"]["N@10"] == pytest.approx(summary_of(first_run)["valid_N@10"], abs=0.05)
    assert summary["valid_N@10"] >= summary["start"]["N@10"]


def test_a_checkpoint_that_no_step_betters_stays_as_it_was(
    aligned, prepared_run, tmp_path, monkeypatch
) -> None:
    first_run, first = aligned
    checkpoint = first_run / "model" / "aligned" / "checkpoint"
    run = copy_run(prepared_run, tmp_path / "run")
    ranks = iter([0.9, 0.1, 0.2])
    names = ("R@5", "R@10", "N@5", "N@10")
    monkeypatch.setattr(AlignTrainer, "rank_valid", lambda _: dict.fromkeys(names, next(ranks)))
    recipe = replace(first, checkpoint=str(checkpoint), max_steps=2, lr=1e-1, evaluations=2)
    align(run, recipe)
    assert summary_of(run)["valid_N@10"] == 0.9
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run / "model" / "aligned" / "checkpoint", checkpoint)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_catalogue_is_refused(aligned, tmp_path) -> None:
    first_run, first = aligned
    checkpoint = str(first_run / "model" / "aligned" / "checkpoint")
    other = make_run(tmp_path / "other", num_items=NUM_ITEMS + 5)
    with pytest.raises(ValueError, match="belongs to another catalogue or other SIDs") as error:
        align(other, replace(first, checkpoint=checkpoint))
    assert "whyrec index --set checkpoint=" in str(error.value)
    assert not (other / "model").exists()
    with pytest.raises(ValueError, match="is no released checkpoint"):
        align(other, replace(first, checkpoint=str(tmp_path)))


def test_all_weights(run, backbone) -> None:
    """lora_rank 0: the warm-up moves new rows alone, the mix moves everything."""
    before, _ = load_backbone(str(backbone))
    recipe = make_recipe(backbone, lora_rank=0, max_steps=2, evaluations=1)
    align(run, recipe)
    folder = run / "model" / "aligned"
    after = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    old = before.state_dict()
    for name, weight in after.state_dict().items():
        assert not torch.equal(weight[: len(old[name])], old[name]), name
    assert not (folder / "checkpoint").exists()
    assert len(Recommender.from_pretrained(folder).recommend([], k=3)) == 3


def test_the_model_folder_tells_what_training_told_of_alike_items(
    run, backbone, monkeypatch
) -> None:
    settings = {"alike": 2, "note_events": 3, "max_steps": 1, "evaluations": 1}
    align(run, make_recipe(backbone, warmup_epochs=0, **settings))
    folder, dataset = run / "model" / "aligned", Dataset.load(run / "dataset")
    measured = Alike.measure(dataset.items)
    kept = Alike.load(folder / "alike.parquet", item_ids=[item.item_id for item in dataset.items])
    assert np.array_equal(kept.near_NK, measured.near_NK)
    recommender = Recommender.from_pretrained(folder)
    notes, encoder = recommender.encoder.notes, recommender.encoder
    assert notes is not None and notes.visits is not None  # whose counts say what is liked
    (like,) = notes.like([3], None)
    tail = [token for item in like for token in encoder.item(item)]
    assert len(like) == 2 and encoder.history([3])[-len(tail) :] == tail
    # A new item is told of beside those whose words it has, and the other way round.
    (run / "new.csv").write_text(f"item_id,title\nnew,{dataset.items[3].title} again\n")
    shutil.copytree(folder, run / "moved")
    free = set(itertools.product(*map(range, LEVEL_SIZES)))
    free -= set(map(tuple, load_model_folder(folder).codes_NL.tolist()))
    sid = torch.tensor([min(free)])
    monkeypatch.setattr(add_items_module, "encode_new_items", lambda *_, **__: sid)
    assert add_items(run / "moved", run / "new.csv") == 1
    noted = Recommender.from_pretrained(run / "moved").encoder.notes
    assert noted is not None and 3 in noted.like([NUM_ITEMS], None)[0]
    assert noted.likeness is not None and NUM_ITEMS in noted.likeness.near_NK[3]
    (run / "moved" / "alike.parquet").unlink()
    with pytest.raises(ValueError, match=r"cannot read which items are alike.*copy the model"):
        Recommender.from_pretrained(run / "moved")


@pytest.mark.parametrize("tied", [True, False])
def test_words_stay_and_blocks_learn_at_their_own_rate(run, make_backbone, tied: bool) -> None:
    folder = make_backbone(tied=tied)
    rates = {"lr": 1e-2, "block_lr": 1e-6, "keep_words": True, "weight_decay": 0.1}
    align(run, make_recipe(folder, lora_rank=0, warmup_epochs=0, evaluations=1, **rates))
    before, _ = load_backbone(str(folder))
    after = AutoModelForCausalLM.from_pretrained(run / "model" / "aligned", dtype=torch.float32)
    old = before.state_dict()
    for name, weight in after.state_dict().items():
        known = weight[: len(old[name])]
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(known, old[name]) and len(weight) > len(known), name
        else:  # six steps of Adam at 1e-6 or less
            assert 0 < (known - old[name]).abs().max() < 1e-5, name


def test_rates_apply_to_adapters_too(run, backbone, monkeypatch) -> None:
    rates: list[set[float]] = []
    create = AlignTrainer.create_optimizer

    def watch(self, *arguments):
        optimizer = create(self, *arguments)
        rates.append({group["lr"] for group in optimizer.param_groups})
        assert len({id(p) for g in optimizer.param_groups for p in g["params"]}) == sum(
            p.requires_grad for p in self.model.parameters()
        )
        return optimizer

    monkeypatch.setattr(AlignTrainer, "create_optimizer", watch)
    align(run, make_recipe(backbone, max_steps=1, evaluations=1, lr=1e-3, block_lr=1e-4))
    assert rates == [{5e-3}, {1e-3, 1e-4}]  # the warm-up has its own


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_the_warm_up_moves_new_rows_alone(
    run, make_backbone, monkeypatch, lora_rank: int, tied: bool
) -> None:
    folder = make_backbone(tied=tied)
    moved: dict[str, torch.Tensor] = {}
    new: set[int] = set()
    ids: list[int] = []
    warm_up = align_module.warm_up

    def noted(vocabulary, tokenizer):
        ids.extend(new_token_ids(vocabulary, tokenizer))
        new.update(ids)
        return ids

    monkeypatch.setattr(align_module, "new_token_ids", noted)

    def watch(adapted, trainer, *, done):
        before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
        trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
        warm_up(adapted, trainer, done=done)
        after = dict(adapted.named_parameters())
        assert {name for name, p in after.items() if p.requires_grad} == trainable
        for name, parameter in after.items():
            if not torch.equal(parameter, before[name]):
                rows = (parameter.detach() != before[name]).any(-1).nonzero()[:, 0]
                moved[name] = rows if "delta" not in name else torch.tensor(ids)[rows]
        raise Stopped

    monkeypatch.setattr(align_module, "warm_up", watch)
    with pytest.raises(Stopped):
        align(run, make_recipe(folder, lora_rank=lora_rank))
    names = " ".join(moved)
    assert "embed_tokens" in names and ("lm_head" in names) == (not tied)
    assert len(moved) == (1 if tied else 2)
    for rows in moved.values():
        assert rows.numel() and set(rows.tolist()) <= new


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_both_phases_attend_in_bf16_where_asked(run, backbone, monkeypatch, lora_rank) -> None:
    """As on a GPU, whose attention kernel takes nothing else."""
    arguments, attend = align_module.training_arguments, packed_attention.packed_attention
    dtypes: list[torch.dtype] = []

    def in_bf16(*settings, **named):
        made = arguments(*settings, **named)
        made.bf16 = True
        made.mixed_precision = "bf16"
        return made

    def watched(module, query, key, value, *rest, **named):
        if module.training:
            dtypes.append(value.dtype)
        return attend(module, query, key, value, *rest, **named)

    monkeypatch.setattr(align_module, "training_arguments", in_bf16)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, packed_attention.PACKED, watched)
    align(run, make_recipe(backbone, lora_rank=lora_rank, max_steps=2, evaluations=1))
    assert len(dtypes) > 8 and set(dtypes) == {torch.bfloat16}


def test_a_history_beyond_the_context_is_refused(run, backbone) -> None:
    with pytest.raises(ValueError, match=r"max_history 400 makes prompts of .* reads 512"):
        align(run, make_recipe(backbone, max_history=400))
    assert not (run / "model" / "aligned").exists()


def test_missing_stages_are_named(run, backbone) -> None:
    shutil.rmtree(run / "sids")
    with pytest.raises(ValueError, match=r"run `whyrec index --run .*run` first"):
        align(run, make_recipe(backbone))
    shutil.rmtree(run / "dataset")
    with pytest.raises(ValueError, match="run `whyrec prepare SOURCE"):
        align(run, make_recipe(backbone))


def check_equal(alone: Path, together: Path) -> None:
    """The same loss at every step, the same validations and the same weights."""
    for ours, theirs in zip(training_log(alone), training_log(together), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4)
    ours, theirs = (
        load_file(run / "model" / "aligned" / "model.safetensors") for run in (alone, together)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=0.02)
    assert len(Recommender.from_pretrained(together / "model" / "aligned").recommend([])) == 10
    assert not list((together / "model").glob(".*"))


def test_two_processes_train_as_one(prepared_run, backbone, tmp_path) -> None:
    settings = {"lora_dropout": 0.0, "dropout": 0.0, "max_steps": 4, "evaluations": 2}
    recipe = make_recipe(backbone, valid_users=7, **settings)
    alone = copy_run(prepared_run, tmp_path / "alone")
    align(alone, recipe)
    together = copy_run(prepared_run, tmp_path / "together")
    arguments = [f"--set={key}={json.dumps(value)}" for key, value in vars(recipe).items()]
    in_two_processes("-m", "--", "whyrec.train.align", "--run", str(together), *arguments)
    check_equal(alone, together)


def test_fsdp2_trains_as_one_process(prepared_run, backbone, tmp_path) -> None:
    """Sharded over two processes: warm-up, mix, ranking, the best checkpoint, the saved model."""
    settings = {"lora_rank": 0, "dropout": 0.0, "max_steps": 4, "evaluations": 2}
    settings |= {"keep_words": True, "block_lr": 5e-4}
    recipe = make_recipe(backbone, valid_users=7, **settings)
    alone = copy_run(prepared_run, tmp_path / "alone")
    align(alone, recipe)
    together = copy_run(prepared_run, tmp_path / "together")
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    in_two_processes(str(script), str(together), json.dumps(vars(recipe)))
    check_equal(alone, together)


def test_fsdp_with_lora_is_refused(run, backbone, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"set lora_rank: 0, or launch with .*gpus\.yaml"):
        align(run, make_recipe(backbone))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes" / "accelerate").glob("*.yaml")))
def test_accelerate_reads_its_configs(path: Path) -> None:
    assert load_config_from_file(str(path)).num_processes >= 1


def test_what_is_kept_lies_between_the_backbone_and_what_was_trained(
    prepared_run, backbone, tmp_path
) -> None:
    kept: dict[float, dict] = {}
    for share in (0.0, 0.25):
        run = copy_run(prepared_run, tmp_path / str(share))
        settings = {"lora_rank": 0, "warmup_epochs": 0, "average": 0.5, "evaluations": 1}
        align(run, make_recipe(backbone, backbone_share=share, **settings))
        kept[share] = load_file(run / "model" / "aligned" / "model.safetensors")
    assert set(summary_of(run)["kept"]) >= {"R@10", "N@10"}
    before = load_file(Path(backbone) / "model.safetensors")
    for name, start in before.items():
        whole, drawn = kept[0.0][name][: len(start)], kept[0.25][name][: len(start)]
        torch.testing.assert_close(drawn, 0.75 * whole + 0.25 * start, rtol=1e-4, atol=1e-6)
        assert torch.equal(kept[0.0][name][len(start) :], kept[0.25][name][len(start) :])


def test_settings_that_cannot_be_are_told(prepared_run, backbone) -> None:
    with pytest.raises(ValueError, match="block_lr must not lie below 0"):
        align(prepared_run, make_recipe(backbone, block_lr=-1e-3))
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        align(prepared_run, make_recipe(backbone, lora_rank=0, backbone_share=1.5))
    with pytest.raises(ValueError, match="set lora_rank: 0"):
        align(prepared_run, make_recipe(backbone, backbone_share=0.2))
