"""Blocks in few kernels: the same hidden states, keys and values as the model's own forward.

The kernels run in Triton's interpreter where there is no GPU: `pip install triton` and
`TRITON_INTERPRET=1`.
"""

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import make_model
from whyrec.backbone import lean_blocks
from whyrec.backbone.fused_projections import fuse_projections
from whyrec.backbone.lora import plain_model
from whyrec.decode.tree_attention import KeyValueStore, run, run_lean

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (9, 40, 23)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)


def plain_run(model: PreTrainedModel, ids_UT: Tensor, **settings) -> Tensor:
    """`run` by the model's own forward, on a GPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean_blocks, "is_lean", lambda _: False)
        return run(model, ids_UT, **settings)


def lean_run(
    model: PreTrainedModel, ids_UT: Tensor, *, store: KeyValueStore, mask_UTS=None, positions_UT
) -> Tensor:
    """`run` by lean blocks, on a CPU too."""
    assert lean_blocks.is_lean(model)
    store.look(mask_UTS)
    hidden_UTD = run_lean(model, ids_UT, positions_UT=positions_UT, store=store)
    store.used += ids_UT.shape[1]
    return hidden_UTD


@torch.no_grad()
def prompts_and_beams(model: PreTrainedModel, run: Callable[..., Tensor]) -> list[Tensor]:
    """Hidden states of prompts and of a few tokens behind them, and all that is kept of them."""
    generator = torch.Generator().manual_seed(0)
    lengths_U = torch.tensor(LENGTHS)
    ids_UT = torch.randint(50, (3, 44), generator=generator).to(DEVICE)
    seen_US = torch.arange(44) < lengths_U[:, None]
    seen_US[:, 40:] = True
    own_UTS = torch.arange(44) <= torch.arange(40, 44)[:, None]
    mask_UTS = (seen_US[:, None] & own_UTS).to(DEVICE)
    lengths_U = lengths_U.to(DEVICE)
    store = KeyValueStore(lengths_U, 40, capacity=44)
    positions_UT = torch.arange(40, device=DEVICE).expand(3, -1)
    prompts = run(model, ids_UT[:, :40], positions_UT=positions_UT, store=store)
    beams = run(
        model,
        ids_UT[:, 40:],
        positions_UT=lengths_U[:, None] + torch.arange(4, device=DEVICE),
        store=store,
        mask_UTS=mask_UTS,
    )
    return [prompts, beams, *store.keys.values(), *store.values.values()]


@pytest.mark.parametrize("hidden_size", [16, 256])  # weights, or outputs, laid side by side
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_the_same_as_the_models_own_forward(kind: str, settings: dict, hidden_size: int) -> None:
    sizes = {"hidden_size": hidden_size, "initializer_range": 1.2 / hidden_size**0.5}
    model = make_model(kind, vocab_size=50, **sizes, **settings).to(DEVICE)
    for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
        nn.init.normal_(norm.weight, mean=1, std=0.3)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected, found = (prompts_and_beams(model, run) for run in (plain_run, lean_run))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_in_training_is_validated_in_bf16() -> None:
    model = make_model(vocab_size=50).to(DEVICE)
    fuse_projections(model)
    exact = prompts_and_beams(model, plain_run)
    with torch.autocast(DEVICE, torch.bfloat16):
        plain, lean = (prompts_and_beams(model, run) for run in (plain_run, lean_run))
    for wanted, usual, found in zip(exact, plain, lean, strict=True):
        usual_error, error = ((part.float() - wanted).abs().mean() for part in (usual, found))
        assert error < 1.5 * usual_error + 1e-3


def test_modules_of_others_run_their_own_code() -> None:
    lora = get_peft_model(
        make_model(vocab_size=50),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True),
    )
    assert not lean_blocks.is_lean(plain_model(lora))
    assert not lean_blocks.is_lean(make_model(vocab_size=50, hidden_act="gelu"))
    watched = make_model(vocab_size=50)
    assert lean_blocks.is_lean(watched)
    handle = watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not lean_blocks.is_lean(watched)
    handle.remove()
    assert lean_blocks.is_lean(watched)
    watched.model.layers[0].forward = watched.model.layers[0].forward
    assert not lean_blocks.is_lean(watched)


@needs_triton
@pytest.mark.parametrize("size", [6, 64])
def test_rotation_turns_its_heads_and_no_others(size: int) -> None:
    torch.manual_seed(0)
    heads_UTNE = torch.randn(2, 5, 7, size, device=DEVICE)
    cos_UTE = torch.randn(2, 5, size // 2, device=DEVICE).repeat(1, 1, 2)
    sin_UTE = torch.randn(2, 5, size // 2, device=DEVICE).repeat(1, 1, 2)
    low, high = heads_UTNE[:, :, :5].chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    expected = heads_UTNE[:, :, :5] * cos_UTE[:, :, None] + turned * sin_UTE[:, :, None]
    others = heads_UTNE[:, :, 5:].clone()
    lean_blocks.launch_rotation(heads_UTNE[:, :, :5], cos_UTE, sin_UTE)
    torch.testing.assert_close(heads_UTNE[:, :, :5], expected)
    assert torch.equal(heads_UTNE[:, :, 5:], others)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both_UTF = torch.randn(2, 3, 2 * 1500, device=DEVICE).to(dtype)
    gate, up = both_UTF.float().chunk(2, dim=-1)
    expected = (gate * torch.sigmoid(gate) * up).to(dtype)
    torch.testing.assert_close(lean_blocks.launch_gate(both_UTF), expected)
