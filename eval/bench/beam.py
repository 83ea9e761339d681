"""Our constrained beam beside `generate(num_beams=…, prefix_allowed_tokens_fn=…)`, on the CPU.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python eval/bench/beam.py \\
        --json eval/results/beam/cpu.json

SmolLM2-135M in float32 with 4 levels x 256 new tokens, random prompts of 100 tokens, width 20, a
catalogue of 12,000 random SIDs: for 1 user and for a batch of 32, the time from prompts to ranked
items. `generate` gets the trie as a dictionary from prefixes to ready tensors of token ids.

Two catalogues are searched. `open` spreads its items so that nearly every beam has several legal
codes at every level: no forced code saves us a forward pass, and the speedup is measured there.
`sparse` draws SIDs from all 256^4, so that most beams are forced after two codes, as they nearly
are with learned SIDs; `ours_sparse_s` is our time there, that of `generate` hardly changes.

The two take turns, in pairs, and `speedup_vs_generate` is the ratio of the medians; the ratio of
every pair stands beside it. `…_cpu_s` are seconds of processor time of all threads, which other
programs on the machine disturb less than the time on the clock.

Before that the answers are compared. With `renormalize_logits=True`, `generate` scores as we do,
and must find the same items with the same scores: `check/same_items` is the share of equal items
rank by rank (near ties may swap), `check/score_error` the greatest difference of a score. As it is
timed, it adds up log-probabilities over the whole vocabulary; `raw_items_shared` is the share of
its items that are among ours, `raw_best_gap` our best item's raw log-probability less the raw
log-probability of its best item, the mean over users.
"""

import argparse
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from whyrec.backbone.extend import extend_vocabulary
from whyrec.backbone.load import PACKAGED, load_backbone
from whyrec.decode.beam import BeamDecoder, Beams
from whyrec.evaluation.results import record
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary

LEVEL_SIZES = (256, 256, 256, 256)
FAN_OUTS = {"open": (32, 12, 8, 6), "sparse": (256, 256, 256, 256)}
ITEMS, PROMPT_TOKENS, WIDTH = 12_000, 100, 20
CHECKED_USERS = 4


