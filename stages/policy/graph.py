"""The policy network as one graph for other runtimes, torch.export (policy.pt2) or ONNX (policy.onnx).

A graph computes what `PolicyNet` does with a one-step head, and is checked against it: features of the VLM,
proprioception and noise in, an action chunk out. The VLM is not in it, nor is normalization: `graph_inputs` makes its
inputs from a `FeatureBatch`, and policy.json beside it holds field maps, statistics, scheme and frame of the actions.

Letters: B observations, G noise samples, T action steps, n noise entries, L vision tokens of all frames and views,
Lt text tokens, Hp past states, D feature width, Dt width of text features. B, G, L and Lt are free in a graph, each at
least 1.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...batch import UNIFIED_DIM, FeatureBatch
from ...common.packages import require_package
from ...drifting.config import DENOISING, ONE_STEP, LossConfig
from ...drifting.heads import generate
from ...drifting.policy_net import PolicyNet
from ...errors import UserError, unknown

FILES = {"torch-export": "policy.pt2", "onnx": "policy.onnx"}  # format → file
LIBRARIES = {"torch-export": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
TOLERANCE = 1e-4  # largest difference of an entry, over the root mean square of the network's output
ONE_FILE = 1 << 30  # bytes of weights beyond which ONNX keeps them in a second file: a protobuf ends at 2 GiB
SIZES = ((2, 3, 7, 4), (1, 1, 64, 1), (3, 1, 1, 9), (1, 2, 300, 5))  # (B, G, L, Lt) to check; the first is traced

Run = Callable[[dict[str, Tensor]], Tensor]


class PolicyGraph(nn.Module):
    """`generate` with every input of `graph_inputs` as an argument."""

    def __init__(self, net: PolicyNet, loss: LossConfig) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(
        self,
        noise: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        view_id: Tensor,
        text: Tensor,
        text_mask: Tensor,
        proprio: Tensor,
        embodiment: Tensor,
        control_hz: Tensor,
        alpha: Tensor,
        frame_id: Tensor | None = None,
        past_proprio: Tensor | None = None,
        past_mask: Tensor | None = None,
    ) -> Tensor:
        unread = tokens.new_zeros(0)  # a one-step head reads neither actions nor their masks
        batch = FeatureBatch(
            tokens=tokens,
            token_mask=token_mask,
            view_id=view_id,
            frame_id=torch.zeros_like(view_id) if frame_id is None else frame_id,
            text=text,
            text_mask=text_mask,
            proprio=proprio,
            action=unread,
            action_mask=unread,
            step_mask=unread,
            embodiment=embodiment,
            control_hz=control_hz,
            dataset=unread,
            frame_index=unread,
            past_proprio=past_proprio,
            past_mask=past_mask,
        )
        return generate(self.net, self.net.encode(batch), noise, alpha, self.loss)  # [B,G,T,128]


def require_formats(formats: Sequence[str], kind: str) -> None:
    """`UserError` for an unknown format, a head of several passes, or a library that is missing."""
    for name in formats:
        if name not in FILES:
            raise unknown("format", name, ("policy", *FILES, "lerobot"))
        if kind in DENOISING:
            raise UserError(
                f"leave --format out: {name} is for heads that act in one pass ({', '.join(ONE_STEP)}), and this "
                f"policy has a {kind} head, which calls its network many times"
            )
        for library in LIBRARIES[name]:
            require_package(library, f"--format {name}", "onnx", instead="use --format torch-export")


Shapes = dict[str, tuple[str, tuple[str | int, ...]]]


def input_shapes(net: PolicyNet, frames: int = 1) -> Shapes:
    """Name → (dtype, shape) of a graph's inputs, letters for what is free. `frames`: how many the policy sees."""
    c = net.config
    past: Shapes = {"frame_id": ("int64", ("B", "L"))} if frames > 1 else {}
    if c.past_states:
        past |= {"past_proprio": ("float32", ("B", c.past_states, UNIFIED_DIM))}
        past |= {"past_mask": ("bool", ("B", c.past_states))}
    return {
        "noise": ("float32", ("B", "G", c.dit.horizon, c.dit.noise_dim)),  # standard normal
        "tokens": ("float32", ("B", "L", c.feature_width)),
        "token_mask": ("bool", ("B", "L")),
        "view_id": ("int64", ("B", "L")),
        "text": ("float32", ("B", "Lt", c.text_width or c.feature_width)),
        "text_mask": ("bool", ("B", "Lt")),
        "proprio": ("float32", ("B", UNIFIED_DIM)),
        "embodiment": ("int64", ("B",)),
        "control_hz": ("float32", ("B",)),
        "alpha": ("float32", ("B",)),  # guidance scale; 1 where a policy acts
        **past,
    }


