"""Settings of itemic alignment, one flat YAML file each (recipes/*/align.yaml)."""

from dataclasses import dataclass


@dataclass
class AlignRecipe:
    """Settings of itemic alignment.

    Attributes:
        backbone: `smollm2-135m`, a hub id or a folder.
        random_weights: take the backbone's architecture only (an ablation).
        checkpoint: a released checkpoint to start from; skips the token warm-up.
        lora_rank: LoRA rank; 0 trains all weights.
        lora_alpha: scale of the LoRA update, divided by √rank.
        lora_dropout: dropout on the adapters' inputs.
        max_history: items of a history that a prompt holds at most.
        note_events: how many of a history's newest events carry notes (`prompting/notes.py`).
        neighbours: items that other users chose near such an event, in its note, at most.
        text_tokens: tokens of such an event's text, in its note, at most.
        alike: items that share words with such an event, in its note, at most (`catalog/alike.py`).
        warmup_epochs: epochs of the token warm-up.
        warmup_lr: its learning rate.
        epochs: of the multi-task mix.
        max_steps: optimizer steps of the mix at most; 0 for all of its epochs.
        lr: learning rate of the mix (cosine schedule).
        block_lr: that of the transformer blocks alone, where it is another; 0 for `lr`. The new
            tokens have all to learn and the blocks much to forget.
        keep_words: the backbone's own rows of the embedding stay as they are; for all weights.
        weight_decay: of AdamW.
        average: decay per step of the weights' average, which is validated and kept; 0 for none.
        backbone_share: how far the trained weights go back towards the backbone's before they are
            kept, 0 to 1; it keeps language. For all weights, not for LoRA.
        batch_tokens: tokens of an optimizer step, over all processes.
        micro_batch_tokens: tokens of a forward pass of one process at most.
        compile: compile the model's blocks; on a GPU only.
        label_smoothing: over the legal codes of a SID target.
        dropout: on input embeddings and last hidden states.
        text_weight: of a text token's loss, against 1 for a code's.
        captions: share of the catalogue captioned, and looked up, each epoch.
        personas: share of the users told as a story each epoch.
        drop_events: share of a sequence's events left out, others each epoch.
        jitter_events: places that events may change against each other, at most, each epoch.
        withheld: share of the items whose text is never shown, to test captions on.
        replays: conversations of the backbone itself, replayed each epoch; beyond the packaged
            prompts it makes up the questions too.
        fresh_replays: other conversations each epoch, so that what is kept is the language and not
            these very replies; epochs times as many are made up.
        replay_tokens: tokens of a replayed reply at most.
        evaluations: validations during the mix.
        valid_users: validation users at most; 0 for all.
        beam_width: of the validation.
        seed: of weights, order and dropout.
        report_to: a tracker that transformers knows, or none.
    """

    backbone: str = "smollm2-135m"
    random_weights: bool = False
    checkpoint: str = ""
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    max_history: int = 50
    note_events: int = 10
    neighbours: int = 0
    text_tokens: int = 0
    alike: int = 0
    warmup_epochs: int = 1
    warmup_lr: float = 5e-3
    epochs: int = 10
    max_steps: int = 0
    lr: float = 1e-3
    block_lr: float = 0.0
    keep_words: bool = False
    weight_decay: float = 0.01
    average: float = 0.0
    backbone_share: float = 0.0
    batch_tokens: int = 8192
    micro_batch_tokens: int = 32768
    compile: bool = True
    label_smoothing: float = 0.1
    dropout: float = 0.1
    text_weight: float = 1.0
    captions: float = 0.5
    personas: float = 0.2
    drop_events: float = 0.0
    jitter_events: float = 0.0
    withheld: float = 0.0
    replays: int = 64
    replay_tokens: int = 64
    fresh_replays: bool = False
    evaluations: int = 10
    valid_users: int = 1000
    beam_width: int = 20
    seed: int = 0
    report_to: str = "tensorboard"
