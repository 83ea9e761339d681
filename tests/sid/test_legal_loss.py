"""The loss of a code by PyTorch's operations and by the kernels."""

import importlib.util
import os

import pytest
import torch

from whyrec.sid.legal_loss import LegalNll, legal_nll

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(positions: int, codes: int, *, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits, wanted codes, and which are legal: in one row the wanted one alone, in one all."""
    torch.manual_seed(codes)
    logits_MK = torch.randn(positions, codes) * 5
    codes_M = torch.randint(codes, (positions,))
    legal_MK = torch.rand(positions, codes) < 0.3
    legal_MK[:1], legal_MK[1:2] = False, True
    legal_MK[torch.arange(positions), codes_M] = True
    # What is not legal may be anything.
    logits_MK = logits_MK.masked_fill(~legal_MK, 1e4)
    return logits_MK.to(dtype), codes_M, legal_MK


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_is_that_of_a_softmax_over_the_legal_codes(label_smoothing: float) -> None:
    logits_MK, codes_M, legal_MK = draw(5, 7, dtype=torch.float64)
    wanted = 0.0
    for logits_K, code, legal_K in zip(logits_MK, codes_M, legal_MK, strict=True):
        log_probs = logits_K[legal_K].log_softmax(0)
        target = log_probs[legal_K[:code].sum()]
        wanted -= (1 - label_smoothing) * target + label_smoothing * log_probs.mean()
    found = legal_nll(logits_MK, codes_M, legal_MK=legal_MK, label_smoothing=label_smoothing)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("positions", "codes"), [(0, 8), (5, 1), (9, 64), (6, 1000), (4, 1024)])
def test_kernels_give_loss_and_gradient(
    positions: int, codes: int, label_smoothing: float, dtype: torch.dtype
) -> None:
    logits_MK, codes_M, legal_MK = draw(positions, codes, dtype=dtype)
    plain_MK = logits_MK.clone().requires_grad_()
    wanted = legal_nll(plain_MK, codes_M, legal_MK=legal_MK, label_smoothing=label_smoothing)
    device_MK = logits_MK.to(DEVICE).requires_grad_()
    found = LegalNll.apply(device_MK, codes_M.to(DEVICE), legal_MK.to(DEVICE), label_smoothing)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-4)
    (wanted_MK,) = torch.autograd.grad(wanted * 0.3, plain_MK)
    found_MK = torch.autograd.grad(found * 0.3, device_MK)[0].cpu()
    # In bf16 both are rounded once: they may differ in the last place.
    rtol = 8e-3 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found_MK, wanted_MK, rtol=rtol, atol=1e-6)
    assert (found_MK[~legal_MK] == 0).all()
