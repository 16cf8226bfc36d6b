"""How the processes of a run share the network: full copies in each (DDP), shards of it (FSDP2), or shards of AdamW's
state (zero2.py). One process alone is a copy.

A checkpoint always holds full tensors, so a run may resume with another strategy or number of processes.

FSDP2 is torch's own `fully_shard`: Accelerate, which would wrap it, refuses it on CPUs, where the tests run it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import OptimizerConfig
from ..context import Session

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


def parameter_groups(named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's groups by learning rate (DiT, projector, VLM) and weight decay (the policy's matrices only); `halved`:
    the steps from each of which on a group's rate is half of what it was."""
    groups: dict[tuple[float, float, tuple[int, ...]], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        adapter = name.startswith("adapter.")
        scale = config.vlm_lr_scale if adapter else config.projector_lr_scale if name.startswith("proj_") else 1.0
        decay = config.weight_decay if parameter.ndim >= 2 and not adapter else 0.0
        groups.setdefault((scale, decay, config.vlm_lr_halved if adapter else ()), []).append(parameter)
    return [
        {"params": p, "lr_scale": scale, "weight_decay": decay, "halved": halved}
        for (scale, decay, halved), p in groups.items()
    ]


def unsharded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as one process would have them. Every process must call it."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


@torch.no_grad()
def place(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor, the same in every process, into this process's part of it."""
    value = value.to(target.device)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


class Replicas:
    """Every process has the full network; DDP averages the gradients while they are computed.

    `named`: the trained parameters by name; `ema`: their exponential moving averages, by the same names."""

    def __init__(self, session: Session) -> None:
        self.session, self.world = session, session.world
        self.share()
        self.named: dict[str, nn.Parameter] = session.parameters()  # after sharing, which may replace them
        config = session.config.optimizer
        self.fused = self.world.device.type == "cuda"  # one kernel for all parameters
        groups = parameter_groups(self.named, config)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=self.fused)
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}  # averaged weights

    def share(self) -> None:
        """Make `module`, what the loop calls. Once more after a change of which parameters are trained."""
        self.module: nn.Module = self.session.net
        if self.world.launched:
            device = self.world.device
            self.module = nn.parallel.DistributedDataParallel(
                self.session.net, device_ids=[device] if device.type == "cuda" else None
            )

    @contextlib.contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward pass of one batch; only the step's `last` one exchanges gradients."""
        alone = last or not self.world.launched
        with contextlib.nullcontext() if alone else self.module.no_sync():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of one batch, added to those of the step's others."""
        loss.backward()

    def step(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()

    def average(self, decay: float) -> None:
        """Move the averaged weights towards the trained ones: ema = decay · ema + (1 − decay) · trained."""
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.named.values()], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones."""
        raw = {name: p.detach().clone() for name, p in self.named.items()}
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(self.ema[name])
            try:
                yield
            finally:
                for name, p in self.named.items():
                    p.copy_(raw[name])

    def clip(self, limit: float) -> Tensor:
        """Average the adapter's gradients and clip all to a global norm of `limit`; returns the norm before."""
        adapter = [p for p in self.session.adapter.values() if p.requires_grad]  # in the VLM, outside the module
        if self.world.size > 1 and adapter:
            flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in adapter])
            dist.all_reduce(flat)
            for p, grad in zip(adapter, (flat / self.world.size).split([p.numel() for p in adapter])):
                p.grad = grad.view_as(p)
        norm = nn.utils.clip_grad_norm_(self.named.values(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state, unsharded, by name. Every process must call it."""
        state = self.optimizer.state
        return unsharded(
            {f"{name}:{kind}": state[p][kind] for name, p in self.named.items() if p in state for kind in MOMENTS}
        )

    def moments_form(self, found: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """What AdamW's state must be after `step` steps, by name, shape and type: of every parameter of the policy that
        was trained from the start; of others (LoRA, those thawed later) all or nothing, as `found`."""
        later = ("adapter.", *self.session.config.unfreeze)
        held = {
            name: p
            for name, p in self.named.items()
            if step and not name.startswith(later) or any(f"{name}:{kind}" in found for kind in MOMENTS)
        }
        one = torch.empty((), device="meta")
        return {f"{name}:{kind}": one if kind == "step" else p for name, p in held.items() for kind in MOMENTS}

    def load_moments(self, stored: Mapping[str, Tensor]) -> None:
        """Continue from the state that `moments` gave."""
        for name, p in self.named.items():
            if f"{name}:{MOMENTS[0]}" in stored:
                state = {kind: torch.zeros_like(p) for kind in MOMENTS[1:]}
                for kind, target in state.items():
                    place(target, stored[f"{name}:{kind}"])
                step = stored[f"{name}:step"].to(p.device if self.fused else "cpu", copy=True)
                self.optimizer.state[p] = {"step": step, **state}


class Shards(Replicas):
    """FSDP2: parameters, gradients and AdamW's state are split over the processes; a block is gathered while in use."""

    def share(self) -> None:
        net, world = self.session.net, self.world
        if isinstance(net.dit.blocks[0].modulation, DTensor):  # shards do not depend on which parameters are trained
            return
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in net.dit.blocks:
            fully_shard(
                block, mesh=mesh
            )  # without resharding, training would see the averaged weights of an evaluation
        fully_shard(net, mesh=mesh, reshard_after_forward=True)
        for method in ("encode", "decode"):  # held-out actions are generated by these
            register_fsdp_forward_method(net, method)
        self.module = net

    @contextlib.contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
