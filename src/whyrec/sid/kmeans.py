"""Residual k-means: level by level, cluster what the levels before have left unexplained.

`ResidualKMeans` is plain residual quantisation (Juang and Gray 1982; OneRec, arXiv 2502.18965, uses
it for SIDs): a codebook of K_l means per level, an item's code is the nearest mean, its residual
goes to the next level. `BalancedKMeans` asks in addition that the clusters of each level differ in
size by one item at most, so that no code is wasted and fewer items collide.

    >>> vectors_ND = torch.randn(1000, 16)
    >>> quantizer = ResidualKMeans(level_sizes=(8, 8, 8)).fit(vectors_ND, seed=0)
    >>> quantizer.encode(vectors_ND).shape
    torch.Size([1000, 3])

All of it runs on the device that the vectors are on, in chunks, and gives the same result for the
same seed on the same machine.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from whyrec.sid.capacity import place, rank_in_cell

_CHUNK_ELEMENTS = 1 << 24  # of a distance matrix: 64 MiB
_ROUNDING = 1e-6  # squared distance of equal vectors, in units of their squared length
_INIT_SAMPLE = 8_192  # k-means++ sees at most so many points (or 32 a code)
_FIT_SAMPLE = 256  # codebooks see at most so many points a code
_CACHED_ELEMENTS = 1 << 27  # a distance matrix of up to 512 MiB is kept rather than remade


def squared_distances(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Squared Euclidean distances [N, K]."""
    cross_NK = vectors_ND @ codebook_KD.T
    norm_N1 = vectors_ND.square().sum(1, keepdim=True)
    return (norm_N1 + codebook_KD.square().sum(1) - 2 * cross_NK).clamp_min_(0)