def random_catalogue(fan_outs: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Distinct SIDs that use `fan_outs` random codes of each level: int64 [ITEMS, 4]."""
    cells_N = generator.choice(int(np.prod(fan_outs)), size=ITEMS, replace=False)
    columns = np.unravel_index(cells_N, fan_outs)
    names = [generator.permutation(size) for size in LEVEL_SIZES]
    return torch.from_numpy(np.stack([n[c] for n, c in zip(names, columns, strict=True)], axis=1))


class Generate:
    """Beam search by `transformers` over the same catalogue."""

    def __init__(
        self, model: PreTrainedModel, *, vocabulary: SidVocabulary, codes_NL: Tensor
    ) -> None:
        self.model = model
        tokens = [tuple(vocabulary.encode(codes)) for codes in codes_NL.tolist()]
        self.item_of = {sid: item for item, sid in enumerate(tokens)}
        following: dict[tuple[int, ...], set[int]] = {}
        for sid in tokens:
            for level, token in enumerate(sid):
                following.setdefault(sid[:level], set()).add(token)
        self.allowed = {prefix: torch.tensor(sorted(ids)) for prefix, ids in following.items()}

    def __call__(self, ids_UP: Tensor, *, renormalize: bool = False) -> Beams:
        num_users, length = ids_UP.shape

        def allowed(_batch: int, ids: Tensor) -> Tensor:
            return self.allowed[tuple(ids[length:].tolist())]

        output = self.model.generate(  # type: ignore[operator]
            ids_UP,
            attention_mask=torch.ones_like(ids_UP),
            num_beams=WIDTH,
            num_return_sequences=WIDTH,
            prefix_allowed_tokens_fn=allowed,
            max_new_tokens=len(LEVEL_SIZES),
            do_sample=False,
            length_penalty=0.0,
            renormalize_logits=renormalize,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        found = [self.item_of[tuple(sid)] for sid in output.sequences[:, length:].tolist()]
        shape = (num_users, WIDTH)
        return Beams(torch.tensor(found).view(shape), output.sequences_scores.view(shape))


@torch.no_grad()
def raw_log_probs(
    model: PreTrainedModel, ids_UP: Tensor, items_U: Tensor, *, sids_NL: Tensor
) -> Tensor:
    """Log-probability of each user's item over the whole vocabulary: float32 [U]."""
    sids_UL = sids_NL[items_U]
    ids_UT = torch.cat([ids_UP, sids_UL], dim=1)
    num_codes = sids_UL.shape[1]
    logits_ULV = model(input_ids=ids_UT, logits_to_keep=num_codes + 1).logits[:, :-1]
    return logits_ULV.log_softmax(-1).gather(2, sids_UL[..., None]).sum((1, 2))


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("eval/results/beam/cpu.json"))
    parser.add_argument("--users", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument(
        "--repeats", type=int, nargs="+", default=[3, 2], help="pairs by batch size"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)

    model, tokenizer = load_backbone(PACKAGED)
    words = len(tokenizer)
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVEL_SIZES, seed=options.seed)
    model.eval()
    catalogues = {name: random_catalogue(fans, generator) for name, fans in FAN_OUTS.items()}
    decoders = {
        name: BeamDecoder(
            model, vocabulary=vocabulary, trie=Trie.build(codes_NL, level_sizes=LEVEL_SIZES)
        )
        for name, codes_NL in catalogues.items()
    }
    generate = Generate(model, vocabulary=vocabulary, codes_NL=catalogues["open"])
    sids_NL = catalogues["open"] + torch.tensor(vocabulary.offsets)

    def prompts_of(num_users: int) -> Tensor:
        ids_UP = torch.from_numpy(generator.integers(100, words, size=(num_users, PROMPT_TOKENS)))
        ids_UP[:, -1] = vocabulary.begin
        return ids_UP

    def ours(ids_UP: Tensor, name: str = "open") -> Beams:
        decoder = decoders[name]
        return decoder.search(decoder.prefill(ids_UP.tolist(), width=WIDTH), width=WIDTH)

    figures: dict[str, float] = {"beam_cpu/threads": torch.get_num_threads()}
    ids_UP = prompts_of(CHECKED_USERS)
    expected, found = generate(ids_UP, renormalize=True), ours(ids_UP)
    same_UW = expected.items_UW == found.items_UW
    error = float((expected.scores_UW - found.scores_UW).abs().max())
    figures["beam_cpu/check/same_items"] = float(same_UW.float().mean())
    figures["beam_cpu/check/score_error"] = error
    assert error < 1e-3, f"scores differ by up to {error}"

    for num_users, repeats in zip(options.users, options.repeats, strict=True):
        ids_UP = prompts_of(num_users)
        key = f"beam_cpu/{num_users}"
        for name in decoders:
            ours(ids_UP, name)  # warms up
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "generate": [], "sparse": []}
        results: dict[str, Beams] = {}
        for turn in tqdm(range(repeats), desc=f"{num_users} users", unit="pair"):
            times["ours"].append(timed(lambda: results.update(ours=ours(ids_UP))))  # noqa: B023
            times["generate"].append(
                timed(lambda: results.update(generate=generate(ids_UP)))  # noqa: B023
            )
            times["sparse"].append(timed(lambda: ours(ids_UP, "sparse")))  # noqa: B023
            ratio = times["generate"][-1][0] / times["ours"][-1][0]
            figures[f"{key}/pair_{turn}/speedup_vs_generate"] = ratio
        for name, stem in (("ours", "ours"), ("generate", "generate"), ("sparse", "ours_sparse")):
            wall, cpu = np.median(np.array(times[name]), axis=0)
            figures[f"{key}/{stem}_s"] = float(wall)
            figures[f"{key}/{stem}_cpu_s"] = float(cpu)
        for suffix in ("", "_cpu"):
            time_s, theirs_s = (
                figures[f"{key}/ours{suffix}_s"],
                figures[f"{key}/generate{suffix}_s"],
            )
            figures[f"{key}/speedup{suffix}_vs_generate"] = theirs_s / time_s
        mine_UW, theirs_UW = results["ours"].items_UW, results["generate"].items_UW
        shared_UW = (theirs_UW[..., None] == mine_UW[:, None]).any(-1)
        figures[f"{key}/raw_items_shared"] = float(shared_UW.float().mean())
        best = [
            raw_log_probs(model, ids_UP, items_UW[:, 0], sids_NL=sids_NL)
            for items_UW in (mine_UW, theirs_UW)
        ]
        figures[f"{key}/raw_best_gap"] = float((best[0] - best[1]).mean())
        figures[f"{key}/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    figures = {key: round(float(value), 6) for key, value in sorted(figures.items())}
    for key, value in figures.items():
        print(f"{key:44s} {value:.6g}")
    record(
        options.json,
        name="beam",
        command=shlex.join(["python", *sys.argv]),
        seed=options.seed,
        figures=figures,
    )


if __name__ == "__main__":
    main()
