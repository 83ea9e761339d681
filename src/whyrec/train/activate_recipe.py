"""The recipe of reasoning activation, and what it says to writer, training and thoughts."""

from dataclasses import dataclass

from whyrec.decode.think import ThoughtSettings
from whyrec.reasoning.endpoint import EndpointSettings
from whyrec.reasoning.grounded import GroundedSettings
from whyrec.train.rationales import Writing
from whyrec.train.validation import METRICS, MODES


@dataclass
class ActivateRecipe:
    """Settings of reasoning activation.

    Attributes:
        checkpoint: a released thinking checkpoint to start from, instead of the aligned adapter;
            a candidate on validation.
        writer: of the rationales: grounded (facts of the catalogue, no model), own (the aligned
            model) or endpoint (any OpenAI-compatible one).
        announce: what a grounded rationale tells of the target: broad, category, supported, full;
            or expected, which is a guess from the history; one of the list is drawn for each.
        max_evidence: facts that a grounded rationale begins with, at most.
        paraphrases: ways that a grounded clause may be said in.
        pruned: history items that a rationale is written from.
        readable: a grounded rationale says of the history only what its notes spell out, which the
            model can read; the rest of the catalogue it would have to know by heart.
        own_tokens: budget of the aligned model's answers.
        own_temperature: of their sampling.
        endpoint_url: base address, up to and with `/v1`.
        endpoint_model: the model's name there.
        endpoint_key_variable: environment variable that holds the key.
        endpoint_threads: requests at once.
        endpoint_timeout_s: of a request.
        endpoint_retries: of a request.
        endpoint_max_requests: budget, over all runs; 0 for no limit.
        endpoint_max_total_tokens: budget, over all runs; 0 for no limit.
        endpoint_max_tokens: of an answer.
        endpoint_temperature: of the sampling.
        steps_per_user: training events of each user that get a rationale, the last; 0 for all.
        no_think: share of the examples whose thought is closed at once.
        text_weight: of a rationale token's loss; a SID code's is 1.
        thought_tokens: budget of a thought, `</think>` included; longer rationales are dropped.
        thoughts: sampled for each history, their rankings mixed.
        temperature: of the sampling of thoughts; 0 takes the best token.
        think_weight: of thinking in the fused ranking.
        lora_rank: of the aligned adapter, which goes on training; 0 trains all weights.
        epochs: over the steps.
        max_steps: optimizer steps at most; 0 for all epochs.
        lr: learning rate (cosine schedule).
        weight_decay: of AdamW.
        batch_tokens: tokens of an optimizer step, over all processes.
        micro_batch_tokens: tokens of a forward pass of one process at most.
        compile: compile the model's blocks; on a GPU only.
        label_smoothing: over the legal codes of a SID target.
        dropout: on input embeddings and last hidden states.
        evaluations: validations during training.
        valid_users: validation users at most; 0 for all.
        beam_width: of the validation.
        best_metric: the best checkpoint's: R@5, R@10, N@5 or N@10, of no thinking, with `think_`
            before it of thinking, with `fused_` of both.
        seed: of rationales, order, dropout and thoughts.
        report_to: a tracker that transformers knows, or none.
    """

    checkpoint: str = ""
    writer: str = "grounded"
    announce: tuple[str, ...] = ("supported",)
    max_evidence: int = 3
    paraphrases: int = 1
    pruned: int = 10
    readable: bool = False
    own_tokens: int = 96
    own_temperature: float = 0.7
    endpoint_url: str = ""
    endpoint_model: str = ""
    endpoint_key_variable: str = "OPENAI_API_KEY"
    endpoint_threads: int = 8
    endpoint_timeout_s: float = 60.0
    endpoint_retries: int = 5
    endpoint_max_requests: int = 0
    endpoint_max_total_tokens: int = 0
    endpoint_max_tokens: int = 96
    endpoint_temperature: float = 0.7
    steps_per_user: int = 0
    no_think: float = 0.3
    text_weight: float = 1.0
    thought_tokens: int = 64
    thoughts: int = 4
    temperature: float = 1.0
    think_weight: float = 0.5
    lora_rank: int = 16
    epochs: int = 3
    max_steps: int = 0
    lr: float = 3e-4
    weight_decay: float = 0.01
    batch_tokens: int = 8192
    micro_batch_tokens: int = 32768
    compile: bool = True
    label_smoothing: float = 0.1
    dropout: float = 0.1
    evaluations: int = 6
    valid_users: int = 1000
    beam_width: int = 20
    best_metric: str = "think_N@10"
    seed: int = 0
    report_to: str = "tensorboard"


def writing_of(recipe: ActivateRecipe, *, max_history: int) -> Writing:
    """Who writes the rationales, and how.

    Args:
        recipe: the recipe.
        max_history: items of a history in the aligned model's prompt.

    Raises:
        ValueError: for an unknown writer, or settings of it that cannot be.
    """
    endpoint = None
    if recipe.writer == "endpoint":
        if not (recipe.endpoint_url and recipe.endpoint_model):
            raise ValueError("writer: endpoint needs endpoint_url and endpoint_model in the recipe")
        endpoint = EndpointSettings(
            recipe.endpoint_url,
            recipe.endpoint_model,
            key_variable=recipe.endpoint_key_variable,
            threads=recipe.endpoint_threads,
            timeout_s=recipe.endpoint_timeout_s,
            retries=recipe.endpoint_retries,
            max_requests=recipe.endpoint_max_requests or None,
            max_total_tokens=recipe.endpoint_max_total_tokens or None,
            max_tokens=recipe.endpoint_max_tokens,
            temperature=recipe.endpoint_temperature,
        )
    return Writing(
        recipe.writer,
        GroundedSettings(
            recipe.announce,
            recipe.max_evidence,
            recipe.pruned,
            recipe.paraphrases,
            recipe.readable,
        ),
        endpoint,
        own_tokens=recipe.own_tokens,
        own_temperature=recipe.own_temperature,
        steps_per_user=recipe.steps_per_user,
        max_history=max_history,
        max_tokens=recipe.thought_tokens - 1,  # `</think>` is a token too
        seed=recipe.seed,
    )


def check_recipe(recipe: ActivateRecipe) -> None:
    """Refuse, before any work, settings of training and thoughts that cannot be.

    Raises:
        ValueError: one sentence about the first that is wrong.
    """
    known = [mode + name for mode in MODES for name in METRICS]
    if recipe.best_metric not in known:
        raise ValueError(f"best_metric: {recipe.best_metric!r} is none of {', '.join(known)}")
    if recipe.beam_width < 10:
        raise ValueError(f"beam_width must be at least 10, for N@10, not {recipe.beam_width}")
    if recipe.thoughts < 1 or recipe.temperature < 0:
        raise ValueError("thoughts must be at least 1, and temperature not negative")
    if recipe.thoughts > 1 and recipe.temperature == 0:
        raise ValueError("at temperature 0 all thoughts are the same; set thoughts: 1")
    if recipe.checkpoint and recipe.writer == "own":
        raise ValueError(
            "writer: own asks the aligned model, and a checkpoint stands in its place; use another "
            "writer or leave the checkpoint out"
        )
    for name in ("no_think", "think_weight"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {getattr(recipe, name)}")


def thoughts_of(recipe: ActivateRecipe) -> ThoughtSettings:
    """How the activated model thinks."""
    return ThoughtSettings(
        recipe.thoughts, recipe.thought_tokens, recipe.temperature, recipe.think_weight
    )