def graph_inputs(batch: FeatureBatch, noise: Tensor, alpha: Tensor) -> dict[str, Tensor]:
    """A graph's inputs for observations, with the frames and states of a history where they have them: noise [B,G,T,n],
    guidance scales [B]."""
    past = {} if batch.past_proprio is None else {n: getattr(batch, n) for n in ("past_proprio", "past_mask")}
    return {
        "noise": noise,
        "tokens": batch.tokens.float(),
        "token_mask": batch.token_mask,
        "view_id": batch.view_id,
        "text": batch.text.float(),
        "text_mask": batch.text_mask,
        "proprio": batch.proprio,
        "embodiment": batch.embodiment,
        "control_hz": batch.control_hz,
        "alpha": alpha,
        **({"frame_id": batch.frame_id} if bool(batch.frame_id.any()) else {}),
        **past,
    }


def write_graphs(
    net: PolicyNet, loss: LossConfig, formats: Sequence[str], folder: Path, frames: int = 1
) -> dict[str, Any]:
    """Write the graphs of `formats` into `folder`; returns the content of graph.json. `frames`: how many it sees.

    Each is checked against `net` on the CPU in float32. `UserError` where it differs, or torch cannot make it.
    """
    graph = PolicyGraph(net.float().cpu().eval().requires_grad_(False), loss).eval()
    shapes = input_shapes(net, frames)
    free = {letter: torch.export.Dim(letter, min=1) for letter in ("B", "G", "L", "Lt")}
    dynamic = {
        name: {i: free[size] for i, size in enumerate(shape) if size in free} for name, (_, shape) in shapes.items()
    }
    with _quiet():
        example = _example(net, shapes, frames, *SIZES[0])
        program = torch.export.export(graph, (), example, dynamic_shapes=dynamic, strict=False)
        errors = {}
        for name in formats:
            run = (_torch_export if name == "torch-export" else _onnx)(program, folder / FILES[name], tuple(shapes))
            errors[name] = _difference(graph, run, lambda *size: _example(net, shapes, frames, *size))
            if not errors[name] <= TOLERANCE:
                raise UserError(
                    f"nothing was written: with the installed libraries, actions of the {name} graph differ from the "
                    f"network's by {errors[name]:.2g} of their size (rounding explains {TOLERANCE})"
                )
    output = {"action": {"dtype": "float32", "shape": ["B", "G", net.config.dit.horizon, UNIFIED_DIM]}}
    inputs = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in shapes.items()}
    return {"files": {name: FILES[name] for name in formats}, "inputs": inputs, "outputs": output, "difference": errors}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings and logs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _torch_export(program: Any, file: Path, names: Sequence[str]) -> Run:
    made = io.BytesIO()  # torch's file writer ends the process when the disk is full
    torch.export.save(program, made)
    file.write_bytes(made.getbuffer())
    module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


def _onnx(program: Any, file: Path, names: Sequence[str]) -> Run:
    import onnxruntime

    try:
        made = torch.onnx.export(program, input_names=list(names), output_names=["action"], dynamo=True, verbose=False)
        assert made is not None  # with dynamo it is a program
        made.save(str(file), external_data=sum(t.nbytes for t in program.state_dict.values()) > ONE_FILE)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch cannot make the ONNX graph: {' '.join(str(error).split())[:300]}") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    read = {value.name for value in session.get_inputs()}
    return lambda inputs: torch.from_numpy(
        session.run(["action"], {n: x.numpy() for n, x in inputs.items() if n in read})[0]
    )


@torch.no_grad()
def _difference(graph: PolicyGraph, run: Run, example: Callable[..., dict[str, Tensor]]) -> float:
    """Largest difference of an entry over the root mean square of the network's output, over all `SIZES`."""
    worst = 0.0
    for seed, size in enumerate(SIZES):
        inputs = example(*size, seed)
        expected, found = graph(**inputs), run(inputs)
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, ((found - expected).abs().max() / expected.square().mean().sqrt().clamp(min=1e-12)).item())
    return worst


def _example(
    net: PolicyNet, shapes: Shapes, frames: int, b: int, g: int, l: int, lt: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of these sizes, some of their tokens hidden."""
    generator, config = torch.Generator().manual_seed(seed), net.config
    below = {"view_id": config.max_views, "embodiment": config.dit.embodiments, "frame_id": frames}

    def draw(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        if dtype == "bool":
            return torch.rand(shape, generator=generator) > 0.3
        if dtype == "int64":
            return torch.randint(below[name], shape, generator=generator)
        if name in ("control_hz", "alpha"):
            return 1 + 3 * torch.rand(shape, generator=generator)
        return torch.randn(shape, generator=generator)

    sizes = {"B": b, "G": g, "L": l, "Lt": lt}
    return {
        name: draw(name, dtype, tuple(size if isinstance(size, int) else sizes[size] for size in shape))
        for name, (dtype, shape) in shapes.items()
    }
