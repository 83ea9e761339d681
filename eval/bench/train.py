"""Training speed of alignment beside TRL's default, on one GPU, in the same run.

    python eval/bench/train.py runs/beauty [--json eval/results/train/NAME.json]

All weights of SmolLM2-135M train on the same examples of the run's alignment mix: by `AlignTrainer`
(packed rows, compiled blocks, losses where they are wanted) on rows of several lengths, with our
attention and with PyTorch's for documents of any length, and by an `SFTTrainer` with TRL's defaults
(8 padded sequences a step, gradient checkpointing, full logits).

Tokens are counted without padding. MFU is 6 · N · tokens/s over the card's dense bf16 peak, N being
all parameters, embedding included once. Steps before the tenth are not timed: kernels compile then.
After the timed steps a few more say which kernels a step's time goes to:

    train/tokens_per_s, train/mfu                 the fastest row
    train/tokens_per_s/row_ROW, train/mfu/row_ROW
    train/step_ms/row_ROW                         a timed step
    train/kernel_ms/row_ROW/GROUP                 GPU time a step, by `GROUPS`
    train/idle_ms/row_ROW                         a step's time in which no kernel runs
    train/…_varlen/row_ROW                        the same with PyTorch's attention
    train/tokens_per_s_trl_default, train/mfu_trl_default

What matters most is measured first, and nothing is begun after `--seconds`. What needs more memory
than the card has is left out; rows of 131,072 tokens keep 67 GB of activations. The kernels that
take longest are listed by name on stderr.
"""

import argparse
import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset as Rows
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from whyrec.backbone import fused_projections, packed_attention
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
UNTIMED, PROFILED, LISTED = 10, 3, 25
GROUPS = {  # by what is in a kernel's name; the first that fits
    "attention": ("flash", "forward_kernel", "gradient_kernel"),
    "matmul": ("gemm", "nvjet", "cutlass", "splitk", "aten::mm"),
    "optimizer": ("multi_tensor", "adam"),
    "text_loss": ("text_kernel",),
    "sid_loss": ("legal_",),
    "compiled": ("triton",),
    "copies": ("memcpy", "memset", "copy", "fill"),
    "other": ("",),
}


class StepTimer(TrainerCallback):
    """Times the steps after `UNTIMED`, the GPU's work done, and looks into those after `last`.

    Attributes:
        seconds: of the timed steps.
        step_ms: a timed step's mean.
        kernel_ms: by group, GPU time a step.
    """

    def __init__(self, last: int) -> None:
        self.last, self.seconds = last, 0.0
        self.kernel_ms = dict.fromkeys(GROUPS, 0.0)
        self.on_gpu = torch.cuda.is_available()
        self.profile = profile(
            activities=[ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU]
        )

    @property
    def step_ms(self) -> float:
        return self.seconds / (self.last - UNTIMED) * 1e3

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step not in (UNTIMED, self.last, self.last + PROFILED):
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        if state.global_step == UNTIMED:
            self.seconds -= time.perf_counter()
        elif state.global_step == self.last:
            self.seconds += time.perf_counter()
            if args.max_steps > self.last:
                self.profile.start()
        else:
            self.profile.stop()
            self._sum_up()

    def _sum_up(self) -> None:
        by_name: dict[str, float] = {}
        for event in self.profile.key_averages():
            # Neither spans around kernels, which are counted themselves, nor the host's own calls.
            if event.is_user_annotation or (event.device_type == DeviceType.CUDA) != self.on_gpu:
                continue
            micro = event.self_device_time_total if self.on_gpu else event.self_cpu_time_total
            by_name[event.key] = by_name.get(event.key, 0.0) + micro / 1e3 / PROFILED
        for name, ms in by_name.items():
            fits = (g for g, parts in GROUPS.items() if any(p in name.lower() for p in parts))
            self.kernel_ms[next(fits)] += ms
        for name in sorted(by_name, key=by_name.__getitem__, reverse=True)[:LISTED]:
            print(f"{by_name[name]:9.3f} ms  {name[:150]}", file=sys.stderr, flush=True)


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


