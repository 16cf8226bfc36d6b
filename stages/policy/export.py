"""`dvla export`: a checkpoint as a folder for deployment, with what acting needs and nothing of training.

    OUT/policy.json             as in a checkpoint: network, field maps, normalization, encoder with its VLM's path
        model.safetensors       averaged weights of the policy (ema.safetensors in earlier exports)
        vision.safetensors      after stage three: the weights of the vision tower that it changed, LoRA merged, float32
        policy.pt2, policy.onnx on request, with graph.json (graph.py)
        state.json              step and results of the checkpoint, content hashes of the files above
        config.json, policy_preprocessor.json, policy_postprocessor.json, by which LeRobot loads it (lerobot_files.py)
        README.md               its card

The frozen VLM itself is not copied: it is loaded from its path or from `vlm_path`, and its weights are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...cache.actions.history import history_of
from ...cache.vlm.adapter import changed_weights, in_float32
from ...cache.vlm.load import load_encoder
from ...cache.vlm.spec import EncoderSpec
from ...common.config import from_mapping
from ...common.documents import json_bytes, read_json
from ...common.files import new_folder, write_file
from ...errors import UserError
from . import checkpoint as ck
from .card import policy_card
from .document import loss_config, read_document
from .graph import require_formats, write_graphs
from .lerobot_files import lerobot_files
from .load import load_net, load_policy_encoder

LEROBOT = "lerobot"


@dataclass(frozen=True)
class ExportedPolicy:
    """What was written."""

    path: Path
    step: int  # of the checkpoint
    nbytes: int  # of all files
    vlm: str  # folder or hub id of the model that acting needs
    merged: int  # weights of the vision tower that differ from the base model's
    differences: dict[str, float] = field(default_factory=dict)  # format → see graph.TOLERANCE


def export_policy(
    path: str | Path,
    out: str | Path,
    formats: tuple[str, ...] = (),
    vlm_path: str | None = None,
    say: Callable[[str], None] = print,
) -> ExportedPolicy:
    """Write the checkpoint at `path` (see `checkpoint.resolve`) as the folder `out`, which appears only when complete.

    Args:
        formats: graphs to add ("torch-export", "onnx"); "lerobot" adds nothing, since every export is LeRobot's, too.
        vlm_path: where the VLM is, if not where the policy says; it is read only where it was fine-tuned.

    Raises:
        UserError: `out` exists, the checkpoint is missing or damaged, the VLM is another, or a graph cannot be made.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; choose another --out or remove it")
    folder = ck.resolve(path, say)
    document, state = read_document(folder), read_json(folder / "state.json", ck.StateForm)
    loss = loss_config(document)
    graphs_asked = tuple(dict.fromkeys(f for f in formats if f != LEROBOT))
    require_formats(graphs_asked, loss.kind)
    net = load_net(document, folder)  # or what would be deployed is refused here
    tensors = {"model": dict(net.state_dict())}
    vision, document = _vision(folder, document, vlm_path)
    if vision is not None:
        tensors["vision"] = vision
    kept = {name: state[name] for name in ("step", "metrics") if name in state}
    graphs: dict[str, Any] = {"difference": {}}
    try:
        with new_folder(out) as part:
            if graphs_asked:
                graphs = write_graphs(net, loss, graphs_asked, part, len(history_of(document).frames))
                write_file(part / "graph.json", json_bytes(graphs))
            ck.write_files(part, tensors, {"policy": document, "state": kept})
            for name, content in lerobot_files(document).items():  # not among the hashes: they may be edited
                write_file(part / name, json_bytes(content))
            write_file(part / "README.md", policy_card(document, kept, out.name).encode())
            nbytes = sum(p.stat().st_size for p in part.iterdir())
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of the former
        raise UserError(
            f"choose another --out or make room: cannot write {out} ({getattr(error, 'strerror', None) or error})"
        ) from None
    return ExportedPolicy(
        out, kept["step"], nbytes, document["encoder"]["spec"]["path"], len(vision or ()), graphs["difference"]
    )


def _fine_tuned(header: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not header:
        raise UserError("vision.safetensors is damaged: it holds no weight; copy the checkpoint again")
    return {name: in_float32(tensor) for name, tensor in header.items()}


def _vision(
    folder: Path, document: dict[str, Any], vlm_path: str | None
) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Weights of the vision tower that differ from the base model's (None if it was never trained), and policy.json
    with that model alone as its encoder, by its absolute path."""
    encoder = document["encoder"]
    spec = {**encoder["spec"], "path": vlm_path or encoder["spec"]["path"]}
    local = Path(spec["path"]).expanduser()
    if local.is_dir():  # the exported folder may be used from elsewhere
        spec["path"] = str(local.absolute())
    document = {**document, "encoder": {**encoder, "spec": spec}}
    if (folder / "vision.safetensors").is_file():  # it was exported before
        return ck.load_tensors(folder, "vision", _fine_tuned, "weights of a vision tower"), document
    if not ((folder / "adapter").is_dir() or spec.get("adapters")):
        return None, document
    exact = {**spec, "dtype": "float32"}
    tuned = load_policy_encoder(folder, {**document, "encoder": {**encoder, "spec": exact}})
    alone = {"adapters": ()} if "adapters" in spec else {}  # they are in other runs, and merged here
    weights = changed_weights(tuned, load_encoder(from_mapping(EncoderSpec, exact | alone, "policy.json")))
    return weights, {
        **document,
        "encoder": {"spec": spec | alone, "fingerprint": {**encoder["fingerprint"], "adapter": tuned.merged_adapter}},
    }
