"""How good a set of SIDs is, before any language model has seen them.

collision_rate            share of items whose first L - 1 codes another item has too
codes_used                by level: codes that at least one item has
entropy                   by level: entropy of the codes' use / log(level size); 1 = all alike
neighbours_kept           share of an item's 10 nearest by vector that are also among its 10
                          nearest by reconstruction from codes, mean over a sample
reconstruction_error      sum of |vector - reconstruction|² / sum of |vector - mean vector|²
items_per_cell            quantiles of the items that share L - 1 codes, over cells in use
spilled                   items whose code at some level is not the nearest to their residual
                          (collisions resolved at the last level, full cells, balancing)
"""

import math

import numpy as np
import torch
from torch import Tensor

from whyrec.sid.kmeans import nearest_codes
from whyrec.sid.quantizers import Quantizer

NEIGHBOURS = 10


def sid_report(
    vectors_ND: Tensor, codes_NL: Tensor, quantizer: Quantizer, *, sample: int = 1000, seed: int = 0
) -> dict[str, object]:
    """The figures above as plain values.

    Args:
        vectors_ND: item vectors.
        codes_NL: their SIDs.
        quantizer: the codebooks that the SIDs refer to.
        sample: how many items the neighbours are looked up for.
        seed: of the sample.
    """
    codes = codes_NL.cpu().numpy()
    num_items, num_levels = codes.shape
    _, per_cell = np.unique(codes[:, :-1], axis=0, return_counts=True)
    colliding = int(per_cell[per_cell > 1].sum())
    rebuilt_ND = quantizer.decode(codes_NL.to(vectors_ND.device))
    spread = (vectors_ND - vectors_ND.mean(0)).square().sum().item()
    error = (vectors_ND - rebuilt_ND).square().sum().item()
    moved_NL = _moved(quantizer.latents(vectors_ND), codes_NL.to(vectors_ND.device), quantizer)
    quantiles = np.quantile(per_cell, [0.5, 0.9, 0.99, 1.0], method="nearest")
    return {
        "items": num_items,
        "level_sizes": list(quantizer.level_sizes),
        "sids": math.prod(quantizer.level_sizes),
        "collision_rate": round(colliding / num_items, 4),
        "codes_used": [len(np.unique(codes[:, level])) for level in range(num_levels)],
        "entropy": [
            round(code_entropy(codes[:, level], size), 4)
            for level, size in enumerate(quantizer.level_sizes)
        ],
        "neighbours_kept": round(_neighbours_kept(vectors_ND, rebuilt_ND, sample, seed), 4),
        "reconstruction_error": round(error / max(spread, 1e-12), 4),
        "items_per_cell": dict(zip(("p50", "p90", "p99", "max"), quantiles.tolist(), strict=True)),
        "spilled": int(moved_NL.any(1).sum()),
        "spilled_by_level": moved_NL.sum(0).tolist(),
    }


def summary_lines(report: dict) -> list[str]:
    """A report in a few lines for people."""
    sizes = " × ".join(str(size) for size in report["level_sizes"])
    used = " ".join(
        f"{used}/{size}"
        for used, size in zip(report["codes_used"], report["level_sizes"], strict=True)
    )
    entropy = " ".join(f"{value:.2f}" for value in report["entropy"])
    return [
        f"{report['items']:,} items in {report['sids']:,} SIDs ({sizes})",
        f"codes used {used}; entropy {entropy}",
        f"{report['collision_rate']:.1%} of the items share all codes but the last; "
        f"{report['spilled']:,} have a code that is not their nearest",
        f"{report['neighbours_kept']:.1%} of nearest neighbours kept; "
        f"{report['reconstruction_error']:.1%} of the variance left unexplained",
    ]


def code_entropy(code_N: np.ndarray, size: int) -> float:
    """Entropy of a level's codes / log(size); 1 where all are used alike."""
    share = np.bincount(code_N, minlength=size) / max(1, len(code_N))
    share = share[share > 0]
    return float(-(share * np.log(share)).sum() / math.log(size)) if size > 1 else 1.0


def _neighbours_kept(vectors_ND: Tensor, rebuilt_ND: Tensor, sample: int, seed: int) -> float:
    num_items = len(vectors_ND)
    count = min(NEIGHBOURS, num_items - 1)
    if count < 1:
        return 1.0
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(num_items, generator=generator)[:sample].to(vectors_ND.device)
    kept = 0
    for rows_B in rows.split(64):
        near = _nearest_others(vectors_ND, rows_B, count)
        near_rebuilt = _nearest_others(rebuilt_ND, rows_B, count)
        kept += int((near[:, :, None] == near_rebuilt[:, None, :]).sum())
    return kept / (len(rows) * count)


def _nearest_others(vectors_ND: Tensor, rows_B: Tensor, count: int) -> Tensor:
    distance_BN = torch.cdist(vectors_ND[rows_B], vectors_ND)
    distance_BN[torch.arange(len(rows_B), device=rows_B.device), rows_B] = math.inf
    return distance_BN.topk(count, dim=1, largest=False).indices


def _moved(residual_ND: Tensor, codes_NL: Tensor, quantizer: Quantizer) -> Tensor:
    """bool [N, L]: the code is farther from the residual than the nearest one is."""
    moved = []
    for level, codebook in enumerate(quantizer.codebooks):
        codebook_KD = codebook.to(residual_ND.device)
        nearest_N, _ = nearest_codes(residual_ND, codebook_KD)
        code_N = codes_NL[:, level]
        # codes that repeat one another are equally near
        same_N = (codebook_KD[nearest_N] == codebook_KD[code_N]).all(1)
        moved.append(~same_N & (nearest_N != code_N))
        residual_ND = residual_ND - codebook_KD[code_N]
    return torch.stack(moved, dim=1).cpu()
