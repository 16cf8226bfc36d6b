"""Training of the policy from cached features (stage two) and with the live VLM (stage three): one loop for both.

Letters: B observations, G noise draws per observation, T action steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ..batch import FeatureBatch
from ..cache import fingerprint as fp
from ..cache.loader import ConditionMasking, Loader, require_variants
from ..cache.sampling import mix
from ..cache.shard import write_file
from ..cache.store import Cache
from ..drifting.dit import dit_config
from ..drifting.guidance import batch_negatives, sample_alpha
from ..drifting.losses import PolicyLoss, policy_loss
from ..drifting.policy_net import PolicyNet, PolicyNetConfig
from ..errors import UserError
from . import checkpoint as ck
from .build import pick_device
from .encode import decoded
from .policy import describe_dataset
from .train_config import OptimizerConfig, TrainConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")   # AdamW's state of one parameter


class Features(Protocol):
    """Turns a loader's batch into one with features: `masked` [B] bool says whose pictures are hidden, `variant` [B] int64 which
    augmented variant of them is seen."""

    def __call__(self, batch: FeatureBatch, masked: np.ndarray, variant: np.ndarray) -> FeatureBatch: ...


def cached_features(batch: FeatureBatch, masked: np.ndarray, variant: np.ndarray) -> FeatureBatch:
    """Stage two: the loader has put the features, or the null ones, in already; 8-bit ones are decoded on the device."""
    return decoded(batch)


@dataclass
class Session:
    """What the loop works on. Built by `train` and by `finetune`."""

    config: TrainConfig
    cache: Cache
    net: PolicyNet
    documents: dict[str, Any]                               # policy.json's content
    groups: list[dict[str, Any]]                            # parameter groups: params, lr_scale, weight_decay
    features: Features = cached_features
    live: bool = False                                      # `features` computes them, so the loader skips them
    stage_three: dict[str, Any] | None = None               # settings besides `config` that must not change on resume
    save_adapter: Callable[[Path], None] | None = None
    adapter: dict[str, torch.nn.Parameter] = field(default_factory=dict)    # trained VLM parameters by name
    on_log: Callable[[dict[str, Any]], None] = lambda _: None
    say: Callable[[str], None] = print

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All trained parameters by their name in a checkpoint."""
        return {**dict(self.net.named_parameters()), **{f"adapter.{n}": p for n, p in self.adapter.items()}}


@dataclass
class TrainReport:
    """What a call of the loop did."""

    run: Path
    step: int                           # steps of the run so far
    first_loss: float | None            # total loss of the run's first step
    loss: float | None                  # total loss of the run's newest step
    eval_mse: float | None              # newest held-out MSE, normalised units
    samples_per_second: float           # observations, of this call
    wait_share: float                   # share of the wall-clock spent waiting for the loader
    interrupted: bool                   # stopped by a signal; run the same command again to go on


