"""Itemic alignment: teach a pretrained LLM the catalogue's SIDs (OneRec-Think §3.1, 2510.11639).

First a token warm-up: everything frozen but the new rows. Then the multi-task mix of
`whyrec.train.mix`, on LoRA and the new rows or on all weights, with the loss of
`whyrec.train.loss`; the checkpoint with the best validation N@10 is kept.

    whyrec align --run runs/NAME --recipe recipes/NAME/align.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml -m whyrec.train.align \\
        --run runs/NAME --recipe recipes/NAME/align.yaml
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from whyrec.backbone.extend import extend_vocabulary, new_token_ids
from whyrec.backbone.load import load_backbone
from whyrec.backbone.lora import add_lora, load_adapter
from whyrec.catalog.dataset import Dataset
from whyrec.decode.model_folder import Settings
from whyrec.prompting.encoder import PromptEncoder
from whyrec.prompting.templates import template_file
from whyrec.recipe import recipe_config
from whyrec.sid.index import read_sids
from whyrec.sid.quantizers import load_quantizer
from whyrec.sid.trie import Trie
from whyrec.stage import read_stage, run_stage
from whyrec.train.align_recipe import AlignRecipe
from whyrec.train.arguments import cut_rows, training_arguments
from whyrec.train.averaging import Backbone
from whyrec.train.command import stage_command
from whyrec.train.continued import save_trained, train_best, training_encoder
from whyrec.train.loss import SidLoss
from whyrec.train.mix import AlignmentMix, MixSizes
from whyrec.train.packing import PackedOrder
from whyrec.train.replay import own_conversations
from whyrec.train.trainer import AlignTrainer, processes, say
from whyrec.train.validation import Validation
from whyrec.train.warmup import warm_up


def align(run: Path, recipe: AlignRecipe, *, force: bool = False) -> None:
    """Make `run/model/aligned` out of `run/dataset`, `run/sids` and the recipe's backbone.

    Raises:
        ValueError: when an earlier stage is missing, a setting cannot be, or the checkpoint belongs
            to other SIDs.
    """
    if recipe.beam_width < 10:
        raise ValueError(f"beam_width must be at least 10, for N@10, not {recipe.beam_width}")
    if recipe.block_lr < 0:
        raise ValueError(f"block_lr must not lie below 0, not {recipe.block_lr}")
    if not 0 <= recipe.backbone_share <= 1:
        raise ValueError(f"backbone_share must lie between 0 and 1, not {recipe.backbone_share}")
    if recipe.backbone_share and (recipe.lora_rank or recipe.checkpoint):
        raise ValueError(
            "backbone_share draws all weights back; set lora_rank: 0, or leave it at 0 and lower "
            "lora_alpha, which is the same for an adapter"
        )
    read_stage(run / "dataset", made_by=f"whyrec prepare SOURCE --run {run}")
    read_stage(run / "sids", made_by=f"whyrec index --run {run}")
    checkpoint = Path(recipe.checkpoint) if recipe.checkpoint else None
    inputs = {
        "dataset": run / "dataset",
        "sids": run / "sids",
        "templates": template_file("align"),
        "question": template_file("recommend"),
    } | ({"checkpoint": checkpoint} if checkpoint else {})
    if checkpoint:
        check_checkpoint(checkpoint, run / "sids")
    run_stage(
        run / "model" / "aligned",
        lambda folder: _build(run, recipe, folder),
        stage="align",
        config=recipe_config(recipe),
        inputs=inputs,
        force=force,
        keep_partial=True,
        processes=processes(),
    )


def check_checkpoint(checkpoint: Path, sids_folder: Path) -> None:
    """Refuse a checkpoint that was trained on other SIDs than the run's.

    Raises:
        ValueError: when it holds no SIDs or others.
    """
    if not (checkpoint / "sids.parquet").exists():
        raise ValueError(f"{checkpoint} is no released checkpoint: it holds no sids.parquet")
    if (checkpoint / "sids.parquet").read_bytes() != (sids_folder / "sids.parquet").read_bytes():
        raise ValueError(
            f"the checkpoint {checkpoint} belongs to another catalogue or other SIDs than "
            f"{sids_folder}; run `whyrec index --set checkpoint={checkpoint}` first"
        )


def _build(run: Path, recipe: AlignRecipe, folder: Path) -> dict:
    torch.manual_seed(recipe.seed)
    state = processes()
    dataset = Dataset.load(run / "dataset")
    codes_NL = read_sids(run / "sids" / "sids.parquet", [i.item_id for i in dataset.items])
    trie = Trie.load(run / "sids" / "trie.safetensors")
    codebooks = load_quantizer(run / "sids" / "codebooks.safetensors").codebooks

    model, tokenizer = load_backbone(recipe.backbone, random_weights=recipe.random_weights)
    with state.main_process_first():
        replies = own_conversations(
            model.to(state.device),
            tokenizer,
            count=recipe.replays * (recipe.epochs if recipe.fresh_replays else 1),
            max_tokens=recipe.replay_tokens,
            seed=recipe.seed,
            cache=folder / ".replies.json",
        )
    vocabulary = extend_vocabulary(
        model, tokenizer, level_sizes=trie.level_sizes, codebooks=codebooks, seed=recipe.seed
    )
    made = Settings(
        "aligned",
        recipe.backbone,
        list(trie.level_sizes),
        recipe.max_history,
        withheld=recipe.withheld,
        note_events=recipe.note_events,
        neighbours=recipe.neighbours,
        text_tokens=recipe.text_tokens,
        alike=recipe.alike,
    )
    encoder = training_encoder(
        run, made, tokenizer, vocabulary=vocabulary, items=dataset.items, codes_NL=codes_NL
    )
    _check_context(model, encoder, recipe)
    token_ids = new_token_ids(vocabulary, tokenizer)
    before = Backbone(model, new_tokens=token_ids) if recipe.backbone_share else None
    adapted = _adapted(model, recipe, token_ids=token_ids)
    validation = Validation(
        dataset.examples("valid").at_most(recipe.valid_users),
        encoder,
        trie.to(state.device),
        recipe.beam_width,
        recipe.max_history,
    )
    sid_loss = SidLoss(
        vocabulary,
        validation.trie,
        label_smoothing=recipe.label_smoothing,
        dropout=recipe.dropout,
        text_weight=recipe.text_weight,
    )

    row_tokens, accumulated = cut_rows(recipe.batch_tokens, micro=recipe.micro_batch_tokens)

    def trainer(phase: str, **settings: Any) -> AlignTrainer:
        mix = AlignmentMix(
            encoder,
            items=dataset.items,
            sequences=dataset.training_sequences(),
            replies=replies,
            sizes=MixSizes(
                recipe.captions,
                recipe.personas,
                recipe.max_history,
                recipe.drop_events,
                recipe.jitter_events,
                recipe.withheld,
                recipe.replays,
            ),
            epochs=settings.pop("epochs"),
            seed=recipe.seed,
        )
        order = PackedOrder(mix, tokens=row_tokens, seed=recipe.seed)
        say(f"align, {phase}: {len(mix)} examples in {len(order)} rows, {mix.tasks()}")
        return AlignTrainer(
            adapted,
            args=training_arguments(
                folder / f".{phase}",
                num_rows=len(order),
                accumulated=accumulated,
                weight_decay=recipe.weight_decay,
                seed=recipe.seed,
                logs=run / "logs" / "aligned" / phase,
                report_to=recipe.report_to,
                **settings,
            ),
            mix=mix,
            order=order,
            sid_loss=sid_loss,
            validation=validation,
            compiled=recipe.compile,
            average=recipe.average if phase == "mix" else 0.0,
            block_lr=recipe.block_lr if phase == "mix" else 0.0,
            new_rows=token_ids if recipe.keep_words or phase == "warmup" else None,
        )

    if recipe.warmup_epochs and not recipe.checkpoint:
        warm_up(
            adapted,
            lambda: trainer(
                "warmup", epochs=recipe.warmup_epochs, lr=recipe.warmup_lr, evaluations=0
            ),
            done=folder / ".warmup.safetensors",
        )
    mix = trainer(
        "mix",
        epochs=recipe.epochs,
        lr=recipe.lr,
        evaluations=recipe.evaluations,
        max_steps=recipe.max_steps,
    )
    summary = train_best(mix, folder, start="align: the checkpoint" if recipe.checkpoint else "")
    if before is not None:
        before.draw_back(model, share=recipe.backbone_share)
        summary["kept"] = mix.rank_whole()
        say(f"align: drawn back to the backbone by {recipe.backbone_share}: {summary['kept']}")
    if state.is_main_process:
        save_trained(run, folder, adapted=adapted, tokenizer=tokenizer, settings=made)
    return summary | {"trained_tokens": mix.trained_tokens}


def _check_context(model: PreTrainedModel, encoder: PromptEncoder, recipe: AlignRecipe) -> None:
    longest = encoder.longest_prompt(recipe.max_history) + 16
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    if longest > limit:
        raise ValueError(
            f"max_history {recipe.max_history} makes prompts of {longest} tokens, but "
            f"{recipe.backbone} reads {limit}; lower max_history or note_events in the recipe"
        )


def _adapted(model: PreTrainedModel, recipe: AlignRecipe, *, token_ids: list[int]) -> nn.Module:
    """The model that trains: with the checkpoint's adapter, with a fresh one, or as it is."""
    if recipe.checkpoint:
        return load_adapter(model, Path(recipe.checkpoint), token_ids=token_ids)
    if recipe.lora_rank == 0:
        return model
    return add_lora(
        model,
        token_ids=token_ids,
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
    )


if __name__ == "__main__":
    stage_command(align, AlignRecipe, description=__doc__)
