"""The cost of drifting: field and loss in a training step, shared keys and values, cross-attention, passes per action.

    python benchmarks/drift.py                                  # base size, 2 observations × 4 noise samples, CPU
    python benchmarks/drift.py --device cuda --batch 64 --precision bf16 --compile --repeats 20

Random weights and random observations of two 196-token cameras and 16 words. A training step is the product's: noise,
forward, loss, backward, clip, AdamW, averaged weights. The sides of every table run in turn in this process, after one
unmeasured run each. A ratio is the median over the repeats (min – max).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from measuring import machine, ratios, spread, wait_for
from resident import Resident
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dvla.batch import FeatureBatch, random_batch
from dvla.drifting.attention import kernel
from dvla.drifting.config import TEMPERATURES, LossConfig
from dvla.drifting.dit import SIZES, build_dit, dit_config, parameter_counts
from dvla.drifting.field import drifting_field
from dvla.drifting.heads import generate, head_dit
from dvla.drifting.losses import policy_loss
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.errors import UserError

WIDTH, TOKENS, WORDS, SLOTS = 2048, 2 * 196, 16, 8  # of the features; active action slots


def observations(count: int, horizon: int, device: torch.device) -> FeatureBatch:
    """`count` random observations as the loader delivers them for Qwen3-VL-2B, two cameras, one arm."""
    batch = random_batch(count, 2, TOKENS // 2, WIDTH, horizon, WORDS).to(device)
    text_mask = (torch.arange(WORDS, device=device) < WORDS - 4).expand(count, -1).contiguous()
    return batch.replace(action=0.2 * batch.action * batch.action_mask[:, None], text_mask=text_mask)


class Setup:
    """A network of one variant, and its training step."""

    def __init__(self, args: argparse.Namespace, kind: str = "hybrid", **dit: str) -> None:
        self.device, self.config = torch.device(args.device), LossConfig(kind=kind)
        torch.manual_seed(0)
        shape = head_dit(dit_config(args.size, **dit), kind)
        with self.device:
            self.net = PolicyNet(PolicyNetConfig(feature_width=WIDTH, dit=shape))
            with torch.no_grad():
                for parameter in self.net.parameters():  # at initialisation the blocks' gates are zero
                    parameter.add_(0.02 * torch.randn_like(parameter))
        self.dtype = torch.bfloat16 if args.precision == "bf16" else None
        self.batch = observations(args.batch, shape.horizon, self.device)
        self.noise = torch.randn(args.batch, args.draws, shape.horizon, shape.noise_dim, device=self.device)
        self.alpha = torch.ones(args.batch, device=self.device)
        settings = {"precision": args.precision, "compile": args.compile, "attention": args.attention}
        self.step = Resident(self.net, self.batch, draws=args.draws, loss=self.config, **settings)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def action(self, steps: int | None = None) -> Callable[[], None]:
        """One chunk for one observation, from its features."""
        one = self.batch.map(lambda value: value[:1])

        @torch.inference_mode()
        def act() -> None:
            with self.autocast():
                generate(self.net, self.net.encode(one), self.noise[:1, :1], self.alpha[:1], self.config, steps=steps)

        return act


def in_turn(sides: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each side, one measurement of every side after the other."""

    def timed(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        wait_for(device)
        return time.perf_counter() - begin

    for run in sides.values():
        timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(timed(run))
    return seconds


def report(
    title: str,
    seconds: dict[str, list[float]],
    base: str,
    notes: dict[str, str] | None = None,
    columns: tuple[str, ...] = (),
) -> None:
    """Print milliseconds and ratio to the side `base` of every side, with its `notes` in further columns."""
    header = " | ".join(["", "ms", f"× {base}", *columns])
    print(f"\n{title}\n\n| {header} |\n{'|---' * (3 + len(columns))}|")
    for name, values in seconds.items():
        cells = [name, spread([1e3 * v for v in values]), spread(ratios(values, seconds[base]))]
        print(f"| {' | '.join([*cells, notes[name]] if notes else cells)} |", flush=True)


def print_parameters(size: str) -> None:
    """Parameters by part, the VLM's projector not counted."""
    with torch.device("meta"):
        every, front = (parameter_counts(build_dit(size, cross_attention=c)) for c in ("all", "front"))
    print(f"\nParameters of {size}\n\n| part | cross-attention in all blocks | in the front two |\n|---|---|---|")
    for part, count in every.items():
        print(f"| {part} | {count:,} | {front[part]:,} |")


class Largest(TorchDispatchMode):
    """Entries of the largest tensor created."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.entries = max([self.entries, *(t.numel() for t in made if isinstance(t, Tensor))])
        return out


def naive_field(gen: Tensor, pos: Tensor, differences: bool) -> Tensor:
    """The released field [B,G,D] in its direct form; agrees with `drifting_field` to rounding.

    Every temperature computes its own distances, from all differences [B,G,N,D] or with torch.cdist, and weights them.
    """
    y, g, d = torch.cat([gen, pos], dim=1), gen.shape[1], gen.shape[2]
    force = torch.zeros_like(gen)
    for tau in TEMPERATURES:
        gaps = gen[:, :, None] - y[:, None] if differences else None  # [B,G,N,D]
        distance = (gaps.norm(dim=-1) if differences else torch.cdist(gen, y)).clamp(min=1e-4)  # [B,G,N]
        scale = distance.mean()
        scaled = distance / scale
        scaled[:, :, :g] += 100 * torch.eye(g, device=gen.device)
        affinity = (torch.softmax(-scaled / tau, 2) * torch.softmax(-scaled / tau, 1)).clamp(min=1e-6).sqrt()
        near, far = affinity[:, :, g:], affinity[:, :, :g]
        weight = torch.cat([-far * near.sum(2, keepdim=True), near * far.sum(2, keepdim=True)], dim=2)  # [B,G,N]
        pull = -torch.einsum("bgn,bgnd->bgd", weight, gaps) if differences else weight @ y  # [B,G,D]
        pull = pull / (scale / d**0.5)
        force += pull / pull.square().mean().sqrt()
    return force


def measure_field(args: argparse.Namespace) -> None:
    """The field alone on large sets, where its form matters."""
    device, (b, n, d) = torch.device(args.device), args.sets
    gen, pos = torch.randn(b, n, d, device=device), torch.randn(b, n, d, device=device) + 0.5

    def whole(gen: Tensor, pos: Tensor) -> Tensor:
        return drifting_field(gen.flatten(0, 1)[None], pos.flatten(0, 1)[None]).force.reshape(gen.shape)

    forms = {
        "drifting_field": lambda gen, pos: drifting_field(gen, pos).force,
        "cdist per temperature": partial(naive_field, differences=False),
        "all differences, per temperature": partial(naive_field, differences=True),
        "all observations as one set": whole,
    }
    exact, notes = forms["drifting_field"](gen.double(), pos.double()), {}
    for name, form in forms.items():
        with Largest() as watch:
            forces = form(gen, pos), form(gen + 50, pos + 50)
        error = [f"{(force.double() - exact).abs().max() / exact.abs().max():.0e}" for force in forces]
        notes[name] = f"{4 * watch.entries / 2**20:.1f} MiB | " + (
            "another field: p(a), not p(a given o) | " if form is whole else " | ".join(error)
        )
    report(
        f"The field of {b} observations, {n} generated and {n} expert samples of {d} entries each",
        in_turn({name: partial(form, gen, pos) for name, form in forms.items()}, args.repeats, device),
        "drifting_field",
        notes,
        ("largest tensor", "error to float64", "error 50 away from zero"),
    )


def measure_step(args: argparse.Namespace) -> None:
    """A training step, its loss alone, and with cross-attention in the front blocks only."""
    full, front = Setup(args), Setup(args, cross_attention="front")
    pred = 0.2 * torch.randn(args.batch, args.draws, full.noise.shape[2], 128, device=full.device)
    pred.requires_grad_()
    loss = torch.compile(policy_loss) if args.compile else policy_loss

    def only() -> None:
        torch.autograd.grad(loss(pred, full.batch, full.config).total, pred)

    def regression() -> None:
        torch.autograd.grad(
            (pred - full.batch.action[:, None]).masked_fill(~full.batch.action_mask[:, None, None], 0).square().mean(),
            pred,
        )

    sides = {
        "step": full.step,
        "field and loss of it": only,
        "a plain masked mean square instead": regression,
        "step, cross-attention in the front two blocks": front.step,
    }
    seconds = in_turn(sides, args.repeats, full.device)
    report(
        f"Training step of {args.size}: {args.batch} observations × {args.draws} noise samples, {args.precision}"
        f"{', compiled' if args.compile else ''}, attention {args.attention}",
        seconds,
        "step",
    )
    share = [100 * ratio for ratio in ratios(seconds["field and loss of it"], seconds["step"])]
    print(f"\nField and loss take {spread(share)} % of the step.")


def measure_sharing(args: argparse.Namespace) -> None:
    """Forward and backward with the context of an observation shared by its noise samples, or copied for each."""
    setup = Setup(args)
    copies = setup.batch.map(lambda value: value.repeat_interleave(args.draws, 0))
    noise, alpha = setup.noise.flatten(0, 1)[:, None], setup.alpha.repeat_interleave(args.draws)

    def run(batch: FeatureBatch, noise: Tensor, alpha: Tensor) -> Tensor:
        with setup.autocast():
            out = setup.net(batch, noise, alpha)
        out.float().square().mean().backward()
        setup.net.zero_grad(set_to_none=True)
        return out.detach().float()

    sides = {
        "shared": lambda: run(setup.batch, setup.noise, setup.alpha),
        "a copy per noise sample": lambda: run(copies, noise, alpha),
    }
    a, b = (side() for side in sides.values())
    apart = (a - b.reshape(a.shape)).abs().max() / a.abs().max()
    report(
        f"Keys and values of an observation for its {args.draws} noise samples, forward and backward (outputs differ "
        f"by {apart:.0e} of their size)",
        in_turn(sides, args.repeats, setup.device),
        "shared",
    )


def measure_heads(args: argparse.Namespace) -> None:
    """Features in, one action chunk out."""
    one = argparse.Namespace(**{**vars(args), "batch": 1, "draws": 1})
    drift, flow, diffusion = Setup(one), Setup(one, "flow"), Setup(one, "diffusion")
    sides = {
        "drifting, 1 pass": drift.action(),
        "drifting, front cross-attention": Setup(one, cross_attention="front").action(),
        "flow, 1 step": flow.action(1),
        "flow, 10 steps": flow.action(10),
        "diffusion, 5 steps": diffusion.action(5),
        "diffusion, 100 steps": diffusion.action(100),
    }
    report(
        f"One action chunk of {args.size} from features (keys and values computed once per action)",
        in_turn(sides, args.repeats, drift.device),
        "drifting, 1 pass",
    )


PARTS = {"field": measure_field, "step": measure_step, "sharing": measure_sharing, "heads": measure_heads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to measure; parameters are always printed",
    )
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=2, help="observations of a training step")
    parser.add_argument("--draws", type=int, default=4, help="noise samples per observation")
    parser.add_argument(
        "--sets", type=int, nargs=3, default=[8, 64, 128], help="observations, samples and entries of the field alone"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--attention", default="auto", help="auto, sdpa, flex or flash")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device found; use --device cpu")
    try:
        kernel(args.attention, torch.device(args.device), 64)
    except UserError as error:
        parser.error(str(error))
    print(machine(args.device))
    print_parameters(args.size)
    try:
        for part in args.part:
            PARTS[part](args)
    except UserError as error:  # settings that a run refuses
        parser.error(str(error))


if __name__ == "__main__":
    main()
