"""Where the drift's further samples come from: queues; and why they are only an ablation."""

from __future__ import annotations

import pytest
import torch

from dvla.batch import FeatureBatch
from dvla.drifting.config import LossConfig
from dvla.drifting.heads import head_loss
from dvla.drifting.losses import policy_loss
from dvla.drifting.queues import ChunkQueues, instruction_id
from dvla.errors import UserError
from support.policy_samples import ALPHA, NOISE, B, D, G, T, make_batch, make_net, one_thread, random

TASK, GLOBAL = LossConfig(queue="task", queue_size=3), LossConfig(queue="global", queue_size=3)


def chunks(batch: FeatureBatch, value: float) -> FeatureBatch:
    """The batch with expert chunks of one constant value per observation: value, value + 1, …"""
    level = value + torch.arange(len(batch)).float()
    return batch.replace(action=level[:, None, None].expand(-1, T, 128).contiguous())


def same_task(batch: FeatureBatch) -> FeatureBatch:
    """All observations of one embodiment, dataset and instruction."""
    zero = torch.zeros_like(batch.dataset)
    return batch.replace(
        embodiment=zero,
        dataset=zero,
        text=batch.text[:1].expand_as(batch.text).contiguous(),
        text_mask=batch.text_mask[:1].expand_as(batch.text_mask).contiguous(),
    )


def pred(value: float) -> torch.Tensor:
    return torch.full((B, G, T, 128), value)


def held(drawn, row: int) -> list[float]:
    """Levels of the expert chunks in a row's queue."""
    return [drawn.positives[row, q, 0, 0].item() for q in range(drawn.weight.shape[1]) if drawn.weight[row, q]]


@pytest.mark.parametrize("distance", ["chunk", "step"])
def test_a_chunk_of_weight_zero_is_not_there(distance: str) -> None:
    batch, config = make_batch(), LossConfig(kind="pure_drift", distance=distance)
    gen, near, far = random(B, G, T, 128, seed=5), random(B, 2, T, 128, seed=6), random(B, 3, T, 128, seed=7)
    w_pos, w_neg = random(B, 2, seed=8).exp(), random(B, 3, seed=9).exp()
    plain = policy_loss(gen, batch, config, positives=near, w_pos=w_pos, negatives=far, w_neg=w_neg)
    close = gen[:, :2] + 1e-3  # so near that they would take most of the softmax
    padded = policy_loss(
        gen,
        batch,
        config,
        positives=torch.cat([close, near], 1),
        w_pos=torch.cat([torch.zeros(B, 2), w_pos], 1),
        negatives=torch.cat([far, close], 1),
        w_neg=torch.cat([w_neg, torch.zeros(B, 2)], 1),
    )
    for name in ("total", "drift", "mean_square", "scale"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name), rtol=1e-4, atol=1e-6)


def test_weights_of_positives_count() -> None:
    batch, config, gen = make_batch(), LossConfig(kind="pure_drift"), random(B, G, T, 128, seed=5)
    twice = policy_loss(gen, batch, config, positives=random(B, 1, T, 128), w_pos=torch.full((B, 1), 2.0))
    once = policy_loss(gen, batch, config, positives=random(B, 1, T, 128))
    ones = policy_loss(gen, batch, config, positives=random(B, 1, T, 128), w_pos=torch.ones(B, 1))
    assert torch.equal(once.total, ones.total) and not torch.equal(twice.mean_square, once.mean_square)


def test_first_in_first_out() -> None:
    batch, queues = same_task(make_batch()), ChunkQueues(TASK, T)
    assert not queues.draw(batch).weight.any() and queues.draw(batch).positives.shape == (B, 3, T, 128)
    ended = batch.step_mask.clone()
    ended[1:, 2:] = False
    queues.push(chunks(batch, 10).replace(step_mask=ended), pred(0.5))  # two of the three are not whole
    assert [held(queues.draw(batch), row) for row in range(B)] == [[10]] * B
    queues.push(chunks(batch, 20), pred(0.7))  # the oldest goes
    drawn = queues.draw(batch)
    assert sorted(held(drawn, 0)) == [20, 21, 22] and torch.equal(drawn.negatives[0], torch.full((3, T, 128), 0.7))
    queues.push(chunks(batch, 30).replace(step_mask=ended), pred(0.9))
    assert sorted(held(queues.draw(batch), 0)) == [21, 22, 30]


@pytest.mark.parametrize("config", [TASK, GLOBAL])
def test_embodiments_and_datasets_are_never_mixed(config: LossConfig) -> None:
    batch = same_task(make_batch())
    batch = batch.replace(embodiment=torch.tensor([0, 0, 4]), dataset=torch.tensor([0, 1, 1]))
    queues = ChunkQueues(config, T)
    for value in (10, 20):
        queues.push(chunks(batch, value), pred(0.0))
    assert [held(queues.draw(batch), row) for row in range(B)] == [[10, 20], [11, 21], [12, 22]]


