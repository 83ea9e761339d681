"""The text loss against PyTorch's cross-entropy, by the plain path and by the kernel."""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from whyrec.train import text_loss

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("positions", [0, 1, 7, 8])
def test_loss_and_gradients_are_those_of_cross_entropy(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_loss, "_CHUNK", 4)
    hidden_MD = torch.randn(positions, 6, requires_grad=True)
    head_VD = torch.randn(11, 6, requires_grad=True)
    targets_M = torch.randint(11, (positions,))
    found = text_loss.text_nll(hidden_MD, targets_M, head_VD)
    wanted = F.cross_entropy(hidden_MD @ head_VD.T, targets_M, reduction="sum")
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(found * 0.3, (hidden_MD, head_VD))
    torch.testing.assert_close(
        gradients, torch.autograd.grad(wanted * 0.3, (hidden_MD, head_VD)), rtol=1e-4, atol=1e-5
    )


@needs_triton
@pytest.mark.parametrize(("vocabulary", "width"), [(5000, 5056), (4096, 4096), (70, 128)])
def test_kernel_overwrites_logits_with_their_gradient(vocabulary: int, width: int) -> None:
    from whyrec.train.text_kernel import nll_and_gradient_

    # What is beyond the vocabulary is no token's, and may be anything.
    logits_CW = torch.full((3, width), torch.nan, device=DEVICE)
    logits_CW[:, :vocabulary] = torch.randn(3, vocabulary, device=DEVICE) * 5
    exact_CV = logits_CW[:, :vocabulary].clone().requires_grad_()
    targets_C = torch.tensor([0, vocabulary - 1, vocabulary // 2], device=DEVICE)
    wanted_C = F.cross_entropy(exact_CV, targets_C, reduction="none")
    found_C = nll_and_gradient_(logits_CW, targets_C, vocabulary=vocabulary)
    torch.testing.assert_close(found_C, wanted_C.detach())
    gradient_CV = torch.autograd.grad(wanted_C.sum(), exact_CV)[0]
    torch.testing.assert_close(logits_CW[:, :vocabulary], gradient_CV)
    assert (logits_CW[:, vocabulary:] == 0).all()
