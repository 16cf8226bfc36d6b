"""Attention kernels behind one switch: the same function whichever is chosen, refusals, and compilation of a training
step."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from dvla.drifting import attention
from dvla.drifting.config import LossConfig
from dvla.drifting.dit import set_attention
from dvla.drifting.heads import generate, head_loss
from dvla.drifting.losses import policy_loss
from dvla.errors import UserError
from support.policy_samples import ALPHA, NOISE, B, G, T, make_batch, make_net, random

# FlexAttention off CUDA is torch's unfused reference, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Unwritten(torch.autograd.Function):
    """The identity, but gradients of rows from `end` on are not written, as flash-attn leaves them."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, end: int) -> torch.Tensor:
        ctx.end = end
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        out = torch.full_like(gradient, torch.nan)
        out[: ctx.end] = gradient[: ctx.end]
        return out, None


@pytest.fixture
def flash_attn(monkeypatch) -> list[str]:
    """A stand-in for the library, in plain torch: the names of its functions that were called."""
    calls: list[str] = []

    def dense(q, k, v):  # [N,S,A,E] each
        calls.append("dense")
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def packed(q, k, v, starts, ends, most_q, most_k):  # [n,A,E] each
        calls.append("packed")
        assert (
            starts.dtype == ends.dtype == torch.int32 and starts.diff().max() <= most_q and ends.diff().max() <= most_k
        )
        k, v = (Unwritten.apply(x, int(ends[-1])) for x in (k, v))
        parts = [
            dense(q[None, a:b], k[None, c:d], v[None, c:d])[0]
            for a, b, c, d in zip(starts[:-1].tolist(), starts[1:].tolist(), ends[:-1].tolist(), ends[1:].tolist())
        ]
        return torch.cat(parts)

    module = ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = dense, packed
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attention._flash_kernels.cache_clear()
    yield calls
    attention._flash_kernels.cache_clear()


def attended(kernel, mask, queries: int, dtype=torch.float32):
    """Output and gradients of random q, k, v."""
    keys = 20 if mask is None else mask.shape[1]
    q, k, v = (random(2, 3, n, 16, seed=i).to(dtype).requires_grad_() for i, n in enumerate((queries, keys, keys)))
    out = kernel(mask, queries)(q, k, v)
    return out, torch.autograd.grad((out * random(*out.shape, seed=4).to(dtype)).sum(), (q, k, v))


def flex_has_a_gradient() -> bool:
    """Newer versions of torch have none on a CPU."""
    try:
        attended(attention.flex, None, 4)
    except NotImplementedError:
        return False
    return True


GRADIENT = flex_has_a_gradient()
FLEX = pytest.param(
    "flex", marks=pytest.mark.skipif(not GRADIENT, reason="this torch has no gradient of FlexAttention on a CPU")
)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", [FLEX, "flash"])
def test_kernels_agree(kind: str, masked: bool, flash_attn: list[str]) -> None:
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[:, 0], mask[1, 100:] = True, False  # the second observation ends within the first block
    mask, dtype = mask if masked else None, torch.bfloat16 if kind == "flash" else torch.float32
    expected, wanted = attended(attention.sdpa, mask, 20, dtype)
    out, gradients = attended(attention.KERNELS[kind], mask, 20, dtype)
    near = {"rtol": 0.02, "atol": 0.02} if kind == "flash" else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip((out, *gradients), (expected, *wanted)):
        torch.testing.assert_close(a, b, **near)
    if masked:
        hidden = ~mask[:, None, :, None].expand_as(gradients[1])
        assert not gradients[1][hidden].any() and not gradients[2][hidden].any()
    if kind == "flash":
        assert flash_attn[0] == ("packed" if masked else "dense")
        attended(attention.flash, mask, 20)  # 32-bit: not for flash-attn
        assert len(flash_attn) == (3 if masked else 1)


def test_flex_skips_blocks_that_padding_hides() -> None:
    mask = torch.arange(300) < torch.tensor([[300], [100]])
    blocks = attention._key_blocks(mask, 150)
    assert blocks.kv_num_blocks[:, 0].tolist() == [[3, 3], [1, 1]] and blocks.kv_indices[1, 0, 0, 0] == 0