def test_tasks_are_instructions() -> None:
    batch = make_batch()
    batch = batch.replace(embodiment=torch.zeros_like(batch.embodiment))
    padded = batch.replace(
        text=torch.cat([batch.text, random(B, 2, D, seed=9).half()], 1),
        text_mask=torch.cat([batch.text_mask, torch.zeros(B, 2, dtype=torch.bool)], 1),
    )
    assert torch.equal(instruction_id(batch), instruction_id(padded)) and len(set(instruction_id(batch).tolist())) == B
    assert torch.equal(
        instruction_id(batch), instruction_id(batch.replace(text=batch.text.float(), tokens=batch.tokens.float()))
    )
    swapped = batch.replace(text=batch.text[:, [1, 0, 2, 3]])
    assert (instruction_id(swapped) != instruction_id(batch))[:2].all()  # the order of words counts
    task, everything = ChunkQueues(TASK, T), ChunkQueues(GLOBAL, T)
    for queues in (task, everything):
        queues.push(chunks(batch, 10), pred(0.0))
    assert [held(task.draw(batch), row) for row in range(B)] == [[10], [11], [12]]
    assert [sorted(held(everything.draw(batch), row)) for row in range(B)] == [[10, 11, 12]] * B


def test_resume_is_exact(tmp_path) -> None:
    batch, first = make_batch(), ChunkQueues(TASK, T)
    second = ChunkQueues(TASK, T)
    second.load_state_dict(first.state_dict())  # an empty one, too
    first.push(chunks(batch, 10), random(B, G, T, 128))
    torch.save(first.state_dict(), tmp_path / "queues.pt")
    second.load_state_dict(torch.load(tmp_path / "queues.pt"))
    for value in range(20, 60, 10):
        for queues in (first, second):
            queues.push(chunks(batch, value), random(B, G, T, 128, seed=value))
        for a, b in zip(first.draw(batch), second.draw(batch)):
            assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    with pytest.raises(UserError, match="chunks is .* expected"):
        ChunkQueues(TASK, T + 1).load_state_dict(first.state_dict())


def descended(config: LossConfig, text_differs: bool) -> torch.Tensor:
    """16 free samples for each of two observations, whose experts do +0.5 and −0.5, after descent [2,16]: mean over
    entries."""
    batch = make_batch()
    two = batch.map(lambda value: value[:2]).replace(
        embodiment=torch.zeros(2, dtype=torch.int64), action_mask=(torch.arange(128) < 3).expand(2, 128).contiguous()
    )
    if not text_differs:
        two = two.replace(text=two.text[:1].expand_as(two.text).contiguous())
    samples = (0.3 * random(2, 16, T, 128)).requires_grad_()
    queues = ChunkQueues(config, T) if config.queue != "none" else None
    optimizer = torch.optim.Adam([samples], lr=0.02)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 100)
        level = torch.tensor([0.5, -0.5])[:, None, None] + 0.02 * random(2, T, 128, seed=step)
        current = two.replace(action=level)
        noise, alpha = torch.zeros(2, 16, T, 64), torch.ones(2)
        loss = head_loss(lambda *_: samples, current, config, noise=noise, alpha=alpha, queues=queues)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return samples.detach()[..., :3].mean((2, 3))


@one_thread()
def test_a_global_queue_forgets_the_condition() -> None:
    """With it each observation's samples go to both experts' actions, p(a); with a queue per task, or none, to its own,
    p(a | o)."""

    def wrong(config: LossConfig, text_differs: bool = True) -> float:
        ends = descended(config, text_differs)
        return torch.cat([ends[0] < -0.1, ends[1] > 0.1]).float().mean().item()

    everything = LossConfig(kind="pure_drift", queue="global", queue_size=16)
    task = LossConfig(kind="pure_drift", queue="task", queue_size=16)
    assert wrong(LossConfig(kind="pure_drift")) == 0.0 and wrong(task) == 0.0
    assert wrong(everything) > 0.2 and wrong(task, text_differs=False) > 0.2


def test_queues_add_to_what_is_given_and_take_the_batch() -> None:
    net, batch, queues = make_net(), make_batch(), ChunkQueues(TASK, T)
    config, common = LossConfig(kind="pure_drift"), {"noise": NOISE, "alpha": ALPHA}
    near = {"negatives": random(B, 2, T, 128, seed=1), "w_neg": random(B, 2).exp()}
    first = head_loss(net, batch, config, **common, **near, queues=queues)  # empty queues: as if there were none
    torch.testing.assert_close(first.total, head_loss(net, batch, config, **common, **near).total)
    drawn = queues.draw(batch)
    assert torch.equal(drawn.weight, torch.tensor([1.0, 0, 0]).expand(B, 3))
    assert torch.equal(drawn.positives[:, 0], batch.action) and torch.equal(
        drawn.negatives[:, 0], net(batch, NOISE, ALPHA)[:, 0]
    )
    second = head_loss(net, batch, config, **common, **near, queues=queues)
    full = {
        "positives": batch.action[:, None],
        "w_neg": torch.cat([near["w_neg"], torch.ones(B, 1)], 1),
        "negatives": torch.cat([near["negatives"], drawn.negatives[:, :1]], 1),
    }
    torch.testing.assert_close(second.total, policy_loss(net(batch, NOISE, ALPHA), batch, config, **full).total)
    assert not torch.allclose(second.mean_square, first.mean_square)


def test_settings_are_checked() -> None:
    for kind in ("mse", "flow"):
        with pytest.raises(UserError, match="drift"):
            LossConfig(kind=kind, queue="task")
    with pytest.raises(UserError, match="did you mean 'global'"):
        LossConfig(queue="globl")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="queue_size"):
        LossConfig(queue_size=0)
    with pytest.raises(ValueError, match="none"):
        ChunkQueues(LossConfig(), T)
    for config in (TASK, LossConfig(neighbours=2)):  # never without effect
        with pytest.raises(UserError, match="fills none"):
            head_loss(make_net(), make_batch(), config, noise=NOISE, alpha=ALPHA)
