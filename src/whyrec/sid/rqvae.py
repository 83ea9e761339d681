"""RQ-VAE: residual quantisation of a learned latent space (Lee et al. 2022; TIGER, 2305.05065).

An MLP encodes vectors to latents, one codebook a level quantises the residual of the level before,
an MLP decodes the sum of the chosen codes. Trained with the reconstruction error, straight through
the quantiser, plus a commitment term at each level. Codebooks start from residual k-means over the
latents of a briefly trained autoencoder, follow exponential moving averages of what they are
chosen for, and codes that nothing chooses any more restart at a residual of the current batch
(Razavi et al. 2019; Williams et al. 2020).

    >>> vectors_ND = torch.randn(1000, 16)
    >>> quantizer = RQVAE(level_sizes=(8, 8, 8), iterations=20).fit(vectors_ND, seed=0)
    >>> quantizer.encode(vectors_ND).shape
    torch.Size([1000, 3])
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from whyrec.sid.kmeans import (
    ResidualKMeans,
    encode_greedily,
    means_by_code,
    nearest_codes,
    sum_codes,
)

HIDDEN = 256
LEARNING_RATE = 1e-3
COMMITMENT = 0.25
DECAY = 0.99  # of the moving averages
DEAD = 0.05  # a code chosen less than so many times a step, on average, restarts
WARM_UP = 0.2  # share of the steps before the codebooks come in


class RQVAE:
    """Residual-quantised variational autoencoder.

    Args:
        level_sizes: number of codes of each level, L of them; they may differ.
        iterations: passes over the vectors.
        latent_dim: width of the latent space.
        batch_size: vectors a step.

    Attributes:
        codebooks: after `fit`, L tensors [K_l, latent_dim], float32.
    """

    def __init__(
        self,
        *,
        level_sizes: Sequence[int],
        iterations: int = 50,
        latent_dim: int = 64,
        batch_size: int = 128,
    ) -> None:
        self.level_sizes = tuple(int(size) for size in level_sizes)
        self.iterations = iterations
        self.latent_dim = latent_dim
        self.batch_size = batch_size
        self.codebooks: list[Tensor] = []
        self.encoder = nn.Sequential()
        self.decoder = nn.Sequential()

    def fit(self, vectors_ND: Tensor, *, seed: int = 0) -> Self:
        """Train on the vectors' device; networks and codebooks are kept on the CPU."""
        vectors_ND = vectors_ND.float()
        device = vectors_ND.device
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
            torch.manual_seed(seed)
            self._build(vectors_ND.shape[1])
        self.encoder.to(device)
        self.decoder.to(device)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        batches = -(-len(vectors_ND) // self.batch_size)
        steps = max(1, self.iterations * batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=LEARNING_RATE, total_steps=steps + 1, pct_start=0.1
        )
        codebooks: list[Tensor] = []
        usage: list[Tensor] = []
        order = torch.empty(0, dtype=torch.long)
        for step in tqdm(range(steps), desc="RQ-VAE", unit="step"):
            if step >= int(steps * WARM_UP) and not codebooks:
                codebooks = self._start_codebooks(vectors_ND, seed)
                usage = [torch.ones(len(c), device=device) for c in codebooks]
            if not len(order):
                order = torch.randperm(len(vectors_ND), generator=generator)
            rows, order = order[: self.batch_size], order[self.batch_size :]
            batch_BD = vectors_ND[rows.to(device)]
            latent_BD = self.encoder(batch_BD)
            passed_BD, commitment = latent_BD, torch.zeros((), device=device)
            if codebooks:
                quantised_BD, commitment = _quantise(latent_BD, codebooks, usage, generator)
                passed_BD = latent_BD + (quantised_BD - latent_BD).detach()
            error = (self.decoder(passed_BD) - batch_BD).square().sum(1).mean()
            loss = error + COMMITMENT * commitment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.codebooks = [c.cpu() for c in codebooks or self._start_codebooks(vectors_ND, seed)]
        self.encoder.cpu().requires_grad_(False)
        self.decoder.cpu().requires_grad_(False)
        return self

    @torch.no_grad()
    def latents(self, vectors_ND: Tensor) -> Tensor:
        """The space in which codes are summed, [N, latent_dim], on the vectors' device."""
        encoder = self.encoder.to(vectors_ND.device)
        parts = [encoder(chunk_BD) for chunk_BD in vectors_ND.float().split(65_536)]
        return torch.cat(parts)

    def choose(self, residual_ND: Tensor, *, level: int) -> Tensor:
        """The code that each item of a whole catalogue should have at `level`, int64 [N]."""
        return nearest_codes(residual_ND, self.codebooks[level].to(residual_ND.device))[0]

    def encode(self, vectors_ND: Tensor) -> Tensor:
        """Greedy nearest codes, level by level: codes_NL int64. Several items may share an SID."""
        return encode_greedily(self.latents(vectors_ND), self.codebooks)

    @torch.no_grad()
    def decode(self, codes_NL: Tensor) -> Tensor:
        """Vectors rebuilt from codes (all levels or the first few), in the space of the input."""
        return self.decoder.to(codes_NL.device)(sum_codes(codes_NL, self.codebooks))

    def save(self, path: Path) -> None:
        """Write codebooks and networks as safetensors, with the class's name in the metadata."""
        tensors = {f"codebook_{i}": c.contiguous() for i, c in enumerate(self.codebooks)}
        for part, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            for name, weight in module.state_dict().items():
                tensors[f"{part}.{name}"] = weight.detach().cpu().contiguous()
        settings = {
            "level_sizes": self.level_sizes,
            "iterations": self.iterations,
            "latent_dim": self.latent_dim,
            "batch_size": self.batch_size,
        }
        metadata = {"class": type(self).__name__, "settings": json.dumps(settings)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; use `quantizers.load_quantizer` when the class is not known."""
        with safe_open(path, framework="pt") as file:
            quantizer = cls(**json.loads(file.metadata()["settings"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        levels = range(len(quantizer.level_sizes))
        quantizer.codebooks = [tensors[f"codebook_{i}"] for i in levels]
        quantizer._build(tensors["encoder.0.weight"].shape[1])
        for part, module in (("encoder", quantizer.encoder), ("decoder", quantizer.decoder)):
            prefix = f"{part}."
            weights = {
                n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
            }
            module.load_state_dict(weights)
            module.requires_grad_(False)
        return quantizer

    def _build(self, width: int) -> None:
        self.encoder = _mlp(width, HIDDEN, self.latent_dim)
        self.decoder = _mlp(self.latent_dim, HIDDEN, width)

    def _start_codebooks(self, vectors_ND: Tensor, seed: int) -> list[Tensor]:
        start = ResidualKMeans(level_sizes=self.level_sizes, iterations=20)
        start.fit(self.latents(vectors_ND), seed=seed)
        return [c.to(vectors_ND.device) for c in start.codebooks]


def _mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


def _quantise(
    latent_BD: Tensor, codebooks: list[Tensor], usage: list[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sum of the chosen codes [B, D] and the commitment loss; moves the codebooks in place."""
    residual_BD = latent_BD
    commitment = torch.zeros((), device=latent_BD.device)
    total_BD = torch.zeros_like(latent_BD)
    for codebook_KD, usage_K in zip(codebooks, usage, strict=True):
        detached_BD = residual_BD.detach()
        code_B, _ = nearest_codes(detached_BD, codebook_KD)
        chosen_BD = codebook_KD[code_B]  # a copy: the update below does not reach it
        commitment = commitment + (residual_BD - chosen_BD).square().sum(1).mean()
        total_BD = total_BD + chosen_BD
        residual_BD = residual_BD - chosen_BD
        _move_codebook(codebook_KD, usage_K, detached_BD, code_B, generator)
    return total_BD, commitment


def _move_codebook(
    codebook_KD: Tensor, usage_K: Tensor, batch_BD: Tensor, code_B: Tensor, rng: torch.Generator
) -> None:
    """Moving averages of the residuals that chose each code; restart of dead codes; in place."""
    means_KD, count_K = means_by_code(batch_BD, code_B, len(codebook_KD))
    new_usage_K = DECAY * usage_K + (1 - DECAY) * count_K
    share_K1 = ((1 - DECAY) * count_K / new_usage_K.clamp_min(1e-9))[:, None]
    codebook_KD.copy_((1 - share_K1) * codebook_KD + share_K1 * means_KD)
    usage_K.copy_(new_usage_K)
    dead = torch.nonzero(usage_K < DEAD).flatten()
    if len(dead):
        rows = torch.randint(len(batch_BD), (len(dead),), generator=rng).to(batch_BD.device)
        codebook_KD[dead] = batch_BD[rows]
        usage_K[dead] = 1.0
