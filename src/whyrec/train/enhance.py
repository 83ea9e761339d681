"""Reasoning enhancement: teach an activated model which thoughts pay (OneRec-Think §3.3).

`method: grpo` samples thoughts, decodes items by an exact beam after each, rewards them and pushes
the words of the better ones (`grpo.py`); `method: dpo` samples preferences once and trains thought
and item together (`dpo.py`). Rewards are chosen and weighted in the recipe (`rewards.py`). The
checkpoint is chosen by ranking validation users, and the activated model itself is a candidate:
where no step betters it, the enhanced model is the activated one.

    whyrec enhance --run runs/NAME --recipe recipes/NAME/grpo.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml -m whyrec.train.enhance \\
        --run runs/NAME --recipe recipes/NAME/grpo.yaml
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrec.backbone.lora import plain_model
from whyrec.catalog.dataset import Dataset
from whyrec.decode.model_folder import Settings, load_model_folder, read_settings
from whyrec.decode.think import ThoughtSettings, text_tokens
from whyrec.prompting.templates import template_file
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.mentions import MentionFinder
from whyrec.reasoning.pruning import read_vectors
from whyrec.recipe import recipe_config
from whyrec.sid.index import read_sids
from whyrec.sid.trie import Trie
from whyrec.stage import read_stage, run_stage
from whyrec.train.align import check_checkpoint
from whyrec.train.command import stage_command
from whyrec.train.continued import (
    check_adapter,
    check_context,
    continued_model,
    save_trained,
    train_best,
    training_encoder,
)
from whyrec.train.dpo import ReplyCollator, ReplyDpoTrainer
from whyrec.train.enhance_recipe import (
    EnhanceRecipe,
    check_recipe,
    dpo_arguments,
    grpo_arguments,
    rollout_settings,
)
from whyrec.train.grpo import ThoughtGrpoTrainer
from whyrec.train.policy import Policy
from whyrec.train.preferences import read_preferences, write_preferences
from whyrec.train.rationales import training_steps
from whyrec.train.rewards import Catalogue
from whyrec.train.rollouts import Roller
from whyrec.train.sampling import VllmSampler
from whyrec.train.trainer import launched_with_fsdp, processes, say
from whyrec.train.validation import Validation


@dataclass(frozen=True)
class _Parts:
    """What a method trains, and with what."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    roller: Roller
    policy: Policy
    validation: Validation


def enhance(run: Path, recipe: EnhanceRecipe, *, force: bool = False) -> None:
    """Make `run/model/enhanced` out of `run/model/activated`.

    Raises:
        ValueError: when an earlier stage is missing, a setting cannot be, or the thoughts do not
            fit the model's context.
    """
    made_by = f"whyrec activate --run {run} --recipe recipes/NAME/activate.yaml"
    activated = run / "model" / "activated"
    read_stage(activated, made_by=made_by)
    settings = read_settings(activated)
    assert settings.thoughts is not None, f"{activated} does not think"
    check_recipe(recipe)
    check_adapter(activated, lora_rank=recipe.lora_rank)
    check_checkpoint(activated, run / "sids")
    if launched_with_fsdp():
        raise ValueError(
            "FSDP shards the weights that thoughts are sampled with; launch with "
            "recipes/accelerate/gpus.yaml, which keeps them whole"
        )
    run_stage(
        run / "model" / "enhanced",
        lambda folder: _build(run, recipe, settings, folder),
        stage="enhance",
        config=recipe_config(recipe),
        inputs={
            "dataset": run / "dataset",
            "sids": run / "sids",
            "activated": activated,
            "question": template_file("recommend"),
            "templates": template_file("rationale"),
        },
        force=force,
        keep_partial=True,
        processes=processes(),
    )


def _build(run: Path, recipe: EnhanceRecipe, activated: Settings, folder: Path) -> dict:
    torch.manual_seed(recipe.seed)
    state = processes()
    parts = _parts(run, recipe, activated)
    trainer, report = _trainer(run, recipe, parts, folder)
    summary = train_best(trainer, folder, start="enhance: the activated model")
    _let_go(parts.roller)
    if state.is_main_process:
        made = replace(activated, stage="enhanced", thoughts=_thoughts(recipe, activated))
        save_trained(run, folder, adapted=parts.model, tokenizer=parts.tokenizer, settings=made)
    dead = [row["dead_groups"] for row in summary["log"] if "dead_groups" in row]
    return summary | {
        "dead_groups": float(np.mean(dead)) if dead else report.get("dead_groups"),
        "dead_groups_after_50_steps": float(np.mean(dead[50:])) if dead[50:] else None,
        "preferences": report or None,
    }


