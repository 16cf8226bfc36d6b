"""DeepSpeed's ZeRO stage 2: full networks, but each process keeps only its shard of the gradients and of AdamW's state.

DeepSpeed's engine is used directly: Accelerate, which would wrap it, steps inside the backward pass, before a gradient
can be refused."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..context import Session
from .replicas import MOMENTS, Replicas, parameter_groups


class Zero2(Replicas):
    """The strategy zero2."""

    optimizer: Any  # DeepSpeed's own, around AdamW

    def __init__(self, session: Session) -> None:
        import deepspeed
        from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.session, self.world, self.named = session, session.world, session.parameters()
        self._get, self._set = safe_get_full_optimizer_state, safe_set_full_optimizer_state
        config, adam = session.config, session.config.optimizer
        self._adamw = torch.optim.AdamW(parameter_groups(self.named, adam), lr=adam.lr, betas=adam.betas)
        self._engine, self.optimizer, *_ = deepspeed.initialize(
            model=session.net,
            optimizer=self._adamw,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": config.batch_size,
                "gradient_accumulation_steps": config.accumulate,
                "gradient_clipping": adam.clip,
                "zero_optimization": {"stage": 2},
                "steps_per_print": 1 << 40,
                **({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if config.precision == "bf16" else {}),
            },
        )
        self.module = self._engine
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}

    def share(self) -> None:
        """Nothing to redo: the settings refuse parameters that are trained only later."""

    @contextlib.contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # the loop has divided by the number of batches

    def clip(self, limit: float) -> Tensor:
        """The norm before; the engine scales the gradients in its step."""
        norm = float(self.optimizer.scaled_global_norm())
        return torch.tensor(
            norm if norm >= 0 else float("nan"), dtype=torch.float64
        )  # it says −1 of none that is finite

    def step(self) -> None:
        self._engine.step()

    def moments(self) -> dict[str, Tensor]:
        state: Mapping[Any, dict[str, Tensor]] = self._adamw.state
        if not state:
            return {}
        self._link()
        steps = {id(p): state[flat]["step"] for group, flat in self._groups() for p in group}
        return {
            f"{name}:{kind}": steps[id(p)].clone() if kind == "step" else self._get(p, kind)
            for name, p in self.named.items()
            for kind in MOMENTS
        }

    def load_moments(self, stored: Mapping[str, Tensor]) -> None:
        if not stored:
            return
        names = {id(p): name for name, p in self.named.items()}
        for group, flat in self._groups():
            step = stored[f"{names[id(group[0])]}:step"].clone()
            self._adamw.state[flat] = {"step": step, **{kind: torch.zeros_like(flat) for kind in MOMENTS[1:]}}
        self._link()
        for name, p in self.named.items():
            for kind in MOMENTS[1:]:
                self._set(p, stored[f"{name}:{kind}"].to(p.device), kind)

    def _link(self) -> None:
        """Tell each parameter where its part of AdamW's state is.

        The engine does so within its first step, when only the first group's exists."""
        for group, flat in self._groups():
            for p in group:
                if p._hp_mapping is not None:  # a part of it is this process's
                    p._hp_mapping.set_optim_state_fragment(flat, self._adamw.state[flat])

    def _groups(self) -> list[tuple[list[Any], Tensor]]:
        """Each group's parameters and this process's part of them in one flat tensor, which is what AdamW sees."""
        return list(zip(self.optimizer.bit16_groups, self.optimizer.single_partition_of_fp32_groups))
