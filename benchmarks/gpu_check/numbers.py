"""Section core: the machine's own rates; field, loss and network on the device against the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dvla.drifting.config import TEMPERATURES, LossConfig
from dvla.drifting.field import grouped_drifting_field
from dvla.drifting.losses import policy_loss

from .items import Number, Place, item, passed, relative
from .policies import HORIZON, batch_of, bfloat16, loss_of, network, noise


@item("machine")
def machine(place: Place) -> str:
    if not place.cuda:
        return Number(f"CPU, torch {torch.__version__}")
    import transformers

    rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in _products(place).items())
    copies = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in _copies(place).items())
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    return Number(
        f"{torch.cuda.get_device_name(place.device)}, {versions}, transformers {transformers.__version__}; matrix "
        f"products, TFLOP/s: {rates}; copies, GB/s: {copies}"
    )


def _products(place: Place) -> dict[str, float]:
    """FLOP/s."""
    x = torch.randn(8192, 8192, device=place.device, dtype=torch.bfloat16)
    y = x.float()[:4096, :4096].contiguous()
    z = y.double()[:2048, :2048].contiguous()
    found = {"bf16": 2 * 8192**3 / place.timed(lambda: x @ x), "fp32": 2 * 4096**3 / place.timed(lambda: y @ y)}
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = 2 * 4096**3 / place.timed(lambda: y @ y)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {**found, "fp64": 2 * 2048**3 / place.timed(lambda: z @ z)}


def _copies(place: Place) -> dict[str, float]:
    """Bytes/s."""
    big, count = torch.empty(2**31, dtype=torch.uint8, device=place.device), 2**28
    there, found = big[:count], {"on the device": 2 * 2**30 / place.timed(lambda: big[: 2**30].copy_(big[2**30 :]))}
    for name, pinned in (("pinned", True), ("pageable", False)):
        host = torch.empty(count, dtype=torch.uint8, pin_memory=pinned)
        found[f"up, {name}"] = count / place.timed(lambda host=host: there.copy_(host, non_blocking=True))
        found[f"down, {name}"] = count / place.timed(lambda host=host: host.copy_(there))
    return found


@item("field against float64 on the CPU")
def field(place: Place) -> str:
    generator = torch.Generator().manual_seed(3)
    b, n, d = place.size((256, 8, 2048), (8, 4, 64))
    gen, pos = (torch.randn(b, k, d, generator=generator) for k in (n, 1))
    active, group = torch.rand(b, d, generator=generator) < 0.4, torch.arange(b) % 3
    rest = {"groups": 7, "temperatures": TEMPERATURES, "zero_is_absent": True}
    exact = grouped_drifting_field(gen.double(), pos.double(), active=active, group=group, **rest)
    there, lines, worst = [x.to(place.device) for x in (gen, pos, active, group)], [], 0.0
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found = grouped_drifting_field(*there[:2], active=there[2], group=there[3], **rest)
        errors = {k: relative(getattr(found, k), getattr(exact, k)) for k in ("force", "scale", "mean_square")}
        lines.append(f"TF32 {'allowed' if tf32 else 'off'}: " + ", ".join(f"{k} {e:.1e}" for k, e in errors.items()))
        worst = max(worst, *errors.values())
    torch.backends.cuda.matmul.allow_tf32 = False
    return passed(worst < 1e-4, "; ".join(lines))


@item("loss and its gradient against float64 on the CPU")
def loss(place: Place) -> str:
    b, g = place.size((64, 4), (4, 2))
    given = 0.2 * torch.randn(b, g, HORIZON, 128, generator=torch.Generator().manual_seed(5))
    out = []
    for device, dtype in (("cpu", torch.float64), (place.device, torch.float32)):
        x = given.to(device, dtype).requires_grad_()
        found = policy_loss(x, batch_of(place, b, device), LossConfig())
        out.append((found.total, torch.autograd.grad(found.total, x)[0], found.mean_square))
    errors = [relative(ours, exact) for exact, ours in zip(*out)]
    return passed(max(errors) < 1e-3, "total {:.1e}, gradient {:.1e}, mean squares {:.1e}".format(*errors))


@item("field and loss, cost")
def cost(place: Place) -> str:
    rows = []
    for b, g in place.size(((64, 4), (1024, 4), (1024, 8)), ((4, 2),)):
        batch = batch_of(place, 4).map(lambda x, b=b: x[:1].expand(b, *x.shape[1:]))
        pred = (0.2 * torch.randn(b, g, HORIZON, 128, device=place.device)).requires_grad_()
        place.reset_peak()
        took = place.timed(lambda: torch.autograd.grad(policy_loss(pred, batch, LossConfig()).total, pred))
        rows.append(f"B={b} G={g}: {took * 1e3:.2f} ms, {place.peak()}")
    return Number("; ".join(rows))


@item("DiT in float32 against the CPU, forward and gradient")
def dit(place: Place) -> str:
    out = []
    for device in ("cpu", place.device):
        net, batch = network(place, device), batch_of(place, 2, device)
        total = loss_of(place, net, batch, 4, mixed=False).total
        total.backward()
        pred = net(batch, noise(2, 4, batch.tokens.device), torch.ones(2, device=device))
        out.append((pred, torch.cat([p.grad.flatten().cpu() for p in net.parameters()]), total))
    errors = [relative(ours, exact) for exact, ours in zip(*out)]
    return passed(errors[0] < 1e-3 and errors[1] < 1e-2, "output {:.1e}, gradient {:.1e}, loss {:.1e}".format(*errors))


@item("DiT in bfloat16 against float32")
def mixed(place: Place) -> str:
    b, g = place.size((16, 4), (4, 2))
    net, batch, out, gradients = network(place), batch_of(place, b), [], []
    for on in (False, True):
        net.zero_grad(set_to_none=True)
        loss_of(place, net, batch, g, on).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]).double())
        with bfloat16(place, on), torch.no_grad():
            out.append(net(batch, noise(b, g, place.device), torch.ones(b, device=place.device)))
    cosine, error = F.cosine_similarity(*gradients, dim=0).item(), relative(out[1], out[0])
    rounded = (out[1] == out[1].bfloat16().float()).float().mean().item()
    text = f"output {error:.1e}, gradient's cosine {cosine:.4f}; {rounded:.0%} of the outputs are bfloat16 numbers"
    good = out[1].dtype == torch.float32 and rounded < 0.1 and bool(torch.isfinite(gradients[1]).all())
    return passed(good and error < 3e-2 and cosine > 0.98, text)
