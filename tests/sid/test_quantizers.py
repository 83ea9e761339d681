"""The three quantisers: quality beside reference ones, determinism, odd inputs, files."""

import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from whyrec.sid.kmeans import BalancedKMeans, ResidualKMeans, balanced_codes, kmeans
from whyrec.sid.quantizers import QUANTIZERS, load_quantizer
from whyrec.sid.rqvae import RQVAE

SIZES = (12, 7, 5)
every_quantizer = pytest.mark.parametrize("name", list(QUANTIZERS))


def clustered(num_points=600, dim=10, centres=15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre_KD = 4 * torch.randn(centres, dim, generator=generator)
    pick = torch.randint(centres, (num_points,), generator=generator)
    return centre_KD[pick] + torch.randn(num_points, dim, generator=generator)


def fitted(name, vectors_ND, sizes=SIZES, seed=0):
    iterations = 40 if name == "rqvae" else 15
    return QUANTIZERS[name](level_sizes=sizes, iterations=iterations).fit(vectors_ND, seed=seed)


def error(vectors_ND, rebuilt_ND):
    spread = (vectors_ND - vectors_ND.mean(0)).square().sum()
    return ((vectors_ND - rebuilt_ND).square().sum() / spread).item()


def test_kmeans_is_as_good_as_scikit_learn():
    vectors_ND = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    codebook_KD = kmeans(vectors_ND, 32, iterations=100, generator=torch.Generator().manual_seed(0))
    ours = torch.cdist(vectors_ND, codebook_KD).min(1).values.square().sum()
    theirs = min(KMeans(32, n_init=1, random_state=s).fit(vectors_ND).inertia_ for s in range(3))
    assert ours < 1.02 * theirs


def test_kmeans_does_not_collapse_in_many_dimensions():
    """Where k-means++ alone, scikit-learn's too, leaves most codes with a single point."""
    vectors_ND = torch.randn(1300, 384, generator=torch.Generator().manual_seed(0))
    quantizer = ResidualKMeans(level_sizes=(64,), iterations=50).fit(vectors_ND, seed=0)
    counts = torch.bincount(quantizer.encode(vectors_ND)[:, 0], minlength=64)
    assert counts.min() >= 3 and counts.max() <= 100


@every_quantizer
def test_more_levels_explain_more(name):
    vectors_ND = clustered()
    quantizer = fitted(name, vectors_ND)
    codes_NL = quantizer.encode(vectors_ND)
    assert codes_NL.shape == (600, 3) and codes_NL.dtype == torch.int64
    assert (codes_NL >= 0).all() and (codes_NL < torch.tensor(SIZES)).all()
    errors = [error(vectors_ND, quantizer.decode(codes_NL[:, :depth])) for depth in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.35


@every_quantizer
def test_encoding_is_greedy_nearest_in_the_latent_space(name):
    vectors_ND = clustered(100)
    quantizer = fitted(name, vectors_ND)
    codes_NL = quantizer.encode(vectors_ND)
    residual_ND = quantizer.latents(vectors_ND)
    for level, codebook_KD in enumerate(quantizer.codebooks):
        distance_NK = torch.cdist(residual_ND, codebook_KD)
        chosen_N = distance_NK.gather(1, codes_NL[:, level, None])[:, 0]
        torch.testing.assert_close(chosen_N, distance_NK.min(1).values, atol=1e-4, rtol=1e-4)
        residual_ND = residual_ND - codebook_KD[codes_NL[:, level]]


@every_quantizer
def test_same_seed_same_codebooks(name):
    vectors_ND = clustered(200)
    first, second = fitted(name, vectors_ND), fitted(name, vectors_ND)
    other = fitted(name, vectors_ND, seed=1)
    pairs = list(zip(first.codebooks, second.codebooks, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.codebooks[0], other.codebooks[0])


@every_quantizer
def test_fit_leaves_the_random_state_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(name, clustered(50))
    assert torch.equal(torch.rand(3), expected)


@every_quantizer
@pytest.mark.parametrize("num_points", [1, 3, 40])
def test_fewer_distinct_points_than_codes(name, num_points):
    vectors_ND = clustered(3, seed=1)[torch.arange(num_points) % 3]
    quantizer = fitted(name, vectors_ND)
    codes_NL = quantizer.encode(vectors_ND)
    assert all(torch.isfinite(c).all() for c in quantizer.codebooks)
    assert [len(c) for c in quantizer.codebooks] == list(SIZES)
    if name == "residual-kmeans":
        rebuilt_ND = quantizer.decode(codes_NL)
        torch.testing.assert_close(rebuilt_ND, vectors_ND, atol=1e-3, rtol=1e-3)


@every_quantizer
def test_saved_and_loaded_is_the_same(name, tmp_path):
    vectors_ND = clustered(200)
    quantizer = fitted(name, vectors_ND)
    quantizer.save(tmp_path / "codebooks.safetensors")
    loaded = load_quantizer(tmp_path / "codebooks.safetensors")
    assert type(loaded) is type(quantizer) and loaded.level_sizes == SIZES
    codes_NL = quantizer.encode(vectors_ND)
    assert torch.equal(loaded.encode(vectors_ND), codes_NL)
    torch.testing.assert_close(loaded.decode(codes_NL), quantizer.decode(codes_NL))


def test_a_file_that_holds_no_codebooks_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no known quantizer"):
        load_quantizer(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a file")
    with pytest.raises(ValueError, match="cannot read codebooks"):
        load_quantizer(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(("num_points", "num_codes"), [(600, 12), (601, 7), (5, 12), (12, 12)])
def test_balanced_codes_differ_in_size_by_one_at_most(num_points, num_codes):
    vectors_ND = clustered(num_points)
    codebook_KD = clustered(num_codes, seed=1)
    counts = torch.bincount(balanced_codes(vectors_ND, codebook_KD), minlength=num_codes)
    assert counts.max() - counts.min() <= 1 and counts.sum() == num_points


def test_balanced_codes_are_near_the_optimal_transport():
    vectors_ND = torch.randn(240, 10, generator=torch.Generator().manual_seed(0))
    codebook_KD = vectors_ND[:12]
    distance_NK = torch.cdist(vectors_ND, codebook_KD).square()
    rows, columns = linear_sum_assignment(distance_NK.repeat(1, 20).numpy())
    best = distance_NK[rows, columns % 12].sum()
    code_N = balanced_codes(vectors_ND, codebook_KD)
    assert distance_NK[torch.arange(240), code_N].sum() < 1.03 * best


def test_balanced_kmeans_uses_codes_more_evenly():
    generator = torch.Generator().manual_seed(0)
    dense = 0.3 * torch.randn(900, 8, generator=generator)  # most items are much alike
    vectors_ND = torch.cat([dense, 3 * torch.randn(100, 8, generator=generator)])
    largest = {}
    for cls in (ResidualKMeans, BalancedKMeans):
        quantizer = cls(level_sizes=(10, 10), iterations=15).fit(vectors_ND, seed=0)
        largest[cls] = torch.bincount(quantizer.choose(vectors_ND, level=0)).max()
    assert largest[BalancedKMeans] == 100 < largest[ResidualKMeans]


def test_rqvae_uses_its_codes():
    vectors_ND = clustered(1000, centres=30)
    quantizer = RQVAE(level_sizes=(16, 16), iterations=40).fit(vectors_ND, seed=0)
    codes_NL = quantizer.encode(vectors_ND)
    assert all(len(codes_NL[:, level].unique()) >= 14 for level in (0, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_quantizer
def test_runs_where_the_vectors_are(name):
    vectors_ND = clustered(300).cuda()
    quantizer = fitted(name, vectors_ND)
    codes_NL = quantizer.encode(vectors_ND)
    assert codes_NL.is_cuda and quantizer.decode(codes_NL).is_cuda
