"""The recipe of reasoning enhancement, and what it says to rollouts and to TRL."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import DPOConfig, GRPOConfig

from whyrec.decode.think import ThoughtSettings
from whyrec.train.arguments import common_arguments
from whyrec.train.rewards import check_rewards
from whyrec.train.rollouts import RolloutSettings
from whyrec.train.sampling import check_vllm
from whyrec.train.trainer import processes
from whyrec.train.validation import METRICS, MODES

_METHODS = ("grpo", "dpo")
_ROLLOUTS = ("decoder", "vllm")
_SCALES = ("group", "batch", "none")


@dataclass
class EnhanceRecipe:
    """Settings of reasoning enhancement.

    Attributes:
        method: grpo (on the run, from rewards) or dpo (from preferences sampled once).
        rewards: names out of `train/rewards.py`.
        reward_weights: one a reward.
        steps_per_user: training events of each user that are trained on, the last; 0 for all.
        samples: thoughts a prompt.
        thought_tokens: budget of a thought, `</think>` included; 0 for the activated model's.
        temperature: of the sampling of rollouts, above 0.
        rollouts: who samples the thoughts: decoder (ours) or vllm (an engine on the same device,
            which is given the weights before each rollout; the extra `serve` installs it).
        rollout_width: of the beam behind each thought.
        rollout_rows: thoughts that one process has in memory at once.
        resample_rounds: how often groups whose thoughts all earn the same are drawn again, for
            other training steps.
        prompts: of an optimizer step, over all processes.
        micro_batch: replies (grpo) or prompts (dpo) of a forward pass of one process at most.
        updates_per_rollout: grpo: optimizer steps that a rollout is cut into; above 1 the later
            ones are off policy, which the clipping is for.
        kl_weight: grpo: of the divergence from the activated model; 0 keeps no reference.
        item_weight: grpo: of the loss of the item that was really next, behind each sampled
            thought.
        clip: grpo: ε.
        scale_rewards: grpo: advantages are divided by the deviation of their group, of the whole
            batch, or of none; a group's own makes much of little differences.
        preferences: dpo: training steps that thoughts are sampled for, drawn at random; 0 for all.
        negatives: dpo: rejected replies of a prompt at most.
        beta: dpo: β.
        nll_weight: dpo: of the chosen reply's own loss.
        preference_shard: dpo: prompts that are sampled between two savings.
        lora_rank: of the activated adapter, which goes on training; 0 trains all weights.
        epochs: over the training steps.
        max_steps: optimizer steps at most; 0 for all epochs.
        lr: learning rate (cosine schedule).
        weight_decay: of AdamW.
        evaluations: validations during training; the start is validated besides.
        valid_users: validation users at most; 0 for all.
        beam_width: of the validation.
        best_metric: the best checkpoint's: R@5, R@10, N@5 or N@10, of no thinking, with `think_`
            before it of thinking, with `fused_` of both.
        seed: of order and thoughts.
        report_to: a tracker that transformers knows, or none.
    """

    method: str = "grpo"
    rewards: tuple[str, ...] = ("reciprocal_rank", "likelihood", "format")
    reward_weights: tuple[float, ...] = (1.0, 1.0, 0.1)
    steps_per_user: int = 1
    samples: int = 16
    thought_tokens: int = 0
    temperature: float = 1.0
    rollouts: str = "decoder"
    rollout_width: int = 20
    rollout_rows: int = 1024
    resample_rounds: int = 2
    prompts: int = 64
    micro_batch: int = 256
    updates_per_rollout: int = 1
    kl_weight: float = 1e-3
    item_weight: float = 0.0
    clip: float = 0.2
    scale_rewards: str = "group"
    preferences: int = 0
    negatives: int = 3
    beta: float = 0.1
    nll_weight: float = 0.1
    preference_shard: int = 1024
    lora_rank: int = 16
    epochs: int = 1
    max_steps: int = 0
    lr: float = 1e-5
    weight_decay: float = 0.0
    evaluations: int = 6
    valid_users: int = 1000
    beam_width: int = 20
    best_metric: str = "think_N@10"
    seed: int = 0
    report_to: str = "tensorboard"


def check_recipe(recipe: EnhanceRecipe) -> None:
    """Refuse, before any work, settings that cannot be.

    Raises:
        ValueError: one sentence about the first that is wrong.
    """
    if recipe.method not in _METHODS:
        raise ValueError(f"method: {recipe.method!r} is none of {', '.join(_METHODS)}")
    if recipe.rollouts not in _ROLLOUTS:
        raise ValueError(f"rollouts: {recipe.rollouts!r} is none of {', '.join(_ROLLOUTS)}")
    if recipe.rollouts == "vllm":
        check_vllm()
    if recipe.scale_rewards not in _SCALES:
        raise ValueError(f"scale_rewards: {recipe.scale_rewards!r} is none of {', '.join(_SCALES)}")
    check_rewards(recipe.rewards, recipe.reward_weights)
    known = [mode + name for mode in MODES for name in METRICS]
    if recipe.best_metric not in known:
        raise ValueError(f"best_metric: {recipe.best_metric!r} is none of {', '.join(known)}")
    if recipe.beam_width < 10:
        raise ValueError(f"beam_width must be at least 10, for N@10, not {recipe.beam_width}")
    if recipe.samples < 2:
        raise ValueError(f"samples must be at least 2, to compare, not {recipe.samples}")
    if recipe.temperature <= 0:
        raise ValueError(
            f"temperature must be above 0, or all thoughts of a prompt are the same, "
            f"not {recipe.temperature}"
        )
    counts = ["prompts", "micro_batch", "updates_per_rollout", "rollout_width", "negatives"]
    counts += ["preference_shard", "evaluations", "epochs"]
    weights = ["kl_weight", "item_weight", "nll_weight", "resample_rounds", "steps_per_user"]
    weights += ["preferences"]
    least = dict.fromkeys(counts, 1) | dict.fromkeys(weights, 0)
    for name, bound in least.items():
        if getattr(recipe, name) < bound:
            raise ValueError(f"{name} must be at least {bound}, not {getattr(recipe, name)}")
    if recipe.beta <= 0:
        raise ValueError(f"beta must be above 0, not {recipe.beta}")
    if recipe.rollout_rows < recipe.samples:
        raise ValueError(
            f"rollout_rows {recipe.rollout_rows} has no room for the {recipe.samples} thoughts of "
            "one prompt (samples); raise it"
        )
    _cut(recipe)


def rollout_settings(recipe: EnhanceRecipe, thoughts: ThoughtSettings) -> RolloutSettings:
    """How rollouts are made.

    Args:
        recipe: the recipe.
        thoughts: how the activated model thinks.
    """
    return RolloutSettings(
        samples=recipe.samples,
        max_tokens=recipe.thought_tokens or thoughts.max_tokens,
        temperature=recipe.temperature,
        width=recipe.rollout_width,
        rows=recipe.rollout_rows,
        rounds=recipe.resample_rounds,
        rewards=recipe.rewards,
        weights=recipe.reward_weights,
        seed=recipe.seed,
        with_item=recipe.method == "grpo" and recipe.item_weight > 0,
    )


def grpo_arguments(recipe: EnhanceRecipe, folder: Path, *, num_rows: int, logs: Path) -> GRPOConfig:
    """TRL's configuration for GRPO.

    Args:
        recipe: the recipe.
        folder: for checkpoints.
        num_rows: prompts of all epochs.
    """
    micro, accumulated = _cut(recipe)
    return GRPOConfig(
        **_arguments(
            recipe,
            folder,
            rounds=num_rows // recipe.prompts,
            updates=recipe.updates_per_rollout,
            logs=logs,
        ),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=recipe.samples,  # TRL wants whole groups, though none are asked
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * recipe.updates_per_rollout,
        num_generations=recipe.samples,
        max_completion_length=recipe.thought_tokens or None,
        temperature=recipe.temperature,
        shuffle_dataset=False,  # the rows lie in their order
        beta=0.0,  # the trainer brings its own reference
        epsilon=recipe.clip,
        loss_type="dapo",
        scale_rewards=recipe.scale_rewards,
        disable_dropout=True,
    )


def dpo_arguments(recipe: EnhanceRecipe, folder: Path, *, num_rows: int, logs: Path) -> DPOConfig:
    """TRL's configuration for DPO; arguments as for GRPO."""
    micro, accumulated = _cut(recipe)
    return DPOConfig(
        **_arguments(
            recipe, folder, rounds=max(num_rows // recipe.prompts, 1), updates=1, logs=logs
        ),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        max_length=None,
        beta=recipe.beta,
        disable_dropout=True,
    )


def _arguments(
    recipe: EnhanceRecipe, folder: Path, *, rounds: int, updates: int, logs: Path
) -> dict[str, Any]:
    """What both methods have in common.

    Args:
        recipe: the recipe.
        folder: for checkpoints.
        rounds: batches of `prompts` prompts that there are.
        updates: optimizer steps that each makes.
        logs: for TensorBoard.
    """
    steps = rounds * updates
    steps = min(steps, recipe.max_steps) if recipe.max_steps else steps
    # A checkpoint between two updates of a rollout would lose the rollout.
    every = max(steps // updates // recipe.evaluations, 1) * updates
    return common_arguments(
        folder,
        steps=steps,
        every=every,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        best_metric=recipe.best_metric,
        seed=recipe.seed,
        logs=logs,
        report_to=recipe.report_to,
    ) | {"dataloader_num_workers": 0, "logging_steps": 1}


def _cut(recipe: EnhanceRecipe) -> tuple[int, int]:
    """Replies (or prompts) of a forward pass of one process, and passes of an optimizer step.

    Raises:
        ValueError: when they are not equal on all processes.
    """
    many = processes().num_processes
    whole = recipe.prompts
    if recipe.method == "grpo":
        if whole % many:
            raise ValueError(
                f"prompts {whole} cannot be shared by {many} processes; make it a multiple"
            )
        whole = whole * recipe.samples // recipe.updates_per_rollout
        if whole * recipe.updates_per_rollout != recipe.prompts * recipe.samples:
            raise ValueError(
                f"updates_per_rollout {recipe.updates_per_rollout} does not divide the "
                f"{recipe.prompts * recipe.samples} thoughts of a rollout (prompts × samples)"
            )
    share = whole // many
    accumulated = -(-share // recipe.micro_batch)
    if share * many != whole or share % accumulated:
        raise ValueError(
            f"the {whole} replies or prompts of an optimizer step cannot be cut into equal parts "
            f"of at most micro_batch {recipe.micro_batch} on {many} processes; make prompts a "
            "multiple of both"
        )
    return share // accumulated, accumulated