@pytest.mark.parametrize("kind", ["flex", "flash"])
def test_the_policy_is_the_same_function(kind: str, flash_attn: list[str]) -> None:
    net, batch = make_net(blocks=1), make_batch()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    dtype = torch.bfloat16 if kind == "flash" else torch.float32
    with torch.autocast("cpu", dtype, enabled=kind == "flash"), torch.set_grad_enabled(GRADIENT or kind == "flash"):
        expected = net(batch, NOISE, ALPHA)
        if kind == "flash":
            net.dit.attention = attention.flash  # `set_attention` refuses it on the CPU
        else:
            set_attention(net, kind)
        out = net(batch, NOISE, ALPHA)
    assert kind == "flex" or len(flash_attn) > len(net.dit.blocks)  # the stand-in was called
    torch.testing.assert_close(
        out, expected, **({"rtol": 0.05, "atol": 0.1} if kind == "flash" else {"rtol": 1e-4, "atol": 1e-5})
    )
    assert net.state_dict().keys() == weights.keys() and all(
        torch.equal(t, weights[n]) for n, t in net.state_dict().items()
    )
    if out.requires_grad:
        out.square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    set_attention(net, "auto")
    assert net.dit.attention is attention.sdpa


def test_what_cannot_run_is_refused_in_one_line(monkeypatch) -> None:
    net = make_net()
    with pytest.raises(UserError, match="did you mean 'flash'"):
        set_attention(net, "flas")
    with pytest.raises(UserError, match="needs CUDA"):
        set_attention(net, "flash")
    with pytest.raises(UserError, match="at least 16"):
        set_attention(make_net(heads=4), "flex")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention._flash_kernels.cache_clear()
    with pytest.raises(UserError, match="not installed"):
        attention.kernel("flash", torch.device("cuda"), 64)
    with pytest.raises(UserError, match="at most 256"):
        attention.kernel("flash", torch.device("cuda"), 512)


@pytest.mark.parametrize(
    ("kind", "precision", "cross_attention"),
    [("sdpa", "fp32", "all"), ("sdpa", "bf16", "front"), pytest.param("flex", "fp32", "all", marks=FLEX.marks)],
)
def test_a_training_step_compiles_without_graph_breaks(kind: str, precision: str, cross_attention: str) -> None:
    """Forward, loss and backward, traced as torch's own compiler sees them."""
    blocks = 3 if cross_attention == "front" else 1  # the third has no cross-attention
    net, batch, config = make_net(cross_attention, blocks=blocks), make_batch(), LossConfig()
    set_attention(net, kind)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            pred = net(batch, NOISE, ALPHA)
        return policy_loss(pred, batch, config, positives=batch.action[:, None] + 0.1, w_pos=torch.ones(B, 1)).total

    plain = step()
    expected = torch.autograd.grad(plain, list(net.parameters()))
    torch._dynamo.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")()
    near = {"rtol": 0.1, "atol": 0.02} if precision == "bf16" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(loss, plain, **near)
    if precision == "fp32":
        for got, want in zip(torch.autograd.grad(loss, list(net.parameters())), expected):
            torch.testing.assert_close(got, want, **near)
    else:
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_a_denoising_head_compiles() -> None:
    """The trainer compiles the net; times are drawn outside of it."""
    net, batch = make_net(kind="flow", blocks=1), make_batch()
    config, noise = LossConfig(kind="flow"), random(B, G, T, net.config.dit.noise_dim)
    torch._dynamo.reset()

    def run():
        draw = torch.Generator().manual_seed(0)
        drawn = generate(net, net.encode(batch), noise, ALPHA, config, steps=2)
        return head_loss(net, batch, config, noise=noise, alpha=ALPHA, generator=draw).total, drawn

    plain = run()
    net.compile(fullgraph=True, backend="aot_eager")
    net.dit.compile(fullgraph=True, backend="aot_eager")
    for got, want in zip(run(), plain):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