def noise_generator(seed: int, step: int, stream: int) -> torch.Generator:
    """The noise of a step is a pure function of (seed, step), so a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed(int(mix(seed, 6, stream, step)) >> 1)


def training_step(net: PolicyNet, batch: FeatureBatch, config: TrainConfig, generator: torch.Generator) -> PolicyLoss:
    """One forward pass and its loss; the same for both stages. Noise and guidance scales come from `generator` (CPU)."""
    dit, device, b = net.config.dit, batch.tokens.device, len(batch)
    noise = torch.randn(b, config.draws, dit.horizon, dit.noise_dim, generator=generator).to(device)    # [B,G,T,64]
    alpha, negatives, weights = torch.ones(b, device=device), None, None
    if config.alpha_max > 1:
        alpha = sample_alpha(b, high=config.alpha_max, generator=generator).to(device)                  # [B]
        on_device = generator if device.type == "cpu" else torch.Generator(device).manual_seed(generator.initial_seed())
        negatives, weights = batch_negatives(batch, alpha, config.draws, config.negatives, on_device)   # [B,M,T,128], [B,M]
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()
    with autocast:
        pred = net(batch, noise, alpha)                                                                  # [B,G,T,128]
    return policy_loss(pred.float(), batch, config.loss, negatives=negatives, w_neg=weights)


@torch.no_grad()
def evaluate(session: Session) -> dict[str, float]:
    """Held-out metrics in normalised units, one noise draw, no masking, α = 1: mse, mae, and mse per dataset."""
    config, net = session.config, session.net
    dit, device = net.config.dit, next(net.parameters()).device
    sums: dict[str, list[float]] = {}
    net.eval()
    with _loader(session, split="eval") as loader:
        count = min(config.eval_batches, math.ceil(sum(loader.sizes) / config.batch_size))
        for i in range(count):
            at = loader.state_dict()["offset"]
            batch = session.features(next(loader).to(device), loader.masked(at)[1], loader.variants(at))
            noise = torch.randn(len(batch), 1, dit.horizon, dit.noise_dim, generator=noise_generator(config.seed, i, 1)).to(device)
            pred = net(batch, noise, torch.ones(len(batch), device=device))[:, 0].float()               # [B,T,128]
            active = batch.step_mask[..., None] & batch.action_mask[:, None]                            # [B,T,128]
            error = (pred - batch.action).masked_fill(~active, 0)                                       # [B,T,128]
            for d in batch.dataset.unique().tolist():
                mine = batch.dataset == d
                row = sums.setdefault(session.cache.datasets[d].name, [0.0, 0.0, 0.0])
                for j, value in enumerate((error[mine].square().sum(), error[mine].abs().sum(), active[mine].sum())):
                    row[j] += float(value)
    net.train()
    total = [sum(row[j] for row in sums.values()) for j in range(3)]
    return {"mse": total[0] / total[2], "mae": total[1] / total[2],
            **{f"mse/{name}": row[0] / row[2] for name, row in sorted(sums.items())}}


def train(config: TrainConfig, on_log: Callable[[dict[str, Any]], None] = lambda _: None,
          say: Callable[[str], None] = print, stop_after: int | None = None) -> TrainReport:
    """Stage two: train from a cache, or go on with the run in `config.out` if it was begun with the same settings."""
    cache = Cache.open(config.cache)
    if config.image_aug:
        require_variants(cache)     # before a run folder is made
    torch.manual_seed(config.seed)
    net = PolicyNet(PolicyNetConfig(feature_width=cache.width, text_width=cache.text_width if cache.text_width != cache.width else None,
                                    dit=dit_config(config.model_size, **config.dit)))
    net.to(pick_device(config.device))
    session = Session(config, cache, net, policy_document(net, cache, config), parameter_groups(net, config.optimizer),
                      on_log=on_log, say=say)
    return run(session, stop_after)


def policy_document(net: PolicyNet, cache: Cache, config: TrainConfig) -> dict[str, Any]:
    """policy.json: all that inference needs besides the weights."""
    encoder = {"spec": cache.datasets[0].attributes["encoder"], "fingerprint": cache.fingerprint["encoder"]}
    return {"format": ck.POLICY_FORMAT, "net": dataclasses.asdict(net.config), "encoder": encoder,
            "datasets": [describe_dataset(d) for d in cache.datasets],
            "conditions": {"blind": config.blind, "masking": dataclasses.asdict(config.masking), "alpha_max": config.alpha_max}}


def parameter_groups(net: PolicyNet, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups by learning rate (DiT, projector) and weight decay (matrices only)."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        scale = config.projector_lr_scale if name.startswith("proj_") else 1.0
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Peak rate × linear warm-up × cosine decay, at `step` (0-based) of `config.steps`."""
    warmup = min(config.optimizer.warmup, max(1, config.steps // 2))
    return config.optimizer.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def run(session: Session, stop_after: int | None = None) -> TrainReport:
    """The loop. Resumes from the newest whole checkpoint and stops at `config.steps`, or at step `stop_after` of the run.

    SIGINT and SIGTERM save and stop; a non-finite loss stops before the optimiser step (`UserError`).
    """
    config, folder = session.config, Path(session.config.out)
    device = next(session.net.parameters()).device
    optimizer = torch.optim.AdamW(session.groups, lr=config.optimizer.lr, betas=tuple(config.optimizer.betas))
    named = session.parameters()
    ema = {name: p.detach().clone() for name, p in named.items()}
    state = _begin(session, optimizer, named, ema)
    step, first_loss, metrics, loss = state["step"], state["first_loss"], state["metrics"], state["loss"]
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    seen, began, ending = 0, time.perf_counter(), False
    session.net.train()
    with _loader(session, split="train", start=state["offset"]) as loader, _signals() as stopped, \
            _kernel_threads(config.cpu_threads), open(folder / "log.jsonl", "a") as log:
        while step < last and not ending:
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for part in range(step * config.accumulate, (step + 1) * config.accumulate):
                at = loader.state_dict()["offset"]
                batch = session.features(next(loader).to(device, non_blocking=True), loader.masked(at)[1], loader.variants(at))
                result = training_step(session.net, batch, config, noise_generator(config.seed, part, 0))
                (result.total / config.accumulate).backward()
                total += result.total.item() / config.accumulate
                seen += len(batch)
            norm = torch.nn.utils.clip_grad_norm_(named.values(), config.optimizer.clip)
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise UserError(f"the loss at step {step} is {total}, its gradient's norm {norm:g}; training stopped before the optimiser step. Its batch began with "
                                f"datasets {batch.dataset[:4].tolist()}, rows {batch.frame_index[:4].tolist()}. Lower the learning "
                                f"rate, or run `dvla cache verify {config.cache}`")
            optimizer.step()
            step += 1
            decay = min(config.optimizer.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in named.values()], 1 - decay)
            loss, first_loss = total, total if first_loss is None else first_loss
            due = bool(config.eval_every and config.holdout) and (step % config.eval_every == 0 or step == config.steps)
            if due:
                with _swapped(named, ema):
                    metrics = evaluate(session)
            if due or step % config.log_every == 0 or step in (1, config.steps):
                elapsed = time.perf_counter() - began
                line = {"step": step, "loss": loss, "mse": result.mse.item(), "drift": result.drift.item(), "lr": rate,
                        "mean_square": result.mean_square.tolist(), "grad_norm": norm.item(),
                        "samples_per_second": seen / elapsed, "wait_share": loader.wait_seconds / elapsed,
                        **({f"eval/{k}": v for k, v in metrics.items()} if due else {})}
                log.write(json.dumps(line) + "\n")
                log.flush()
                session.on_log(line)
            ending = step == last or bool(stopped)      # read once: a signal after this line ends the next step
            if step % config.save_every == 0 or ending:
                progress = {"step": step, "offset": loader.state_dict()["offset"], "first_loss": first_loss, "loss": loss,
                            "metrics": metrics}
                _save(session, optimizer, named, ema, progress)
        elapsed, waited = max(time.perf_counter() - began, 1e-9), loader.wait_seconds
    return TrainReport(folder, step, first_loss, loss, metrics.get("mse"), seen / elapsed, waited / elapsed, bool(stopped) and step < last)


def _begin(session: Session, optimizer: torch.optim.Optimizer, named: dict[str, torch.Tensor],
           ema: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Create the run folder, or load the newest whole checkpoint of the same run into all arguments."""
    folder, settings = Path(session.config.out), json.loads(json.dumps(dataclasses.asdict(session.config)))
    if session.stage_three is not None:
        settings["stage_three"] = json.loads(json.dumps(session.stage_three))
    fresh = {"step": 0, "offset": 0, "first_loss": None, "loss": None, "metrics": {}}
    if not (folder / "config.json").exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds other files; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.json", ck.json_bytes(settings))
        return fresh
    free = ("out", "device", "threads", "log_every", "keep_last")    # these do not change what is learnt
    lines = fp.diff({k: v for k, v in ck.read_json(folder / "config.json").items() if k not in free},
                    {k: v for k, v in settings.items() if k not in free})
    if lines:
        raise UserError(f"run {folder} was begun with other settings: {'; '.join(lines[:6]).replace('cache has', 'it has')}. "
                        "Choose another --out, or repeat its settings")
    found = ck.latest_whole(folder)
    if found is None:
        return fresh
    checkpoint, state, complaints = found
    for line in complaints:
        session.say(line)
    expected = fp.digest(session.documents)
    if fp.digest(ck.read_json(checkpoint / "policy.json")) != expected:
        lines = fp.diff(ck.read_json(checkpoint / "policy.json"), session.documents)
        raise UserError(f"cache {session.config.cache} is not the one run {folder} was begun with: {'; '.join(lines[:6])}")
    with torch.no_grad():
        for stem, target in (("model", named), ("ema", ema)):
            stored = ck.load_tensors(checkpoint, stem)
            for name, tensor in target.items():
                tensor.copy_(stored[name])
    moments, names = ck.load_tensors(checkpoint, "optimizer"), {id(p): n for n, p in named.items()}
    order = [names[id(p)] for group in session.groups for p in group["params"]]
    states = {i: {kind: moments[f"{n}:{kind}"] for kind in MOMENTS} for i, n in enumerate(order)
              if f"{n}:{MOMENTS[0]}" in moments}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    session.say(f"resuming {folder} at step {state['step']} of {session.config.steps}")
    return state


def _save(session: Session, optimizer: torch.optim.Optimizer, named: dict[str, torch.Tensor], ema: dict[str, torch.Tensor],
          progress: dict[str, Any]) -> None:
    """One checkpoint: raw weights to go on with, averaged weights (and adapter) to act with, AdamW's moments."""
    raw = {name: p.detach().clone() for name, p in named.items()}
    moments = {f"{name}:{kind}": optimizer.state[p][kind] for name, p in named.items() if p in optimizer.state for kind in MOMENTS}
    with _swapped(named, ema):
        ck.save_checkpoint(Path(session.config.out), progress["step"], {"model": raw, "ema": ema, "optimizer": moments},
                           {"policy": session.documents, "state": progress}, session.config.keep_last, session.save_adapter)


@contextlib.contextmanager
def _swapped(named: dict[str, torch.Tensor], ema: dict[str, torch.Tensor]) -> Iterator[None]:
    """The averaged weights in the place of the trained ones."""
    raw = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(ema[name])
        try:
            yield
        finally:
            for name, p in named.items():
                p.copy_(raw[name])


def _loader(session: Session, split: Literal["train", "eval"], start: int = 0) -> Loader:
    """The session's batches. Held-out ones are not masked, except that a blind policy stays blind."""
    config = session.config
    masking = config.masking if split == "train" else ConditionMasking(0.0, 0.0, 0.0)
    if config.blind:
        masking = dataclasses.replace(masking, images=1.0)
    return Loader(session.cache, batch_size=config.batch_size, horizon=session.net.config.dit.horizon, seed=config.seed,
                  threads=config.threads, start=start, masking=masking, split=split, holdout=config.holdout,
                  features=not session.live, augment=config.image_aug and split == "train")


@contextlib.contextmanager
def _kernel_threads(count: int) -> Iterator[None]:
    """Torch's CPU kernels use `count` threads inside; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that is filled by SIGINT or SIGTERM, so that the loop ends after a whole step; a second one acts as usual."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():   # handlers belong to the main thread
        yield stopped
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, stop)
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