def ours(setting: Setting, *, row_tokens: int, steps: int, folder: Path) -> tuple[float, StepTimer]:
    """Tokens a second of `AlignTrainer`, and where the time of its steps went."""
    order = PackedOrder(setting.mix, tokens=row_tokens, seed=0)
    last = min(steps, len(order) - PROFILED)
    assert last > UNTIMED, f"the mix has {len(order)} rows of {row_tokens} tokens: too few to time"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = training_arguments(
        folder,
        num_rows=last + PROFILED,
        accumulated=1,
        lr=1e-5,
        weight_decay=0.01,
        evaluations=0,
        seed=0,
        logs=folder,
        report_to="none",
    )
    # A log waits for the GPU. A training's are dozens of steps apart; here it would be each sixth.
    args.logging_strategy = "no"
    trainer = AlignTrainer(
        setting.fresh(),
        args=args,
        mix=setting.mix,
        order=order,
        sid_loss=SidLoss(setting.encoder.vocabulary, setting.trie.to(device), 0.1, 0.1),
        validation=Validation(
            setting.dataset.examples("valid"), setting.encoder, setting.trie, 20, 50
        ),
        compiled=True,
    )
    timer = StepTimer(last)
    trainer.add_callback(timer)
    trainer.train()
    timed = [index for row in order.rows[UNTIMED:last] for index in row]
    tokens = sum(len(setting.mix[index]["input_ids"]) for index in timed)
    return tokens / timer.seconds, timer


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
    timer = StepTimer(steps)
    trainer.add_callback(timer)
    trainer.train()
    share = (steps - UNTIMED) / steps  # TRL shuffles: the examples of a step are not known
    return share * sum(len(e["input_ids"]) for e in examples) / timer.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder with dataset and sids")
    rows = parser.add_argument("--rows", type=int, nargs="+", default=[131072, 65536, 32768, 8192])
    rows.help = "tokens a row, the most important first (default: 131072 65536 32768 8192)"
    parser.add_argument("--steps", type=int, default=30, help=f"timed from {UNTIMED} on")
    parser.add_argument("--seconds", type=float, default=80, help="nothing is begun after")
    parser.add_argument("--without-varlen", action="store_true", help="our attention alone")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    start = time.perf_counter()
    setting = Setting(options.run, backbone=options.backbone)
    num_parameters = sum(p.numel() for p in setting.model.parameters())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((tera for card, tera in PEAK_TFLOPS.items() if card in name), 0.0) * 1e12
    figures: dict[str, float] = {}

    def add(key: str, tokens_per_s: float, kernel_ms: dict[str, float]) -> None:
        figures[f"train/tokens_per_s{key}"] = tokens_per_s
        if peak:
            figures[f"train/mfu{key}"] = 6 * num_parameters * tokens_per_s / peak
        figures.update({f"train/kernel_ms{key}/{group}": ms for group, ms in kernel_ms.items()})
        groups = ", ".join(f"{group} {ms:.1f}" for group, ms in kernel_ms.items())
        print(
            f"[{time.perf_counter() - start:.0f} s] {key or 'best'}: {tokens_per_s:,.0f} tokens/s, "
            f"MFU {figures.get(f'train/mfu{key}', 0):.3f}; ms a step: {groups}",
            flush=True,
        )

    def add_row(row: int, *, folder: Path, key: str) -> None:
        print(f"{key}/row_{row}, its kernels that take longest:", file=sys.stderr, flush=True)
        speed, timer = ours(setting, row_tokens=row, steps=options.steps, folder=folder)
        figures[f"train/step_ms{key}/row_{row}"] = timer.step_ms
        if timer.on_gpu:
            idle_ms = timer.step_ms - sum(timer.kernel_ms.values())
            figures[f"train/idle_ms{key}/row_{row}"] = idle_ms
            print(f"step {timer.step_ms:.1f} ms, of which idle {idle_ms:.1f}", flush=True)
        add(f"{key}/row_{row}", speed, timer.kernel_ms)

    def add_varlen(row: int, *, folder: Path) -> None:
        def never(*_: object, **__: object) -> bool:
            return False

        with (
            patch.object(packed_attention, "is_supported", never),
            patch.object(fused_projections, "is_supported", never),
        ):
            add_row(row, folder=folder, key="_varlen")

    def add_default(*, folder: Path) -> None:
        add("_trl_default", trl_default(setting, steps=options.steps, folder=folder), {})

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        parts: list[tuple[Callable[..., None], dict]] = [
            *((add_row, {"row": row, "key": ""}) for row in options.rows),
            (add_default, {}),
            *((add_varlen, {"row": row}) for row in options.rows if not options.without_varlen),
        ]
        for number, (measure, settings) in enumerate(parts):
            if number and time.perf_counter() - start > options.seconds:
                print(f"no time left for {measure.__name__} {settings}", flush=True)
                continue
            try:
                measure(**settings, folder=here / str(number))
            except torch.cuda.OutOfMemoryError:
                print(f"too little memory for {measure.__name__} {settings}", flush=True)
            gc.collect()  # a trainer and its callbacks hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    speeds = {key: value for key, value in figures.items() if "/tokens_per_s/row_" in key}
    add("", max(speeds.values()), {})
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
