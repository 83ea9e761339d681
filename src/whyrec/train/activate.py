"""Reasoning activation: teach an aligned model to say why before what (OneRec-Think §3.2).

Rationales are written from pruned histories, with the target known, and trained after the *raw*
history, followed by the item (arXiv 2510.11639). In a share of the examples the thought is closed
at once, so that one model, given the same inputs, can do both. The checkpoint is chosen by ranking
validation users with and without thinking; a released one that training starts from is a candidate.

    whyrec activate --run runs/NAME --recipe recipes/NAME/activate.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml -m whyrec.train.activate \\
        --run runs/NAME --recipe recipes/NAME/activate.yaml
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from whyrec.backbone.lora import plain_model
from whyrec.catalog.dataset import Dataset
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.model_folder import Settings, read_settings
from whyrec.decode.think import Thinker
from whyrec.prompting.encoder import PromptEncoder
from whyrec.prompting.templates import template_file
from whyrec.reasoning.own import own_writer
from whyrec.recipe import recipe_config
from whyrec.sid.index import read_sids
from whyrec.sid.trie import Trie
from whyrec.stage import read_stage, run_stage
from whyrec.train.activate_recipe import (
    ActivateRecipe,
    check_recipe,
    thoughts_of,
    writing_of,
)
from whyrec.train.align import check_checkpoint
from whyrec.train.arguments import cut_rows, training_arguments
from whyrec.train.command import stage_command
from whyrec.train.continued import (
    check_adapter,
    check_context,
    check_released,
    continued_model,
    save_trained,
    train_best,
    training_encoder,
)
from whyrec.train.loss import SidLoss
from whyrec.train.packing import PackedOrder
from whyrec.train.rationales import (
    Rationales,
    Writing,
    read_rationales,
    write_rationales,
)
from whyrec.train.thinking import ThinkingMix
from whyrec.train.trainer import AlignTrainer, processes, say
from whyrec.train.validation import Validation


def activate(run: Path, recipe: ActivateRecipe, *, force: bool = False) -> None:
    """Make `run/model/activated` out of `run/model/aligned`.

    Raises:
        ValueError: when an earlier stage is missing, a setting cannot be, the checkpoint belongs to
            other SIDs, the thoughts do not fit the model's context, or the endpoint fails.
    """
    made_by = f"whyrec align --run {run} --recipe recipes/NAME/align.yaml"
    aligned = run / "model" / "aligned"
    read_stage(aligned, made_by=made_by)
    settings = read_settings(aligned)
    writing = writing_of(recipe, max_history=settings.max_history)
    check_recipe(recipe)
    shows_text = settings.note_events and settings.text_tokens
    if recipe.writer == "grounded" and recipe.readable and not shows_text:
        raise ValueError(
            "readable: true keeps to what notes spell out, and the aligned model's prompts hold no "
            "text; set readable: false, or text_tokens in the recipe of alignment"
        )
    check_checkpoint(aligned, run / "sids")
    checkpoint = Path(recipe.checkpoint) if recipe.checkpoint else None
    if checkpoint:
        check_checkpoint(checkpoint, run / "sids")
        check_released(checkpoint, lora_rank=recipe.lora_rank)
    else:
        check_adapter(aligned, lora_rank=recipe.lora_rank)
    inputs = {
        "dataset": run / "dataset",
        "sids": run / "sids",
        "aligned": aligned,
        "question": template_file("recommend"),
        "templates": template_file("rationale"),
    } | ({"checkpoint": checkpoint} if checkpoint else {})
    run_stage(
        run / "model" / "activated",
        lambda folder: _build(run, recipe, writing, settings, folder),
        stage="activate",
        config=recipe_config(recipe),
        inputs=inputs,
        force=force,
        keep_partial=True,
        processes=processes(),
    )


def _build(
    run: Path, recipe: ActivateRecipe, writing: Writing, aligned: Settings, folder: Path
) -> dict:
    torch.manual_seed(recipe.seed)
    state = processes()
    dataset = Dataset.load(run / "dataset")
    trie = Trie.load(run / "sids" / "trie.safetensors")
    adapted, tokenizer, vocabulary = continued_model(
        run,
        run / "model" / "aligned",
        lora_rank=recipe.lora_rank,
        seed=recipe.seed,
        checkpoint=Path(recipe.checkpoint) if recipe.checkpoint else None,
    )
    codes_NL = read_sids(run / "sids" / "sids.parquet", [i.item_id for i in dataset.items])
    encoder = training_encoder(
        run,
        aligned,
        tokenizer,
        vocabulary=vocabulary,
        items=dataset.items,
        codes_NL=codes_NL,
        thinks=True,
    )
    check_context(
        plain_model(adapted),
        longest=encoder.longest_prompt(aligned.max_history) + recipe.thought_tokens + 16,
        max_history=aligned.max_history,
        thought=recipe.thought_tokens,
    )

    def own_thinker() -> Thinker:
        model = plain_model(adapted).to(state.device).eval()
        return own_writer(BeamDecoder(model, vocabulary=vocabulary, trie=trie), encoder)

    rationales, report = _rationales(run, writing, dataset, encoder, own_thinker, folder)
    adapted.train()
    trainer = _trainer(run, recipe, aligned, adapted, dataset, encoder, trie, rationales, folder)
    start = "activate: the checkpoint" if recipe.checkpoint else ""
    summary = train_best(trainer, folder, start=start)
    if state.is_main_process:
        made = replace(aligned, stage="activated", thoughts=thoughts_of(recipe))
        save_trained(run, folder, adapted=adapted, tokenizer=tokenizer, settings=made)
    return summary | {"rationales": report, "trained_tokens": trainer.trained_tokens}


def _rationales(
    run: Path,
    writing: Writing,
    dataset: Dataset,
    encoder: PromptEncoder,
    own_thinker: Callable[[], Thinker],
    folder: Path,
) -> tuple[Rationales, dict]:
    """The rationales to train on; written by the main process unless they are there already."""
    file = folder / "rationales.parquet"
    state = processes()
    if state.is_main_process and not file.exists():
        with torch.autocast(state.device.type, torch.bfloat16, enabled=torch.cuda.is_available()):
            write_rationales(
                run,
                writing,
                dataset=dataset,
                encoder=encoder,
                own_thinker=own_thinker,
                file=file,
            )
    while not file.exists():  # a barrier would time out: an endpoint may take hours
        time.sleep(1)
    state.wait_for_everyone()
    rationales, report = read_rationales(file)
    say(
        f"activate: {report['kept']} of {report['written']} rationales kept, "
        f"{report['mean_tokens']} tokens on average; dropped: {report['dropped'] or 'none'}"
    )
    return rationales, report


def _trainer(
    run: Path,
    recipe: ActivateRecipe,
    aligned: Settings,
    adapted: nn.Module,
    dataset: Dataset,
    encoder: PromptEncoder,
    trie: Trie,
    rationales: Rationales,
    folder: Path,
) -> AlignTrainer:
    mix = ThinkingMix(
        encoder,
        sequences=dataset.training_sequences(),
        rationales=rationales,
        no_think=recipe.no_think,
        max_history=aligned.max_history,
        epochs=recipe.epochs,
        seed=recipe.seed,
    )
    row_tokens, accumulated = cut_rows(recipe.batch_tokens, micro=recipe.micro_batch_tokens)
    order = PackedOrder(mix, tokens=row_tokens, seed=recipe.seed)
    say(f"activate: {len(mix)} examples in {len(order)} rows, {mix.tasks()}")
    trie = trie.to(processes().device)
    return AlignTrainer(
        adapted,
        args=training_arguments(
            folder / ".steps",
            num_rows=len(order),
            accumulated=accumulated,
            lr=recipe.lr,
            evaluations=recipe.evaluations,
            max_steps=recipe.max_steps,
            weight_decay=recipe.weight_decay,
            seed=recipe.seed,
            best_metric=recipe.best_metric,
            logs=run / "logs" / "activated" / "steps",
            report_to=recipe.report_to,
        ),
        mix=mix,
        order=order,
        sid_loss=SidLoss(
            encoder.vocabulary,
            trie,
            recipe.label_smoothing,
            recipe.dropout,
            recipe.text_weight,
        ),
        validation=Validation(
            dataset.examples("valid").at_most(recipe.valid_users),
            encoder,
            trie,
            recipe.beam_width,
            aligned.max_history,
            thoughts_of(recipe),
        ),
        compiled=recipe.compile,
    )


if __name__ == "__main__":
    stage_command(activate, ActivateRecipe, description=__doc__)