def _parts(run: Path, recipe: EnhanceRecipe, activated: Settings) -> _Parts:
    dataset = Dataset.load(run / "dataset")
    trie = Trie.load(run / "sids" / "trie.safetensors").to(processes().device)
    model, tokenizer, vocabulary = continued_model(
        run, run / "model" / "activated", lora_rank=recipe.lora_rank, seed=recipe.seed
    )
    model.to(processes().device)
    codes_NL = read_sids(run / "sids" / "sids.parquet", [i.item_id for i in dataset.items])
    encoder = training_encoder(
        run,
        activated,
        tokenizer,
        vocabulary=vocabulary,
        items=dataset.items,
        codes_NL=codes_NL,
        thinks=True,
    )
    thoughts = _thoughts(recipe, activated)
    prompt = encoder.longest_prompt(activated.max_history)
    check_context(
        plain_model(model),
        longest=prompt + thoughts.max_tokens + vocabulary.num_levels,
        max_history=activated.max_history,
        thought=thoughts.max_tokens,
    )
    book = FactBook(dataset.items)
    roller = Roller(
        training_steps(
            dataset, steps_per_user=recipe.steps_per_user, max_history=activated.max_history
        ),
        sequences=dataset.training_sequences(),
        encoder=encoder,
        trie=trie,
        catalogue=Catalogue(
            codes_NL.numpy(),
            read_vectors(run / "sids" / "embeddings.safetensors"),
            book,
            MentionFinder(book),
        ),
        settings=rollout_settings(recipe, thoughts),
    )
    validation = Validation(
        dataset.examples("valid").at_most(recipe.valid_users),
        encoder,
        trie,
        recipe.beam_width,
        activated.max_history,
        thoughts,
    )
    num_rows = plain_model(model).get_output_embeddings().weight.shape[0]
    text_V = text_tokens(tokenizer, num_rows=num_rows, stop=vocabulary.think_end)
    policy = Policy(vocabulary, trie, text_V.to(processes().device), recipe.temperature)
    return _Parts(model, tokenizer, roller, policy, validation)


def _trainer(
    run: Path, recipe: EnhanceRecipe, parts: _Parts, folder: Path
) -> tuple[ThoughtGrpoTrainer | ReplyDpoTrainer, dict[str, float]]:
    """The method's trainer, and what is told of the preferences, if there are any."""
    steps, logs = len(parts.roller.steps), run / "logs" / "enhanced" / "steps"
    common: dict[str, Any] = {
        "policy": parts.policy,
        "tokenizer": parts.tokenizer,
        "validation": parts.validation,
    }
    if recipe.method == "grpo":
        if steps < recipe.prompts:
            raise ValueError(
                f"an optimizer step wants {recipe.prompts} prompts and there are {steps} training "
                "steps; lower prompts or raise steps_per_user in the recipe"
            )
        _let_vllm_think(run, recipe, parts)
        order = _order(steps, recipe)
        return ThoughtGrpoTrainer(
            parts.model,
            args=grpo_arguments(recipe, folder / ".steps", num_rows=len(order), logs=logs),
            order=order,
            roller=parts.roller,
            reference=_reference(run) if recipe.kl_weight else None,
            kl_weight=recipe.kl_weight,
            item_weight=recipe.item_weight,
            **common,
        ), {}
    file = folder / "preferences.parquet"
    model = plain_model(parts.model).eval()
    if not file.exists():
        _let_vllm_think(run, recipe, parts)
        chosen = np.random.default_rng((recipe.seed, 11)).permutation(steps).tolist()
        write_preferences(
            parts.roller,
            model,
            chosen[: recipe.preferences or None],
            negatives=recipe.negatives,
            shard=recipe.preference_shard,
            folder=folder / ".preferences",
            file=file,
            state=processes(),
        )
        _let_go(parts.roller)
    preferences, report = read_preferences(file)
    say(f"enhance: {report['kept']} preferences of {report['drawn']} groups")
    order = _order(len(preferences), recipe)
    return ReplyDpoTrainer(
        parts.model,
        args=dpo_arguments(recipe, folder / ".steps", num_rows=len(order), logs=logs),
        order=order,
        collator=ReplyCollator(
            preferences,
            steps=parts.roller.steps,
            encoder=parts.roller.encoder,
            codes_NL=torch.from_numpy(parts.roller.catalogue.codes_NL),
        ),
        reference=_reference(run),
        nll_weight=recipe.nll_weight,
        **common,
    ), report


def _let_vllm_think(run: Path, recipe: EnhanceRecipe, parts: _Parts) -> None:
    """Start vLLM beside the training, where the recipe wants it."""
    if recipe.rollouts != "vllm":
        return
    settings = parts.roller.settings
    parts.roller.sampler = VllmSampler(
        run / "model" / "activated",
        think_end=parts.policy.vocabulary.think_end,
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        rows=settings.rows,
        longest=parts.roller.encoder.longest_prompt(parts.validation.max_history),
    )


def _let_go(roller: Roller) -> None:
    """End the engine, if there is one: nobody will be rolled out any more."""
    if roller.sampler is not None:
        roller.sampler.close()
        roller.sampler = None


def _order(rows: int, recipe: EnhanceRecipe) -> list[int]:
    """Numbers of the rows of all epochs, each epoch anew in a random order."""
    return [
        row
        for epoch in range(recipe.epochs)
        for row in np.random.default_rng((recipe.seed, epoch, 7)).permutation(rows).tolist()
    ]


def _reference(run: Path) -> PreTrainedModel:
    """The activated model as it was, merged."""
    return load_model_folder(
        run / "model" / "activated", device=str(processes().device), dtype=torch.float32
    ).model


def _thoughts(recipe: EnhanceRecipe, activated: Settings) -> ThoughtSettings:
    """How the enhanced model thinks: as the activated one, within the recipe's budget."""
    assert activated.thoughts is not None
    if not recipe.thought_tokens:
        return activated.thoughts
    return replace(activated.thoughts, max_tokens=recipe.thought_tokens)


if __name__ == "__main__":
    stage_command(enhance, EnhanceRecipe, description=__doc__)
