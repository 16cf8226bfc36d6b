"""The Python API: what `import dvla` gives, what its objects say of themselves, and names of earlier releases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import dvla
from dvla.cache.loader.loader import gather
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.policy.policy import Policy
from dvla.stages.serving.config import ServeConfig
from dvla.stages.serving.server import PolicyServer, in_background
from support import synthetic_cache as synthetic
from support.repository import ROOT
from support.run_samples import TINY, VIEWS, make_run, observations

NAMES = ("Cache", "FeatureBatch", "Loader", "Policy", "PolicyClient")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("api") / "cache"
    synthetic.build(path)
    return dvla.Cache.open(path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    base = tmp_path_factory.mktemp("policy")
    return dvla.Policy.from_pretrained(make_run(base / "run", make_tiny_qwen3vl(base / "vlm", TINY)))


def python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.strip()


def test_importing_is_cheap(tmp_path: Path) -> None:
    code = "import sys, dvla; dvla.__version__, dir(dvla); print([m for m in sys.modules if m.split('.')[0] in {}])"
    assert python(code.format({"torch", "numpy", "yaml"}), tmp_path) == "[]"
    code = "import sys, dvla; dvla.PolicyClient; print('torch' in sys.modules)"
    assert python(code, tmp_path) == "False"  # it runs on robots
    assert set(dvla.__all__) == {*NAMES, "__version__"} <= set(dir(dvla))
    assert dvla.Policy is Policy and dvla.Cache is Cache
    with pytest.raises(AttributeError, match="has no attribute 'Polcy'"):
        dvla.Polcy  # noqa: B018


@pytest.mark.slow
def test_a_type_checker_sees_it(tmp_path: Path) -> None:
    (tmp_path / "dvla").symlink_to(ROOT)  # mypy does not follow the finder of an editable installation
    asked = (*(f"dvla.{name}" for name in NAMES), "dvla.Cache.open('c').dataset()[0]", "policy.act({})", "dvla.Polcy")
    lines = ["import dvla", "policy = dvla.Policy.from_pretrained('run')", *(f"reveal_type({x})" for x in asked)]
    (tmp_path / "user.py").write_text("\n".join(lines))
    flags = ("--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", str(tmp_path / "mypy"))
    command = [sys.executable, "-m", "mypy", *flags, "user.py"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    for name, module in dvla._MODULES.items():
        assert f"-> dvla.{module}.{name}" in shown, shown
    assert '"dict[str, torch._tensor.Tensor]"' in shown and "numpy.ndarray" in shown
    assert shown.count("error:") == 1 and 'Module has no attribute "Polcy"' in shown


def test_earlier_names(tmp_path: Path) -> None:
    """Of README and the cards of policies that are on the hub."""
    from dvla.stages.policy import Policy as from_room
    from dvla.stages.serving.client import PolicyClient

    assert from_room is dvla.Policy and PolicyClient is dvla.PolicyClient
    pytest.importorskip("lerobot")
    from dvla.stages.lerobot_plugin import DvlaConfig, DvlaPolicy

    assert DvlaPolicy.config_class is DvlaConfig


def test_objects_say_what_they_are(cache: Cache, policy: Policy) -> None:
    assert len(cache) == cache.frames == 169
    nbytes = cache.manifest["bytes"]
    assert repr(cache) == (
        f"Cache('{cache.path}': datasets 2, episodes 11, frames 169, tokens 3 × 8 per view, float16, "
        f"{nbytes / 1024:.1f} KiB)"
    )
    with dvla.Loader(cache, batch_size=4, horizon=5) as loader:
        assert repr(loader).startswith("Loader(") and "batch size 4, horizon 5, order global" in repr(loader)
    batch = gather(cache, [0], [0], 5)
    assert "tokens float16 [1, 6, 8]" in repr(batch) and "action float32 [1, 5, 128]" in repr(batch)
    assert "on cpu" in repr(batch) and "token_scale" not in repr(batch) and len(repr(batch)) < 800
    assert repr(policy) == "Policy(robot toy, views front, wrist, state [3], actions [4, 3], hybrid head, device cpu)"
    with in_background(PolicyServer(policy, ServeConfig(port=0))) as port, dvla.PolicyClient(port=port) as client:
        assert repr(client) == f"PolicyClient(127.0.0.1:{port}, robot toy, views front, wrist)"


@pytest.mark.parametrize("setting", ["fp16", "int8-zstd-stride2-variant"])
def test_samples_are_those_of_the_loader(setting: str, tmp_path: Path) -> None:
    synthetic.build(tmp_path / "c", plan=synthetic.make_plan(**synthetic.SETTINGS[setting]))
    cache = Cache.open(tmp_path / "c")
    samples = cache.dataset(horizon=7)
    assert len(samples) == sum(int(d.episode_observations[~d.quarantined].sum()) for d in cache.datasets)
    batches = list(DataLoader(samples, batch_size=25))
    found = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    expected = gather(cache, found["dataset"].numpy(), found["frame_index"].numpy(), 7)
    for name, values in found.items():
        assert torch.equal(values, getattr(expected, name)), name
    assert dvla.FeatureBatch(**found).check() is not None and not found["step_mask"].all()
    assert len({(int(d), int(r)) for d, r in zip(found["dataset"], found["frame_index"])}) == len(samples)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_samples_in_worker_processes(cache: Cache, start: str) -> None:
    samples = cache.dataset(horizon=3)
    held_out = Subset(samples, range(int(samples.episode_ends[-3]), len(samples)))  # the last two episodes
    assert {int(x["dataset"]) for x in held_out} == {1}
    loader = DataLoader(samples, batch_size=16, shuffle=True, num_workers=2, multiprocessing_context=start)
    rows = torch.cat([batch["frame_index"] + 1000 * batch["dataset"] for batch in loader])
    expected = [int(x["frame_index"] + 1000 * x["dataset"]) for x in samples]
    assert sorted(rows.tolist()) == sorted(expected) and rows.tolist() != expected


def test_refusals_of_samples(cache: Cache) -> None:
    samples = cache.dataset()
    assert samples.horizon == 16 and torch.equal(samples[-1]["action"], samples[len(samples) - 1]["action"])
    with pytest.raises(IndexError, match=f"sample {len(samples)} of {len(samples)}"):
        samples[len(samples)]
    with pytest.raises(UserError, match="horizon 0: give at least 1"):
        cache.dataset(horizon=0)


def test_a_pickled_cache_is_the_same_one(tmp_path: Path) -> None:
    import pickle

    synthetic.build(tmp_path / "c")
    kept = pickle.dumps(Cache.open(tmp_path / "c"))
    assert len(pickle.loads(kept)) == 169 and len(kept) < 500
    (tmp_path / "c").rename(tmp_path / "before")
    synthetic.build(tmp_path / "c", plan=synthetic.make_plan(8))
    with pytest.raises(UserError, match="was replaced since it was opened"):
        pickle.loads(kept)


def test_acting_on_what_users_have(policy: Policy) -> None:
    seen = observations(1)[0]
    expected = policy.act(seen.images, seen.instruction, seen.state)
    tensors = {view: torch.from_numpy(image) for view, image in seen.images.items()}
    floats = {view: image.permute(2, 0, 1) / 255 for view, image in tensors.items()}  # [3, H, W]
    state = torch.from_numpy(seen.state)
    for images in (tensors, floats, floats | {"depth": torch.zeros(3)}):
        np.testing.assert_array_equal(policy.act(images, seen.instruction, state), expected)
    np.testing.assert_array_equal(policy.act(tensors, seen.instruction, seen.state.tolist()), expected)
    lerobot = {f"observation.images.{view}": image for view, image in floats.items()}
    lerobot |= {"observation.state": state, "task": seen.instruction}
    np.testing.assert_array_equal(policy.act(lerobot), expected)
    batched = {k: v[None] if isinstance(v, torch.Tensor) else [v] for k, v in lerobot.items()}
    np.testing.assert_array_equal(policy.act(batched), expected[None])


def test_acting_refuses_what_it_cannot_use(policy: Policy) -> None:
    seen = observations(1)[0]
    image = torch.rand(3, 20, 20)

    def refused(images: object, state: object = seen.state, text: object = "go") -> str:
        with pytest.raises(UserError) as error:
            policy.act(images, text, state)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
        return str(error.value)

    both = dict.fromkeys(VIEWS, image)
    assert "values from" in refused(both | {"wrist": image * 255}) and "[0, 1]" in refused(
        both | {"wrist": image * 255}
    )
    assert "values from" in refused(both | {"wrist": image * float("nan")})
    assert refused(both | {"front": image.permute(1, 2, 0)}).startswith("image 'front' is float32 [20, 20, 3]; give")
    assert refused(both | {"front": image[:, :0]}).startswith("image 'front' is float32 [3, 0, 20]")
    assert refused(both | {"front": image.int()}).startswith("image 'front' is int32 [3, 20, 20]")
    assert "unknown view 'wrist'" in refused({"front": image}) and "needs images of front, wrist" in refused({})
    assert refused(both, [1.0, 2.0]).startswith("the state is float64 [2]; give [3] finite numbers: right_eef_pos_x")
    assert "finite" in refused(both, [1.0, 2.0, float("nan")])
    assert refused(both, text=3) == "the instruction must be text, got int"
    assert refused(both, None).startswith("give images, instruction and state, or one observation dict")
    dicts = {f"observation.images.{view}": image for view in VIEWS}
    assert refused(dicts, None, None).startswith("observation.state is missing; the observation has observation.images")
    batched = {k: v[None] for k, v in dicts.items()} | {"observation.state": torch.zeros(2, 3)}
    assert "their counts must match" in refused(batched, None, None)
