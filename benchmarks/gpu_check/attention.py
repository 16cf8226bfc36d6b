"""Section core: which kernel of attention runs, whether each is right with a mask, and what a new length costs.

Letters: L keys.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dvla.drifting.config import LossConfig
from dvla.drifting.heads import generate

from .items import Number, Place, item, passed, relative
from .policies import attention_of, batch_of, bfloat16, kernels_of, loss_of, network, noise

LENGTHS = (409, 448, 385, 416, 401)  # 448: 64 modulo 128 (pytorch/pytorch#196678); 385: 1 modulo 32 (#191937)
LOUD = 12.0  # scales logits to below -88, where float32's exponential is 0, as QK-norm scales that grew would


@item("attention: what runs in a training step", cuda=True)
def kernels(place: Place) -> str:
    net, large, small = network(place), batch_of(place, 64), batch_of(place, 8)
    mixed = attention_of(kernels_of(place, lambda: loss_of(place, net, large, 4).total.backward()))
    plain = attention_of(kernels_of(place, lambda: loss_of(place, net, small, 4, False).total.backward()))
    off = not torch.backends.cuda.cudnn_sdp_enabled()
    text = f"bfloat16: {mixed}; float32: {plain}; cuDNN's is {'off' if off else 'on'}"
    return passed(off and not any(kind in mixed for kind in ("math", "cudnn", "unknown")), text)


@item("attention: values and gradients with a mask against float64")
def masked(place: Place) -> str:
    """Torch's own choice must be right; the other kernels are reported."""
    kinds: dict[str, SDPBackend | None] = {"as chosen": None}
    if place.cuda:
        kinds |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    wrong = {}
    for length in place.size(LENGTHS, LENGTHS[1:2]):
        for loud in (1.0, LOUD):
            given = _inputs(length, loud)
            exact = _attend(given, torch.device("cpu"), torch.float64)
            for name, kind in kinds.items():
                if text := _wrong(exact, given, place.device, kind):
                    wrong[name, f"L={length}{', loud' if loud > 1 else ''}"] = text
    text = "; ".join(f"{name} {case}: {found}" for (name, case), found in wrong.items())
    good = not any(name == "as chosen" for name, _ in wrong)
    return passed(good, text or f"right at L = {', '.join(map(str, LENGTHS))}, also with logits below -88")


def _inputs(length: int, loud: float) -> dict[str, torch.Tensor]:
    """Queries, keys and values [4,12,n,64] with QK-norm, a mask [4,L], and a gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, up = (torch.randn(4, 12, n, 64, generator=generator) for n in (64, length, length, 64))
    if loud > 1:  # every logit strongly negative
        q = q.mean(2, keepdim=True) + 0.01 * q
        k = -q.mean(2, keepdim=True) + 0.01 * k
    q, k = (F.normalize(x, dim=-1) * 8 * loud**0.5 for x in (q, k))
    mask = torch.arange(length)[None] < torch.tensor([length, length - 4, length - 11, 1])[:, None]
    return {"q": q, "k": k, "v": v, "mask": mask, "up": up}


def _attend(given: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output, and the gradients of queries, keys and values."""
    inputs = [given[name].to(device, dtype).requires_grad_() for name in "qkv"]
    out = F.scaled_dot_product_attention(*inputs, attn_mask=given["mask"][:, None, None].to(device))
    return [out, *torch.autograd.grad(out, inputs, given["up"].to(device, dtype))]


def _wrong(
    exact: list[torch.Tensor], given: dict[str, torch.Tensor], device: torch.device, kind: SDPBackend | None
) -> str:
    """What is wrong with a kernel in bfloat16; "": nothing."""
    try:
        with contextlib.nullcontext() if kind is None else sdpa_kernel(kind):
            found = _attend(given, device, torch.bfloat16)
    except RuntimeError as error:
        return f"{type(error).__name__} {' '.join(str(error).split())[:80]}"
    finite = [bool(torch.isfinite(x).all()) for x in found]
    errors = [relative(ours, wanted) if good else float("nan") for ours, wanted, good in zip(found, exact, finite)]
    names = ("out", "dq", "dk", "dv")
    return "" if all(finite) and errors[0] < 0.05 else ", ".join(f"{n} {e:.1e}" for n, e in zip(names, errors))


@item("attention: what a new length of the context costs once", cuda=True)
def new_lengths(place: Place) -> Any:
    net, taken = network(place).eval(), []
    with torch.inference_mode(), bfloat16(place):
        for words in (16, 16, 5, 7, 9, 11, 13):
            batch = batch_of(place, 1, words=words)
            place.wait()
            began = time.perf_counter()
            one = torch.ones(1, device=place.device)
            generate(net, net.encode(batch), noise(1, 1, place.device), one, LossConfig())
            place.wait()
            taken.append((time.perf_counter() - began) * 1e3)
    others = ", ".join(f"{t:.1f}" for t in taken[2:])
    return Number(f"ms: first call {taken[0]:.0f}, the same again {taken[1]:.1f}, five new lengths {others}")
