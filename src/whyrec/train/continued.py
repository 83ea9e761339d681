"""A model of an earlier stage that goes on training, and the model folder that it becomes.

With LoRA the plain backbone and the adapter are loaded, not the merged weights: what comes out is
one adapter again, however many stages it has passed, which can be released beside the backbone.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrec.backbone.extend import extend_vocabulary, new_token_ids
from whyrec.backbone.load import load_backbone
from whyrec.backbone.lora import load_adapter, plain_model, save_adapter
from whyrec.catalog.dataset import Item
from whyrec.decode.model_folder import (
    COVISITS_FILE,
    Settings,
    load_model_folder,
    read_settings,
    save_model_folder,
)
from whyrec.prompting.encoder import PromptEncoder
from whyrec.sid.quantizers import load_quantizer
from whyrec.sid.vocabulary import SidVocabulary
from whyrec.stage import read_stage
from whyrec.train.arguments import last_checkpoint
from whyrec.train.trainer import say
from whyrec.train.validation import ValidatedTrainer


def check_adapter(folder: Path, *, lora_rank: int) -> None:
    """Refuse, before any work, a rank that the model of a stage cannot go on with.

    Args:
        folder: the model folder of the earlier stage, e.g. `runs/NAME/model/aligned`.
        lora_rank: of the recipe; 0 trains all weights, which always can be.

    Raises:
        ValueError: when the model has no adapter, or one of another rank.
    """
    if lora_rank == 0:
        return
    config = folder / "checkpoint" / "adapter_config.json"
    made = read_stage(folder, made_by="whyrec align")["config"]
    if not config.exists() or made.get("random_weights", False):
        raise ValueError(
            f"{folder} was trained without an adapter on a plain backbone; set lora_rank: 0"
        )
    rank = _rank_of(config)
    if rank != lora_rank:
        raise ValueError(
            f"the adapter in {config.parent} has rank {rank} and goes on training; set "
            f"lora_rank: {rank}, or 0 to train all weights"
        )


def check_released(checkpoint: Path, *, lora_rank: int) -> None:
    """Refuse, before any work, a released checkpoint that the recipe cannot go on with.

    Args:
        checkpoint: its folder, e.g. `data/checkpoints/NAME`.
        lora_rank: of the recipe; 0 never fits, for a checkpoint is an adapter.

    Raises:
        ValueError: when there is no adapter, or one of another rank.
    """
    config = checkpoint / "adapter_config.json"
    if not config.exists():
        raise ValueError(f"{checkpoint} holds no adapter_config.json; name a checkpoint folder")
    rank = _rank_of(config)
    if rank != lora_rank:
        raise ValueError(
            f"the checkpoint {checkpoint} is an adapter of rank {rank}; set lora_rank: {rank}, "
            f"not {lora_rank}, or start without it"
        )


def _rank_of(config: Path) -> int:
    return json.loads(config.read_text(encoding="utf-8"))["r"]


def continued_model(
    run: Path, folder: Path, *, lora_rank: int, seed: int, checkpoint: Path | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase, SidVocabulary]:
    """The model that goes on training, its tokenizer, and where its SID tokens are.

    Args:
        run: the run folder, for its codebooks.
        folder: the model folder of the earlier stage.
        lora_rank: of its adapter; 0 for a plain model, all of whose weights train.
        seed: of new rows that no adapter holds.
        checkpoint: a folder with another adapter to go on with than the stage's own.
    """
    if lora_rank == 0:
        parts = load_model_folder(folder, device="cpu", dtype=torch.float32)
        return parts.model, parts.tokenizer, parts.vocabulary
    settings = read_settings(folder)
    model, tokenizer = load_backbone(settings.backbone)
    codebooks = load_quantizer(run / "sids" / "codebooks.safetensors").codebooks
    vocabulary = extend_vocabulary(
        model, tokenizer, level_sizes=settings.level_sizes, codebooks=codebooks, seed=seed
    )
    token_ids = new_token_ids(vocabulary, tokenizer)
    adapted = load_adapter(model, checkpoint or folder / "checkpoint", token_ids=token_ids)
    return adapted, tokenizer, vocabulary


def training_encoder(
    run: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: SidVocabulary,
    items: Sequence[Item],
    codes_NL: Tensor,
    thinks: bool = False,
) -> PromptEncoder:
    """The prompts that a stage trains on: in today's words, with notes as training may see them.

    Args:
        run: the run folder, for who is chosen near whom.
        settings: of the model that trains.
        tokenizer: of the extended backbone.
        vocabulary: where the SID tokens are.
        items: the catalogue.
        codes_NL: its SIDs.
        thinks: whether the model thinks before it recommends.
    """
    return PromptEncoder(
        tokenizer,
        vocabulary=vocabulary,
        codes_NL=codes_NL.tolist(),
        thinks=thinks,
        notes=settings.notes(items, visits=run / "sids" / COVISITS_FILE, training=True),
    )


def check_context(model: PreTrainedModel, *, longest: int, max_history: int, thought: int) -> None:
    """Refuse, before any work, prompts and thoughts that the model cannot read.

    Args:
        model: that goes on training.
        longest: tokens of a history of `max_history` items, a thought of `thought` tokens and SID.

    Raises:
        ValueError: when the model reads fewer.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    if longest > limit:
        raise ValueError(
            f"histories of {max_history} items and thought_tokens {thought} make {longest} tokens, "
            f"but the model reads {limit}; lower thought_tokens in the recipe"
        )


