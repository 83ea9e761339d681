"""Training speed of alignment beside TRL's default, on one GPU, in the same run.

    python eval/bench/train.py runs/beauty [--json eval/results/train/NAME.json]

All weights of SmolLM2-135M train on the same examples of the run's alignment mix: once by
`AlignTrainer` (packed rows, compiled blocks, losses where they are wanted), once by an `SFTTrainer`
with TRL's defaults (8 padded sequences a step, gradient checkpointing, full logits).

Tokens are counted without padding. MFU is 6 · N · tokens/s over the card's dense bf16 peak, N being
all parameters, embedding included once. Steps before the tenth are not timed: kernels compile then.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset as Rows
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from whyrec.backbone.extend import extend_vocabulary
from whyrec.backbone.load import load_backbone
from whyrec.catalog.dataset import Dataset
from whyrec.evaluation.results import record
from whyrec.prompting.encoder import PromptEncoder
from whyrec.sid.index import read_sids
from whyrec.sid.trie import Trie
from whyrec.stage import fingerprint
from whyrec.train.arguments import training_arguments
from whyrec.train.loss import SidLoss
from whyrec.train.mix import AlignmentMix, MixSizes
from whyrec.train.packing import PackedOrder
from whyrec.train.trainer import AlignTrainer
from whyrec.train.validation import Validation

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}  # dense bf16, NVIDIA's datasheets
UNTIMED = 10


class StepTimer(TrainerCallback):
    """Seconds between the end of step `UNTIMED` and the end of training, the GPU's work done."""

    def __init__(self) -> None:
        self.start = self.stop = 0.0

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step in (UNTIMED, args.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.start, self.stop = self.stop, time.perf_counter()


class Setting:
    """A run's alignment mix and a fresh model for each measurement."""

    def __init__(self, run: Path, *, backbone: str) -> None:
        self.dataset = Dataset.load(run / "dataset")
        self.trie = Trie.load(run / "sids" / "trie.safetensors")
        self.backbone = backbone
        item_ids = [item.item_id for item in self.dataset.items]
        codes = read_sids(run / "sids" / "sids.parquet", item_ids).tolist()
        self.model, tokenizer = self.load()
        vocabulary = extend_vocabulary(self.model, tokenizer, level_sizes=self.trie.level_sizes)
        self.encoder = PromptEncoder(tokenizer, vocabulary=vocabulary, codes_NL=codes)
        self.mix = AlignmentMix(
            self.encoder,
            items=self.dataset.items,
            sequences=self.dataset.training_sequences(),
            replies=[],
            sizes=MixSizes(captions=0.2, personas=0.05, max_history=50),
            epochs=4,
            seed=0,
        )

    def load(self):
        return load_backbone(self.backbone)

    def fresh(self):
        model, tokenizer = self.load()
        extend_vocabulary(model, tokenizer, level_sizes=self.trie.level_sizes)
        return model


def ours(setting: Setting, *, row_tokens: int, steps: int, folder: Path) -> float:
    """Tokens a second of `AlignTrainer`."""
    order = PackedOrder(setting.mix, tokens=row_tokens, seed=0)
    steps = min(steps, len(order))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = AlignTrainer(
        setting.fresh(),
        args=training_arguments(
            folder,
            num_rows=steps,
            accumulated=1,
            lr=1e-5,
            weight_decay=0.01,
            evaluations=0,
            seed=0,
            logs=folder,
            report_to="none",
        ),
        mix=setting.mix,
        order=order,
        sid_loss=SidLoss(setting.encoder.vocabulary, setting.trie.to(device), 0.1, 0.1),
        validation=Validation(
            setting.dataset.examples("valid"), setting.encoder, setting.trie, 20, 50
        ),
        compiled=True,
    )
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train()
    timed = [index for row in order.rows[UNTIMED:steps] for index in row]
    return sum(map(setting.mix.length, timed)) / (timer.stop - timer.start)


def trl_default(setting: Setting, *, steps: int, folder: Path) -> float:
    """Tokens a second of a plain SFTTrainer on the same examples."""
    order = [index for row in PackedOrder(setting.mix, tokens=8192, seed=0).rows for index in row]
    on_gpu = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        report_to="none",
        save_strategy="no",
        bf16=on_gpu,
        use_cpu=not on_gpu,
    )
    examples = [
        {"input_ids": setting.mix[index]["input_ids"]}
        for index in order[: steps * args.per_device_train_batch_size]
    ]
    trainer = SFTTrainer(
        setting.fresh(),
        args=args,
        train_dataset=Rows.from_list(examples),
        processing_class=setting.encoder.tokenizer,
    )
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train()
    share = (steps - UNTIMED) / steps  # TRL shuffles: the examples of a step are not known
    return share * sum(len(e["input_ids"]) for e in examples) / (timer.stop - timer.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder with dataset and sids")
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    setting = Setting(options.run, backbone=options.backbone)
    num_parameters = sum(p.numel() for p in setting.model.parameters())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((tera for card, tera in PEAK_TFLOPS.items() if card in name), float("nan")) * 1e12
    figures: dict[str, float] = {}

    def add(key: str, tokens_per_s: float) -> None:
        mfu = 6 * num_parameters * tokens_per_s / peak
        figures[f"train/tokens_per_s{key}"] = tokens_per_s
        figures[f"train/mfu{key}"] = mfu
        print(f"{key or 'best'}: {tokens_per_s:,.0f} tokens/s, MFU {mfu:.3f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for row in options.rows:
            speed = ours(setting, row_tokens=row, steps=options.steps, folder=Path(folder) / "ours")
            add(f"/row_{row}", speed)
        default = trl_default(setting, steps=options.steps, folder=Path(folder) / "trl")
    add("", max(figures[f"train/tokens_per_s/row_{row}"] for row in options.rows))
    add("_trl_default", default)
    if options.json:
        record(
            options.json,
            name="training speed",
            command=shlex.join(["python", *sys.argv]),
            seed=0,
            figures=figures,
            data_sha256=fingerprint(options.run / "dataset"),
        )


if __name__ == "__main__":
    main()