def nearest_codes(vectors_ND: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code of each vector, int64 [N], and the squared distance to it [N]."""
    codes, distances = [], []
    for rows in chunk_rows(len(vectors_ND), len(codebook_KD)):
        distance_B, code_B = squared_distances(vectors_ND[rows], codebook_KD).min(1)
        codes.append(code_B)
        distances.append(distance_B)
    return torch.cat(codes), torch.cat(distances)


def chunk_rows(num_rows: int, width: int) -> Iterator[slice]:
    """Slices of rows such that [rows, width] stays small; one empty slice for no rows."""
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, max(1, num_rows), step):
        yield slice(start, start + step)


def kmeans(
    vectors_ND: Tensor, num_codes: int, *, iterations: int, generator: torch.Generator
) -> Tensor:
    """Lloyd's k-means: codebook_KD.

    The start is k-means++ seeds, then the means of two balanced assignments to them. Without these,
    residuals of high dimension ruin the codebook: seeds are single points, far from all others, so
    the first few means that average many points draw in everything and most codes keep one point
    (ML-100K, third level of 64 codes: entropy 0.12 against 1.00, error 0.58 against 0.53; the same
    happens to scikit-learn's KMeans).

    A code that loses all its points is moved to the point worst explained. With fewer distinct
    points than codes, the codes left over repeat others, and the nearest code is the first of them.
    """
    noise = _ROUNDING * vectors_ND.square().sum(1).max()
    codebook_KD = _kmeans_plus_plus(vectors_ND, num_codes, generator)
    if nearest_codes(vectors_ND, codebook_KD)[1].max() <= noise:
        return codebook_KD  # every distinct point has a code
    for _ in range(2):
        code_N = balanced_codes(vectors_ND, codebook_KD)
        means_KD, count_K = means_by_code(vectors_ND, code_N, num_codes)
        codebook_KD = torch.where(count_K[:, None] > 0, means_KD, codebook_KD)
    last_error = float("inf")
    for _ in range(iterations):
        code_N, distance_N = nearest_codes(vectors_ND, codebook_KD)
        means_KD, count_K = means_by_code(vectors_ND, code_N, num_codes)
        codebook_KD = torch.where(count_K[:, None] > 0, means_KD, codebook_KD)
        empty = torch.nonzero(count_K == 0).flatten()
        worst = distance_N.topk(min(len(empty), len(vectors_ND))).indices
        worst = worst[distance_N[worst] > noise]
        codebook_KD[empty[: len(worst)]] = vectors_ND[worst]
        error = distance_N.sum().item()
        if not len(worst) and error >= last_error * (1 - 1e-4):
            break
        last_error = error
    return codebook_KD


def means_by_code(vectors_ND: Tensor, code_N: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Mean vector [K, D] (zeros where empty) and count [K] of every code's points."""
    sums_KD = vectors_ND.new_zeros(num_codes, vectors_ND.shape[1])
    for rows in chunk_rows(len(vectors_ND), num_codes):
        # a product with one-hot rows: index_add_ would sum in any order on a GPU
        one_hot_BK = torch.nn.functional.one_hot(code_N[rows], num_codes).to(vectors_ND.dtype)
        sums_KD += one_hot_BK.T @ vectors_ND[rows]
    count_K = torch.bincount(code_N, minlength=num_codes)
    return sums_KD / count_K.clamp_min(1)[:, None], count_K


def _kmeans_plus_plus(vectors_ND: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Seeds drawn with probability in proportion to the squared distance to the seeds before."""
    size = max(_INIT_SAMPLE, 32 * num_codes)
    if len(vectors_ND) > size:
        sample = torch.randperm(len(vectors_ND), generator=generator)[:size]
        vectors_ND = vectors_ND[sample.to(vectors_ND.device)]
    draws_K = torch.rand(num_codes, generator=generator).tolist()
    norm_N = vectors_ND.square().sum(1)
    noise = _ROUNDING * norm_N.max()
    distance_N = torch.ones_like(norm_N)
    chosen: list[Tensor] = []
    for draw in draws_K:
        cumulative_N = distance_N.double().cumsum(0)
        point = torch.searchsorted(cumulative_N, draw * cumulative_N[-1], right=True)
        point = point.clamp_max(len(vectors_ND) - 1)
        to_point_N = norm_N + norm_N[point] - 2 * (vectors_ND @ vectors_ND[point])
        to_point_N = torch.where(to_point_N > noise, to_point_N, 0.0)
        distance_N = torch.minimum(distance_N, to_point_N) if chosen else to_point_N
        chosen.append(point)
    return vectors_ND[torch.stack(chosen)]


class ResidualKMeans:
    """Residual quantisation with k-means at every level.

    Args:
        level_sizes: number of codes of each level, L of them; they may differ.
        iterations: the most Lloyd steps a level.

    Attributes:
        codebooks: after `fit`, L tensors [K_l, D], float32.
    """

    def __init__(self, *, level_sizes: Sequence[int], iterations: int = 50) -> None:
        self.level_sizes = tuple(int(size) for size in level_sizes)
        self.iterations = iterations
        self.codebooks: list[Tensor] = []

    def fit(self, vectors_ND: Tensor, *, seed: int = 0) -> Self:
        """Learn the codebooks, on the vectors' device; they are kept on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        size = _FIT_SAMPLE * max(256, *self.level_sizes)
        rows = torch.randperm(len(vectors_ND), generator=generator)[:size].sort().values
        residual_ND = vectors_ND[rows.to(vectors_ND.device)].float()
        self.codebooks = []
        for level, size in enumerate(tqdm(self.level_sizes, desc="k-means", unit="level")):
            codebook_KD = self._fit_level(residual_ND, size, generator)
            self.codebooks.append(codebook_KD.cpu())
            if level + 1 < len(self.level_sizes):
                residual_ND = residual_ND - codebook_KD[self.choose(residual_ND, level=level)]
        return self

    def latents(self, vectors_ND: Tensor) -> Tensor:
        """The space in which codes are summed: here that of the vectors itself, [N, D]."""
        return vectors_ND.float()

    def choose(self, residual_ND: Tensor, *, level: int) -> Tensor:
        """The code that each item of a whole catalogue should have at `level`, int64 [N]."""
        return nearest_codes(residual_ND, self.codebooks[level].to(residual_ND.device))[0]

    def encode(self, vectors_ND: Tensor) -> Tensor:
        """Greedy nearest codes, level by level: codes_NL int64. Several items may share an SID."""
        return encode_greedily(self.latents(vectors_ND), self.codebooks)

    def decode(self, codes_NL: Tensor) -> Tensor:
        """Vectors rebuilt from codes (all levels or the first few): the sum of their means."""
        return sum_codes(codes_NL, self.codebooks)

    def save(self, path: Path) -> None:
        """Write the codebooks as safetensors, with the class's name in the metadata."""
        tensors = {f"codebook_{i}": c.contiguous() for i, c in enumerate(self.codebooks)}
        save_file(tensors, path, metadata=_metadata(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; use `quantizers.load_quantizer` when the class is not known."""
        with safe_open(path, framework="pt") as file:
            quantizer = cls(**json.loads(file.metadata()["settings"]))
            levels = range(len(quantizer.level_sizes))
            quantizer.codebooks = [file.get_tensor(f"codebook_{i}") for i in levels]
        return quantizer

    def _fit_level(self, residual_ND: Tensor, size: int, generator: torch.Generator) -> Tensor:
        return kmeans(residual_ND, size, iterations=self.iterations, generator=generator)


class BalancedKMeans(ResidualKMeans):
    """Residual k-means whose clusters, at each level, differ in size by one item at most.

    Cheap in memory: beside the vectors it keeps one price a code. `choose` balances a whole
    catalogue; `encode`, which may see one new item alone, takes the nearest code.
    """

    def choose(self, residual_ND: Tensor, *, level: int) -> Tensor:
        return balanced_codes(residual_ND, self.codebooks[level].to(residual_ND.device))

    def _fit_level(self, residual_ND: Tensor, size: int, generator: torch.Generator) -> Tensor:
        codebook_KD = super()._fit_level(residual_ND, size, generator)
        for _ in range(min(10, self.iterations)):
            code_N = balanced_codes(residual_ND, codebook_KD)
            means_KD, count_K = means_by_code(residual_ND, code_N, size)
            moved = torch.where(count_K[:, None] > 0, means_KD, codebook_KD)
            step = (moved - codebook_KD).square().sum() / codebook_KD.square().sum().clamp_min(1e-9)
            codebook_KD = moved
            if step < 1e-4:
                break
        return codebook_KD


def balanced_codes(vectors_ND: Tensor, codebook_KD: Tensor, *, rounds: int = 20) -> Tensor:
    """Codes int64 [N] of small total distance, every code used N // K or N // K + 1 times.

    This is optimal transport from points to codes. Its dual has one price a code; the prices of
    the smoothed problem (temperature falling from round to round) come from Sinkhorn steps, each
    one pass over the points in chunks (Cuturi 2013; Genevay et al. 2016 for the semi-dual). Items
    choose by distance + price, and the few still too many in a cell move to the next that has room.
    """
    num_points, num_codes = len(vectors_ND), len(codebook_KD)
    chunks = [vectors_ND[rows] for rows in chunk_rows(num_points, num_codes)]
    cached = None
    if num_points * num_codes <= _CACHED_ELEMENTS:
        cached = [squared_distances(chunk_BD, codebook_KD) for chunk_BD in chunks]

    def distances() -> Iterable[Tensor]:
        return cached or (squared_distances(chunk_BD, codebook_KD) for chunk_BD in chunks)

    base, extra = divmod(num_points, num_codes)
    nearest = sum(distance_BK.min(1).values.sum().item() for distance_BK in distances())
    spread = max(nearest / max(1, num_points), 1e-9)
    price_K = vectors_ND.new_zeros(num_codes)
    for step in range(rounds):
        temperature = spread * 0.5 * 0.02 ** (step / max(1, rounds - 1))
        load_K = torch.zeros_like(price_K)
        for distance_BK in distances():
            load_K += torch.softmax((distance_BK + price_K) / -temperature, dim=1).sum(0)
        target = num_points / num_codes
        price_K = price_K + temperature * torch.log(load_K.clamp_min(1e-3 * target) / target)
        price_K = price_K - price_K.mean()

    codes, costs = [], []
    for distance_BK in distances():
        cost_B, code_B = (distance_BK + price_K).min(1)
        codes.append(code_B)
        costs.append(cost_B)
    code_N, cost_N = torch.cat(codes).cpu().numpy(), torch.cat(costs).cpu().numpy()
    wanted_K = np.bincount(code_N, minlength=num_codes)
    capacity_K = np.full(num_codes, base)
    capacity_K[np.argsort(-wanted_K, kind="stable")[:extra]] += 1
    spilled = np.flatnonzero(rank_in_cell(code_N, cost_N) >= capacity_K[code_N])
    if len(spilled):
        free_K = capacity_K - np.minimum(wanted_K, capacity_K)
        rows_spilled = torch.from_numpy(spilled).to(vectors_ND.device)
        cost_nK = squared_distances(vectors_ND[rows_spilled], codebook_KD) + price_K
        code_N[spilled] = place(cost_nK.cpu().numpy(), free_K)
    return torch.from_numpy(code_N).to(vectors_ND.device)


def encode_greedily(latent_ND: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Nearest code at each level of what the levels before left: codes_NL int64."""
    residual_ND, codes = latent_ND, []
    for codebook_KD in codebooks:
        codebook_KD = codebook_KD.to(residual_ND.device)
        code_N, _ = nearest_codes(residual_ND, codebook_KD)
        residual_ND = residual_ND - codebook_KD[code_N]
        codes.append(code_N)
    return torch.stack(codes, dim=1)


def sum_codes(codes_NL: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """The sum of the code vectors of the levels that `codes_NL` has, [N, D]."""
    parts = [
        codebooks[level].to(codes_NL.device)[codes_NL[:, level]]
        for level in range(codes_NL.shape[1])
    ]
    return torch.stack(parts).sum(0)


def _metadata(quantizer: ResidualKMeans) -> dict[str, str]:
    settings = {"level_sizes": quantizer.level_sizes, "iterations": quantizer.iterations}
    return {"class": type(quantizer).__name__, "settings": json.dumps(settings)}