def train_best(trainer: ValidatedTrainer, folder: Path, *, start: str = "") -> dict[str, Any]:
    """Train to the end, or on from where a killed training was; the best on validation is left.

    Args:
        trainer: with the model that goes on training.
        folder: where the stage works.
        start: what to call the model before its first step, such as "activate: the checkpoint",
            where it is a candidate too: a few steps may make it worse. It is measured once,
            however often training resumes. "" where it is none.

    Returns:
        What a stage's record tells of any training; step 0 is the start.
    """
    metric = trainer.args.metric_for_best_model.removeprefix("eval_")
    figures: dict[str, float] | None = None
    if start:
        figures = trainer.validated_start(folder / ".start.json")
        shown = [name for name in dict.fromkeys(["N@10", "think_N@10", metric]) if name in figures]
        told = ", ".join(f"{name} {figures[name]:.4f}" for name in shown)
        say(f"{start} starts at validation {told}")
        trained = [weights for weights in trainer.model.parameters() if weights.requires_grad]
        before = [weights.detach().to("cpu", copy=True) for weights in trained]
    result = trainer.train(resume_from_checkpoint=last_checkpoint(Path(trainer.args.output_dir)))
    best, step = trainer.state.best_metric, trainer.state.best_global_step
    if figures is not None and (best is None or best <= figures[metric]):
        say(f"{start} stays as it was: no step was better on validation")
        best, step = figures[metric], 0
        with torch.no_grad():
            for weights, old in zip(trained, before, strict=True):
                weights.copy_(old)
    return {
        f"valid_{metric}": best,
        "start": figures,
        "best_checkpoint_step": step,
        "train_seconds": result.metrics["train_runtime"],
        "evaluation_seconds": trainer.evaluation_seconds,
        "log": trainer.state.log_history,
    }


def save_trained(
    run: Path,
    folder: Path,
    *,
    adapted: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> None:
    """Write the merged model folder and, for LoRA, a releasable checkpoint; no scratch is left.

    Args:
        run: the run folder, whose catalogue the model belongs to.
        folder: where to.
        adapted: the trained model; merged in place.
        tokenizer: of the model.
        settings: what `whyrec.json` shall say.
    """
    if isinstance(adapted, PeftModel):
        checkpoint = folder / "checkpoint"
        save_adapter(adapted, checkpoint)
        for name in ("sids.parquet", "codebooks.safetensors"):
            shutil.copyfile(run / "sids" / name, checkpoint / name)
        adapted = adapted.merge_and_unload()
    save_model_folder(
        folder,
        model=plain_model(adapted),
        tokenizer=tokenizer,
        settings=settings,
        dataset_folder=run / "dataset",
        sids_folder=run / "sids",
    )
    for scratch in folder.glob(".*"):
        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()
