"""The field and the drifting loss against the official numbers (tests/golden), and the identities they must obey."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dvla.drifting.field import _pull, drifting_field, grouped_drifting_field
from dvla.drifting.losses import drifting_loss
from support.repository import ROOT

GOLDEN = ROOT / "tests" / "golden" / "drifting_public.npz"
CASES = [f"p{i}" for i in range(8)]


def arrays(path: Path, case: str) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {
            k.split("/")[1]: torch.as_tensor(file[k])
            for k in file.files
            if k.startswith(case + "/") and file[k].dtype.kind in "fb"
        }


def call(a: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[tuple, dict]:
    """Arguments of drifting_field for a golden case."""
    if "x" in a:
        neg = None if bool(a["self_mask"]) else a["y_neg"][None].to(dtype)
        return (a["x"][None].to(dtype), a["y_pos"][None].to(dtype), neg), {"temperatures": a["temps"].tolist()}
    args = (a["gen"].to(dtype), a["pos"].to(dtype), a["neg"].to(dtype))
    return args, {"temperatures": a["temps"].tolist(), **{k: a[k] for k in ("w_gen", "w_pos", "w_neg")}}


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """max|difference| <= relative · max|expected|"""
    assert actual.shape == expected.shape
    error, size = (actual.double() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= relative * size, f"{error:.3e} > {relative:g} · {size:.3e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_released_algorithm(case: str, dtype: torch.dtype) -> None:
    check_released(arrays(GOLDEN, case), case, dtype)


def check_released(a: dict[str, torch.Tensor], case: str, dtype: torch.dtype) -> None:
    relative = 2e-5 if dtype == torch.float32 else 1e-8 if case == "p5" else 1e-9
    (gen, pos, neg), options = call(a, dtype)
    gen.requires_grad_()
    loss = drifting_loss(gen, pos, neg, **options)
    (gradient,) = torch.autograd.grad(loss.per_condition.sum(), gen)
    assert loss.field.force.dtype == dtype
    close(loss.field.scale, a["jax_f64_scale"], relative)
    close(loss.field.mean_square, a["jax_f64_lossR"], relative)
    close(loss.field.force, a["jax_f64_Vsum"], relative)
    close(loss.per_condition, a["jax_f64_loss"], relative)
    close(gradient, a["jax_f64_grad"], relative)
    for k, tau in enumerate(options["temperatures"] if "jax_f64_V_R" in a else ()):
        one = drifting_field(gen, pos, neg, **{**options, "temperatures": (tau,)})
        close(one.force, a["jax_f64_V_R"][k], relative)


@pytest.mark.parametrize("case", CASES[:5])
def test_algorithm_2(case: str) -> None:
    check_algorithm_2(arrays(GOLDEN, case), 1e-9)


def check_algorithm_2(a: dict[str, torch.Tensor], relative: float) -> None:
    args, options = call(a, torch.float64)
    for k, tau in enumerate(options["temperatures"]):
        field = drifting_field(*args, temperatures=(tau,), floor=None)
        close(field.force[0], a["alg2_V"][k], relative)
        assert field.mean_square[0].item() == pytest.approx(a["alg2_V"][k].square().mean().item(), rel=1e-9)
    gen = args[0].clone().requires_grad_()
    loss = drifting_loss(gen, *args[1:], floor=None, temperatures=(0.2,))  # coordinates are not rescaled
    loss.per_condition.sum().backward()
    close(-gen.grad * gen[0].numel() / 2, a["alg2_V"][options["temperatures"].index(0.2)][None], relative)


@pytest.mark.parametrize("case", CASES)
def test_shared_golden(case: str, shared_dir: Path) -> None:
    full = arrays(shared_dir / "golden" / "golden_drifting.npz", case)
    for name, value in arrays(GOLDEN, case).items():
        assert torch.equal(value, full[name]), f"the committed {case}/{name} is not the shared one"
    check_released(full, case, torch.float64)
    if "alg2_V" in full:
        check_algorithm_2(full, 1e-8 if case == "p5" else 1e-9)


def samples(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_no_drift_at_equilibrium_and_antisymmetry() -> None:
    x, p, q = samples(2, 6, 3), samples(2, 9, 3, seed=1) + 0.5, samples(2, 7, 3, seed=2)
    wide = {"temperatures": (0.5,), "floor": None}
    forward, backward = drifting_field(x, p, q, **wide).force, drifting_field(x, q, p, **wide).force
    assert forward.abs().max() > 0.1
    torch.testing.assert_close(forward, -backward, rtol=0, atol=1e-12)
    assert drifting_field(x, p, p, **wide).force.abs().max() < 1e-12


def test_translation_scale_and_permutation() -> None:
    gen, pos, neg = samples(3, 6, 4), samples(3, 5, 4, seed=1) + 1, samples(3, 2, 4, seed=2)
    w_pos = samples(3, 5, seed=3).exp()
    base = drifting_field(gen, pos, neg, w_pos=w_pos)
    shift = samples(3, 1, 4, seed=4) * 10
    moved = drifting_field(gen + shift, pos + shift, neg + shift, w_pos=w_pos)
    torch.testing.assert_close(moved.force, base.force, rtol=0, atol=1e-9)
    # Scaled coordinates do not see the size, but for the floor 1e-4 under the self-distance in the mean.
    larger = drifting_field(gen * 7, pos * 7, neg * 7, w_pos=w_pos)
    torch.testing.assert_close(larger.force, base.force, rtol=0, atol=1e-4)
    torch.testing.assert_close(larger.scale, base.scale * 7, rtol=1e-4, atol=0)
    g, p = torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    mixed = drifting_field(gen[:, g], pos[:, p], neg.flip(1), w_pos=w_pos[:, p])
    torch.testing.assert_close(mixed.force, base.force[:, g], rtol=0, atol=1e-12)


@pytest.mark.parametrize("floor", [None, 1e-6])
def test_attraction_and_repulsion_carry_equal_weight(floor: float | None) -> None:
    """ΣW_pos = ΣW_neg in every row, read off with marker coordinates: (1,0) for negatives, (0,1) for positives."""
    logits, weight = samples(2, 3, 5, 9), samples(2, 9, seed=1).exp()  # [B,K,G,N], [B,N]
    y = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 3, dtype=torch.float64).expand(2, 9, 2)
    sums = _pull(torch.zeros(2, 5, 2, dtype=torch.float64), y, logits, weight, negatives=6, floor=floor)
    assert (sums[..., 1] > 1e-3).all()
    torch.testing.assert_close(sums[..., 0], -sums[..., 1])


def test_conditions_are_never_compared() -> None:
    gen, pos = samples(2, 4, 3), samples(2, 2, 3, seed=1)
    far = pos.clone()
    far[1] += 0.3
    before, after = (grouped_drifting_field(gen, p, group=torch.tensor([0, 1]), groups=2) for p in (pos, far))
    assert torch.equal(before.force[0], after.force[0]) and not torch.equal(before.force[1], after.force[1])


def test_inactive_entries_do_not_count() -> None:
    """Grouped, masked conditions give what each group gives alone on its active entries."""
    gen, pos, neg = samples(5, 4, 6), samples(5, 2, 6, seed=1), samples(5, 3, 6, seed=2)
    active = torch.tensor([[1, 1, 0, 1, 0, 0]] * 3 + [[0, 1, 1, 1, 1, 0]] * 2, dtype=torch.bool)
    group = torch.tensor([2, 2, 2, 0, 0])
    mixed = grouped_drifting_field(gen, pos, neg, active=active, group=group, groups=4)
    for rows, e in ((slice(0, 3), 2), (slice(3, 5), 0)):
        columns = active[rows][0]
        alone = drifting_field(gen[rows][..., columns], pos[rows][..., columns], neg[rows][..., columns])
        torch.testing.assert_close(mixed.force[rows][..., columns], alone.force)
        assert not mixed.force[rows][..., ~columns].any()
        torch.testing.assert_close(mixed.mean_square[:, e], alone.mean_square)
        torch.testing.assert_close(mixed.scale[e] * columns.sum().sqrt(), alone.scale)
    assert not mixed.scale[[1, 3]].any() and not mixed.mean_square[:, [1, 3]].any()


def test_condition_without_active_entries_is_left_out() -> None:
    gen, pos = samples(3, 4, 6), samples(3, 1, 6, seed=1)
    active = torch.ones(3, 6, dtype=torch.bool)
    active[1] = False
    some, rest = grouped_drifting_field(gen, pos, active=active), drifting_field(gen[[0, 2]], pos[[0, 2]])
    torch.testing.assert_close(some.force[[0, 2]], rest.force)
    assert not some.force[1].any() and torch.isfinite(some.force).all()


def test_autocast_and_matmul_precision_change_nothing() -> None:
    gen, pos = samples(2, 8, 16, dtype=torch.float32), samples(2, 4, 16, seed=1, dtype=torch.float32)
    plain = drifting_loss(gen, pos)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = drifting_loss(gen, pos)
    assert torch.equal(plain.field.force, inside.field.force)
    assert torch.equal(plain.per_condition, inside.per_condition)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # TF32 on CUDA; bf16 products on CPUs that have them
    try:
        assert torch.equal(drifting_field(gen, pos).force, plain.field.force)
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_float32_matrix_product() -> None:
    """TF32 acts on float32 products alone; the field has none, so no setting can degrade it on any device."""
    products, aten = [], torch.ops.aten

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
                products.append(args[-1].dtype)
            return function(*args, **(kwargs or {}))

    gen = samples(2, 40, 16, dtype=torch.float32)
    with Watch():
        drifting_loss(gen, gen[:, :30])
    assert products and set(products) == {torch.float64}


def test_pairwise_differences_are_never_built() -> None:
    """No tensor allocated in the field is as large as [G,N,D]."""
    g, p, d = 64, 64, 256
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        drifting_field(samples(1, g, d), samples(1, p, d, seed=1))
    assert 0 < largest <= 4 * max(g * (g + p), (g + p) * d) < g * (g + p) * d // 8


@pytest.mark.parametrize("bad", [{"pos": (2, 3, 5)}, {"neg": (1, 3, 4)}, {"w_pos": (2, 4)}, {"pos": (2, 0, 4)}])
def test_unfitting_shapes_are_refused(bad: dict[str, tuple[int, ...]]) -> None:
    given = {"gen": (2, 5, 4), "pos": (2, 3, 4), "neg": (2, 1, 4), **bad}
    with pytest.raises(ValueError):
        drifting_field(**{k: torch.ones(s) for k, s in given.items()})


WORKER = """
import sys, torch, torch.distributed as dist
from dvla.drifting.losses import drifting_loss
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def reduce(sums):
    dist.all_reduce(sums)
    return sums
gen, pos = torch.load(f"{folder}/in.pt")
mine = slice(0, 2) if rank == 0 else slice(2, 5)       # ranks need not have equally many conditions
loss = drifting_loss(gen[mine], pos[mine], reduce=reduce)
torch.save((loss.per_condition, loss.field.force, loss.field.scale, loss.field.mean_square), f"{folder}/out{rank}.pt")
dist.destroy_process_group()    # or gloo's threads may outlive the interpreter
"""


def test_two_ranks_give_the_single_process_result(tmp_path: Path) -> None:
    gen, pos = samples(5, 4, 8), samples(5, 1, 8, seed=1) * 2
    torch.save((gen, pos), tmp_path / "in.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(r), str(tmp_path)], env=environment, cwd=tmp_path)
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"out{r}.pt") for r in range(2))
    single = drifting_loss(gen, pos)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), single.per_condition)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), single.field.force)
    for i, expected in ((2, single.field.scale), (3, single.field.mean_square)):
        torch.testing.assert_close(first[i], expected)
        torch.testing.assert_close(second[i], expected)
