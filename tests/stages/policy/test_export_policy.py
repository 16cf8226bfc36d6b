"""`dvla export`: the folder acts as its checkpoint does, loads without anything of training, and its graphs compute
what the network does."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvla.cache.vlm.adapter import tower_parameters
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import lora_parameters
from dvla.cache.vlm.spec import LoraSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.drifting.config import LossConfig
from dvla.drifting.heads import generate
from dvla.drifting.policy_net import PolicyNet
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy import export as export_module
from dvla.stages.policy import graph as policy_graph
from dvla.stages.policy.export import export_policy
from dvla.stages.policy.lerobot_files import NAMES
from dvla.stages.policy.policy import Policy
from support.cli_runner import Dvla, refused
from support.policy_samples import ALPHA, NOISE, make_batch, make_net
from support.run_samples import TINY, make_run, observations

LORA = LoraSpec(r=2, alpha=4.0, targets="all-linear")
FILES = {"policy.json", "model.safetensors", "state.json", "README.md", *NAMES}
ROUNDING = 2e-3  # of the actions' spread: a merged weight rounds otherwise, and features are rounded to float16


@pytest.fixture(scope="module")
def vlms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("vlm")
    return {
        "qwen3vl": make_tiny_qwen3vl(base / "qwen", TINY),
        "paligemma2": make_tiny_paligemma2(base / "pali", TinyPaliGemmaSpec()),
    }


@pytest.fixture(scope="module")
def plain(vlms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("plain") / "run", vlms["qwen3vl"])


@pytest.fixture(scope="module")
def adapted(vlms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("adapted") / "run", vlms["qwen3vl"], lora=LORA)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# --- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blind", [False, True])
def test_without_lora_it_acts_alike_to_the_bit(
    vlms: dict[str, Path], tmp_path: Path, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", vlms["qwen3vl"], blind=blind)
    expected = Policy.from_pretrained(run).act_batch(observations())
    with monkeypatch.context() as patch:  # nothing has to be merged: the VLM need not be there
        patch.setattr(export_module, "load_policy_encoder", lambda *_: pytest.fail("read the VLM"))
        done = export_policy(run, tmp_path / "deep" / "policy")
    shutil.rmtree(run)
    assert (done.step, done.merged, files(done.path)) == (7, 0, FILES)
    policy = Policy.from_pretrained(done.path)
    assert policy.needs_images is not blind and expected.shape == (3, 4, 3)
    np.testing.assert_array_equal(policy.act_batch(observations()), expected)


@pytest.mark.parametrize("arch, lora", [("qwen3vl", LORA), ("paligemma2", LORA), ("qwen3vl", None)])
def test_with_what_fine_tuning_changed_it_acts_alike(
    vlms: dict[str, Path], tmp_path: Path, arch: str, lora: LoraSpec | None
) -> None:
    run = make_run(tmp_path / "run", vlms[arch], arch, lora, tower=lora is None)
    checkpoint = Policy.from_pretrained(run)
    expected = checkpoint.act_batch(observations())
    done = export_policy(run, tmp_path / "policy")
    shutil.rmtree(run)
    policy = Policy.from_pretrained(tmp_path / "policy")
    assert policy.encoder.adapter is None and policy.encoder.fingerprint() == checkpoint.encoder.fingerprint()
    found, spread = policy.act_batch(observations()), np.std(expected)
    np.testing.assert_allclose(found, expected, atol=ROUNDING * spread)
    weights = load_file(tmp_path / "policy" / "vision.safetensors")
    trained = lora_parameters(checkpoint.encoder) if lora else tower_parameters(checkpoint.encoder)
    assert len(weights) == done.merged == len(list(trained)) / (2 if lora else 1)
    assert all(t.dtype == torch.float32 and "lora" not in name for name, t in weights.items())
    assert files(done.path) == {*FILES, "vision.safetensors"}
    assert not any(name.startswith("adapter.") for name in load_file(done.path / "model.safetensors"))
    policy.encoder.vision.load_state_dict(
        load_encoder(policy.encoder.spec).vision.state_dict()
    )  # the base model's again
    assert np.abs(policy.act_batch(observations()) - expected).max() > 10 * ROUNDING * spread


def test_adapters_below_the_policy_are_merged_too(vlms: dict[str, Path], tmp_path: Path) -> None:
    """A policy that was trained on features of a fine-tuned encoder, and fine-tuned again."""
    first = ck.resolve(make_run(tmp_path / "first", vlms["qwen3vl"], tower=True)) / "adapter"
    run = make_run(tmp_path / "run", vlms["qwen3vl"], lora=LORA, below=(str(first),))
    checkpoint = Policy.from_pretrained(run)
    expected = checkpoint.act_batch(observations())
    export_policy(run, tmp_path / "policy")
    for folder in (tmp_path / "first", run):
        shutil.rmtree(folder)
    policy = Policy.from_pretrained(tmp_path / "policy")
    np.testing.assert_allclose(policy.act_batch(observations()), expected, atol=ROUNDING * np.std(expected))
    assert policy.encoder.fingerprint() == checkpoint.encoder.fingerprint() and policy.encoder.spec.adapters == ()


def test_an_export_can_be_exported(
    adapted: Path, vlms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(vlms["qwen3vl"].parent)  # a relative path of the VLM becomes absolute
    first = export_policy(adapted, tmp_path / "first" / "p", vlm_path="qwen")
    monkeypatch.chdir(tmp_path)
    second = export_policy(first.path, tmp_path / "second" / "p")
    assert {f: (first.path / f).read_bytes() for f in files(first.path)} == {
        f: (second.path / f).read_bytes() for f in files(second.path)
    }
    assert (first.vlm, second.merged) == (str(vlms["qwen3vl"]), first.merged)
    assert np.isfinite(Policy.from_pretrained(second.path).act_batch(observations())).all()


def test_it_loads_without_anything_of_training(adapted: Path, tmp_path: Path) -> None:
    export_policy(adapted, tmp_path / "policy")
    code = (
        "import sys, json, numpy as np\nfrom dvla.stages.policy import Policy\n"
        "policy = Policy.from_pretrained(sys.argv[1])\n"
        "chunk = policy.act({v: np.zeros((64, 64, 3), np.uint8) for v in ('front', 'wrist')}, 'push', np.zeros(3))\n"
        "print(json.dumps([list(chunk.shape), sorted(sys.modules)]))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "policy"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=env,
    )
    shape, loaded = json.loads(out.stdout.splitlines()[-1])
    assert shape == [4, 3]
    stages = {name.split(".")[2] for name in loaded if name.startswith("dvla.stages.")}
    assert stages == {"policy"}
    training = {
        "dvla.cache.loader.loader",
        "dvla.cache.store.writer",
        "dvla.cache.loader.assembler",
        "dvla.cache.loader.prefetch",
        "peft",
        "wandb",
        "deepspeed",
        "dask",
        "distributed",
        "webdataset",
        "lerobot",
        "typer",
        "dvla.common.console",
    }  # rich comes with huggingface-hub 1, through httpx
    assert training & set(loaded) == set()


def test_a_damaged_or_foreign_export_is_refused(adapted: Path, vlms: dict[str, Path], tmp_path: Path) -> None:
    export_policy(adapted, tmp_path / "policy")
    other = make_tiny_qwen3vl(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    wider = make_tiny_qwen3vl(tmp_path / "wider", dataclasses.replace(TINY, vision_mlp=4))
    with pytest.raises(
        UserError, match="vision.safetensors does not fit .*wider: blocks.0.*give the VLM it was trained on"
    ):
        Policy.from_pretrained(tmp_path / "policy", vlm_path=str(wider))
    with pytest.raises(UserError, match="belongs to another VLM than .*other: weights_sha256"):
        Policy.from_pretrained(tmp_path / "policy", vlm_path=str(other))
    with pytest.raises(UserError, match="belongs to another VLM than .*other: weights_sha256"):
        export_policy(adapted, tmp_path / "second", vlm_path=str(other))
    content = bytearray((tmp_path / "policy" / "vision.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "policy" / "vision.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="vision.safetensors is damaged"):
        Policy.from_pretrained(tmp_path / "policy")
    assert {p.name for p in tmp_path.iterdir()} == {"policy", "other", "wider"}


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(adapted: Path, vlms: dict[str, Path], tmp_path: Path, dvla: Dvla) -> None:
    result = dvla("export", adapted, "--out", tmp_path / "policy", "--format", "policy")
    said = " ".join(result.out.split())
    assert (
        result.code == 0
        and "policy of step 7" in said
        and "with 10 fine-tuned weights" in said
        and str(vlms["qwen3vl"]) in said.replace(" ", "")
    )
    before = {f: (tmp_path / "policy" / f).read_bytes() for f in files(tmp_path / "policy")}
    refused(dvla("export", adapted, "--out", tmp_path / "policy"), "exists already", "--out")
    assert {f: (tmp_path / "policy" / f).read_bytes() for f in files(tmp_path / "policy")} == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("{tmp}/none", "--out", "{tmp}/out"), ("no run or checkpoint at",)),
        (("{run}", "--out", "{tmp}/file/out"), ("cannot write", "choose another --out")),
        (("{run}", "--out", "{tmp}/file"), ("exists already",)),
        (("{run}", "--out", "{tmp}/out", "--format", "onx"), ("unknown format 'onx'", "did you mean 'onnx'?")),
        (("{run}", "--out", "{tmp}/out", "--vlm-path", "{tmp}/none"), ("does not exist",)),
        (("{run}",), ("--out",)),
    ],
)
def test_bad_input_is_one_line(
    adapted: Path, tmp_path: Path, dvla: Dvla, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("mine")
    refused(dvla("export", *(a.format(run=adapted, tmp=tmp_path) for a in arguments)), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("limit", [1 << 12, 1 << 18])
def test_a_full_disk_is_one_line(
    plain: Path, tmp_path: Path, dvla: Dvla, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Files end at `limit` bytes, which the policy's weights do not reach in the second case, and its graph does."""
    graph = lambda _, file, names: file.write_bytes(bytes(1 << 20))  # noqa: E731
    monkeypatch.setattr(policy_graph.torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(policy_graph, "_torch_export", graph)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        result = dvla(
            "export", plain, "--out", tmp_path / "policy", *(("--format", "torch-export") if limit > 1 << 12 else ())
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    refused(result, "cannot write", "File too large", "make room")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_graph_is_refused(
    plain: Path, vlms: dict[str, Path], tmp_path: Path, dvla: Dvla, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = make_run(tmp_path / "flow", vlms["qwen3vl"], kind="flow")
    for name in policy_graph.FILES:
        refused(dvla("export", flow, "--out", tmp_path / "out", "--format", name), "a flow head", "leave --format out")
    assert dvla("export", flow, "--out", tmp_path / "out").code == 0
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name) or find("torch")
    )
    refused(
        dvla("export", plain, "--out", tmp_path / "graph", "--format", "onnx"), "onnxscript", "pip install 'dvla[onnx]'"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"flow", "out"}


# --- graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """An exported policy with every graph whose libraries are here."""
    formats = ["torch-export"]
    try:
        policy_graph.require_formats(["onnx"], "hybrid")
        formats.append("onnx")
    except UserError:
        pass
    done = export_policy(plain, tmp_path_factory.mktemp("graphs") / "policy", tuple(formats))
    return done.path, done.differences


def through_the_graph(policy: Policy, name: str, folder: Path) -> np.ndarray:
    """What `Policy.act_batch` computes, with the graph in the place of the network."""
    batch, dit = policy._batch(observations()), policy.net.config.dit
    noise = torch.stack([policy._noise(o, (dit.horizon, dit.noise_dim)) for o in observations()])[:, None]  # [N,1,T,n]
    inputs = policy_graph.graph_inputs(batch, noise, torch.ones(len(noise)))
    if name == "torch-export":
        out = torch.export.load(folder / "policy.pt2").module()(**inputs)
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(
            str(folder / "policy.onnx"), providers=["CPUExecutionProvider"]
        )
        out = torch.from_numpy(session.run(["action"], {k: v.numpy() for k, v in inputs.items()})[0])
    return policy.robot.actions(out[:, 0].detach().numpy())


@pytest.mark.parametrize("name", ["torch-export", "onnx"])
def test_a_graph_acts_as_the_policy(graphs: tuple[Path, dict[str, float]], name: str) -> None:
    folder, differences = graphs
    if name not in differences:
        pytest.skip("onnx, onnxscript or onnxruntime is not installed")
    policy = Policy.from_pretrained(folder)  # the folder is a policy as well
    expected = policy.act_batch(observations())
    np.testing.assert_allclose(
        through_the_graph(policy, name, folder), expected, atol=policy_graph.TOLERANCE * np.std(expected)
    )
    described = json.loads((folder / "graph.json").read_text())
    assert (
        described["files"][name] == policy_graph.FILES[name]
        and described["difference"][name] == differences[name] <= policy_graph.TOLERANCE
    )
    assert described["inputs"]["noise"] == {"dtype": "float32", "shape": ["B", "G", 4, 64]}
    assert described["outputs"]["action"]["shape"] == ["B", "G", 4, 128]


def test_regression_on_features_of_two_widths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = PolicyNet(dataclasses.replace(make_net("front", kind="mse").config, text_width=10))
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch, loss = make_batch(), LossConfig(kind="mse")
    inputs = policy_graph.graph_inputs(batch.replace(text=batch.text[..., :10].contiguous()), NOISE, ALPHA)
    policy_graph.write_graphs(net, loss, ["torch-export"], tmp_path)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "policy.pt2").module()(**inputs)
        expected = generate(net, net.encode(batch.replace(text=batch.text[..., :10].contiguous())), NOISE, ALPHA, loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (3, 4, 5, 128) and tuple(inputs) == tuple(policy_graph.input_shapes(net))


def test_a_graph_that_differs_is_not_written(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Any, file: Path, names: Any) -> Any:
        file.write_bytes(b"graph")
        return lambda inputs: torch.zeros(*inputs["noise"].shape[:3], 128)

    monkeypatch.setattr(policy_graph.torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(policy_graph, "_torch_export", wrong)
    with pytest.raises(UserError, match="actions of the torch-export graph differ from the"):
        export_policy(plain, tmp_path / "policy", ("torch-export",))
    assert list(tmp_path.iterdir()) == []
