"""policy.json: what it must be, and the settings in it. `training/train.py` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ...cache.actions.action_map import MapForm
from ...cache.actions.history import MOST, history_of
from ...cache.actions.normalizer import HIGH, LOW
from ...cache.actions.schemes import Scheme
from ...cache.actions.statistics import StatisticsForm, Values
from ...cache.vlm.spec import EncoderSpec
from ...common.config import from_document, from_mapping
from ...common.documents import Field, Form, Positive, read_json, require_form, shown
from ...drifting.config import DENOISING, LossConfig
from ...drifting.policy_net import PolicyNetConfig
from ...errors import UserError

# 2: says how its datasets are normalized, which releases that read 1 alone would not see; 3: sees earlier frames
FORMATS = (1, 2, 3)
Name = Annotated[str, Field(min_length=1, max_length=200)]


class DatasetForm(Form):
    """A dataset it was trained on: `robot.describe_dataset`."""

    name: Name
    views: Annotated[list[Name], Field(min_length=1)]
    action_map: MapForm
    state_map: MapForm
    action_stats: StatisticsForm
    proprio_stats: StatisticsForm
    environment: str | None
    starts: list[list[float]]
    embodiment: Annotated[int, Field(ge=0)]
    control_hz: Annotated[float, Field(gt=0, le=1e5)]
    license: str
    dataset_config: str
    normalize: Scheme = "std5"
    action_frame: Literal["chunk"] = "chunk"
    config: dict[str, Any] = {}
    view_sizes: dict[str, Annotated[list[Positive], Field(min_length=2, max_length=2)]] = {}
    source: str = ""
    action_step: Values | None = None


class FingerprintForm(Form, extra="allow"):
    """What features depend on: it is compared with that of the VLM as it is."""

    code_version: Positive = 1
    vlm: str = ""
    features: str = ""
    tokens: Positive = 1
    weights_sha256: str = ""
    vision_config: dict[str, Any] = {}
    resolution: Positive = 1
    image_mean: list[float] = []
    image_std: list[float] = []
    dtype: str = ""
    adapter: dict[str, Any] | None = None


class EncoderForm(Form):
    """The VLM: its settings, checked by `EncoderSpec`, and its fingerprint."""

    spec: dict[str, Any]
    fingerprint: FingerprintForm


class ConditionsForm(Form):
    """What was dropped in training."""

    blind: bool
    masking: dict[str, Annotated[float, Field(ge=0, le=1)]]
    alpha_max: Annotated[float, Field(ge=1, le=1e6)]


class PolicyForm(Form):
    """policy.json; earlier releases had no `loss`."""

    format: Literal[1, 2, 3]
    net: dict[str, Any]
    encoder: EncoderForm
    datasets: Annotated[list[DatasetForm], Field(min_length=1)]
    loss: dict[str, Any] = {}
    conditions: ConditionsForm
    history: Annotated[list[int], Field(min_length=1, max_length=MOST)] = [0]
    proprio_history: Annotated[list[int], Field(min_length=1, max_length=MOST)] = [0]
    selection: dict[str, str] = {}


def read_document(folder: Path) -> dict[str, Any]:
    """policy.json of a checkpoint or an exported folder; `UserError` for one of another version, or what cannot act."""
    path = folder / "policy.json"
    document = read_json(path)
    if document.get("format") not in FORMATS:
        raise UserError(
            f"{folder} has policy format {shown(document.get('format'))}, this version reads up to {FORMATS[-1]}"
        )
    require_form(document, path, PolicyForm, "copy the checkpoint again")
    from_document(EncoderSpec, document["encoder"]["spec"], path, "encoder.spec")
    net, datasets = from_document(PolicyNetConfig, document["net"], path, "net"), document["datasets"]
    loss = from_document(LossConfig, document.get("loss", {}), path, "loss")
    said = any("normalize" in d or "action_frame" in d for d in datasets)
    try:
        history = history_of(document)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    names = [d["name"] for d in datasets]
    wrong = [
        (
            document["format"] != (3 if history else 2 if said else 1),
            "its format does not fit its history, or how its datasets are normalized",
        ),
        (len(history.states) != net.past_states, "net.past_states is not the number of past states"),
        (len(history.frames) > net.max_frames, "net.max_frames is below the number of frames"),
        (net.dit.denoising != (loss.kind in DENOISING), f"loss.kind is {loss.kind}, net.dit.denoising another head's"),
        (len(set(names)) < len(names), "two of its datasets have the same name"),
    ]
    for i, d in enumerate(datasets):
        place, views, number = f"datasets[{i}]", len(d["views"]), d["embodiment"]
        wrong += [
            (views > net.max_views, f"{place} has {views} views, expected at most {net.max_views}"),
            (len(set(d["views"])) < views, f"two views of {place} have the same name"),
            (
                d.get("normalize") == "quantile" and not _has_quantiles(d),
                f"{place} is normalized by quantiles it lacks",
            ),
            (number >= net.dit.embodiments, f"{place}.embodiment is {number}, expected below {net.dit.embodiments}"),
        ]
    if found := [text for is_so, text in wrong if is_so]:
        raise UserError(f"{path} is damaged: {found[0]}; copy the checkpoint again")
    return document


def _has_quantiles(dataset: Mapping[str, Any]) -> bool:
    found = (dataset[f"{kind}_stats"].get("quantiles", {}) for kind in ("action", "proprio"))
    return all({str(LOW), str(HIGH)} <= levels.keys() for levels in found)


def net_config(document: Mapping[str, Any]) -> PolicyNetConfig:
    """The network's shape; `UserError` for one that is out of its range."""
    return from_mapping(PolicyNetConfig, document["net"], "policy.json: net")


def loss_config(document: Mapping[str, Any]) -> LossConfig:
    """What says how the head samples; earlier releases had one-step heads only."""
    return from_mapping(LossConfig, document.get("loss", {}), "policy.json: loss")
