"""The table of quantisers, by the names that a recipe uses, and what they have in common.

A new quantiser is one class with these methods and a line in `QUANTIZERS`.

    quantizer = load_quantizer(run / "sids" / "codebooks.safetensors")
    codes_NL = quantizer.encode(vectors_ND)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from whyrec.sid.kmeans import BalancedKMeans, ResidualKMeans
from whyrec.sid.rqvae import RQVAE


class Quantizer(Protocol):
    """Vectors → L codes each: a latent is approximated by the sum of one code vector a level."""

    level_sizes: tuple[int, ...]
    codebooks: list[Tensor]  # L of [K_l, D], on the CPU

    def __init__(self, *, level_sizes: Sequence[int], iterations: int = ...) -> None: ...
    def fit(self, vectors_ND: Tensor, *, seed: int = 0) -> Self: ...
    def latents(self, vectors_ND: Tensor) -> Tensor: ...
    def choose(self, residual_ND: Tensor, *, level: int) -> Tensor: ...
    def encode(self, vectors_ND: Tensor) -> Tensor: ...
    def decode(self, codes_NL: Tensor) -> Tensor: ...
    def save(self, path: Path) -> None: ...


QUANTIZERS: dict[str, type[ResidualKMeans] | type[BalancedKMeans] | type[RQVAE]] = {
    "residual-kmeans": ResidualKMeans,
    "balanced-kmeans": BalancedKMeans,
    "rqvae": RQVAE,
}


def load_quantizer(path: Path) -> Quantizer:
    """Read a quantiser from `codebooks.safetensors`, whichever class wrote it.

    Raises:
        ValueError: when the file is not one that a quantiser's `save` wrote.
    """
    classes = {cls.__name__: cls for cls in QUANTIZERS.values()}
    try:
        with safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get("class", "")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read codebooks from {path}: {error}") from error
    if name not in classes:
        raise ValueError(
            f"{path} names no known quantizer (it says {name!r}); make it with `whyrec index`"
        )
    return classes[name].load(path)
