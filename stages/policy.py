"""Policy: pictures, instruction and state in, native actions out: in one forward pass, or in several with a denoising head.

Letters: N observations, T action steps, d native action width, V views, H, W picture size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import UNIFIED_DIM, FeatureBatch
from ..cache import fingerprint as fp
from ..cache.actions import ActionMap
from ..cache.adapters import load_adapter
from ..cache.encoder import EncoderSpec, VisionLanguageEncoder, load_encoder
from ..cache.merged import put_weights
from ..cache.normalize import Normalizer, Statistics
from ..cache.sampling import mix
from ..cache.store import CacheDataset
from ..drifting.heads import generate
from ..drifting.losses import LossConfig
from ..drifting.policy_net import PolicyNet, PolicyNetConfig
from ..errors import UserError, unknown
from ..settings import from_mapping
from . import checkpoint as ck
from .encode import encode_observations
from .envs import Observation

KEPT_TEXTS = 1024   # instructions whose embeddings a policy keeps: a server may meet any number


def describe_dataset(dataset: CacheDataset) -> dict[str, Any]:
    """What a policy must know of a dataset to act in its robot's units, as JSON."""
    a = dataset.attributes
    keys = ("action_map", "state_map", "action_stats", "proprio_stats", "environment", "starts", "embodiment", "control_hz",
            "license", "dataset_config")
    return {"name": dataset.name, "views": list(dataset.views), **{key: a[key] for key in keys}}


class RobotInterface:
    """One dataset's maps both ways: native state → proprio, model output → native actions."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.name, self.views, self.environment = values["name"], tuple(values["views"]), values["environment"]
        self.starts: list[list[float]] = values["starts"]       # start vectors of the training episodes, where simulated
        self.embodiment, self.control_hz = int(values["embodiment"]), float(values["control_hz"])
        self.action_map, self.state_map = (ActionMap.from_dict(values[k]) for k in ("action_map", "state_map"))
        self._action = Normalizer(Statistics.from_dict(values["action_stats"]), self.action_map.mask, self.action_map.rotation_slots)
        self._state = Normalizer(Statistics.from_dict(values["proprio_stats"]), self.state_map.mask, self.state_map.rotation_slots)

    def proprio(self, state: np.ndarray) -> np.ndarray:
        """Native state [N,ds] → [N,128] normalised."""
        return self._state.normalize(self.state_map.to_unified(state))

    def actions(self, normalised: np.ndarray) -> np.ndarray:
        """Model output [N,T,128] → native [N,T,d] float32."""
        return self.action_map.to_native(self._action.denormalize(normalised))


class Policy:
    """A trained policy. Make it with `from_pretrained`; call `act`, or `act_batch` for several robots at once."""

    def __init__(self, net: PolicyNet, encoder: VisionLanguageEncoder, robot: RobotInterface, *, sees: bool = True,
                 seed: int = 0, loss: LossConfig = LossConfig()) -> None:
        self.net, self.encoder, self.robot, self.needs_images, self.seed = net, encoder, robot, sees, seed
        self.loss = loss        # of what was trained: says how the head samples
        self.path: Path | None = None   # of the policy directory it came from
        self._text: dict[str, tuple[torch.Tensor, int]] = {}
        self._null = encoder.null_image_features(len(robot.views))      # [V,K,D]

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dataset: str | None = None, environment: str | None = None,
                        device: torch.device | str = "cpu", blind: bool = False, seed: int = 0,
                        vlm_path: str | None = None, steps: int | None = None) -> Policy:
        """Load a run's newest whole checkpoint, a checkpoint folder, `RUN/checkpoints/best`, what `dvla export` wrote, or a policy of the
        hub, "owner/name[@revision]".

        `steps`: forward passes per action of a flow or diffusion head, in place of those it was trained for.
        `dataset` or `environment` chooses the robot where the policy was trained on several. `blind=True` shows it black
        pictures only. `UserError` for a missing or damaged checkpoint, an ambiguous robot, or a VLM that is not the one the
        features came from (differing fields named).
        """
        folder = ck.resolve(path)
        document = read_document(folder)
        robot = RobotInterface(choose_dataset(document["datasets"], dataset, environment))
        loss = from_mapping(LossConfig, document.get("loss", {}), "policy.json")     # older ones had one-step heads only
        loss = loss if steps is None else dataclasses.replace(loss, sample_steps=steps)
        net = load_net(document, ck.policy_tensors(folder, "ema"))
        encoder = load_policy_encoder(folder, document, device, vlm_path)
        blind = blind or document["conditions"]["blind"]
        policy = cls(net.to(device).eval(), encoder, robot, sees=not blind, seed=seed, loss=loss)
        policy.path = folder
        return policy

    def push_to_hub(self, repo: str, private: bool = True, evaluations: Sequence[str | Path] = ()) -> str:
        """Upload the policy to "owner/name" of the hub, with a card; returns its URL. See `hub.push_policy` (`dvla push`)."""
        from .hub import push_policy    # which builds on this file

        if self.path is None:
            raise UserError("this policy was not loaded from a folder; push the run or the folder it was saved in with `dvla push`")
        return push_policy(self.path, repo, private, evaluations)

    def act(self, images: Mapping[str, np.ndarray], instruction: str, state: np.ndarray) -> np.ndarray:
        """Pictures by view name (uint8 [H,W,3]), text, native state [ds] → native action chunk [T,d] float32."""
        return self.act_batch([Observation(dict(images), instruction, np.asarray(state, np.float32))])[0]

    @torch.inference_mode()
    def act_batch(self, observations: Sequence[Observation], mark: Callable[[str], None] = lambda part: None) -> np.ndarray:
        """N observations → native action chunks [N,T,d] float32. Noise depends on (seed, start, step) only.

        `mark` is told the name of each part when it ends (`stopwatch.PARTS`), to time it."""
        batch = self._batch(observations, mark)
        config = self.net.config.dit
        noise = torch.stack([self._noise(o, (config.horizon, config.noise_dim)) for o in observations])   # [N,T,n]
        device = batch.tokens.device
        alpha = torch.ones(len(observations), device=device)                                               # [N]
        out = generate(self.net, self.net.encode(batch), noise[:, None].to(device), alpha, self.loss)      # [N,1,T,128]
        mark("dit")
        actions = self.robot.actions(out[:, 0].float().cpu().numpy())                                      # [N,T,d]
        mark("actions")
        return actions

    def _noise(self, observation: Observation, shape: tuple[int, int]) -> torch.Tensor:
        key = int(mix(self.seed, 5, observation.start, observation.step)) >> 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(key))

    def _batch(self, observations: Sequence[Observation], mark: Callable[[str], None] = lambda part: None) -> FeatureBatch:
        n, encoder, robot = len(observations), self.encoder, self.robot
        device, k, d, v = encoder.device, encoder.tokens, encoder.width, len(robot.views)
        if self.needs_images:
            found = encode_observations(encoder, [self._pictures(o) for o in observations], [o.instruction for o in observations])
            tokens = torch.stack(found).to(torch.float16).to(encoder.dtype)                                # [N,V,K,D], rounded as cached ones
        else:
            tokens = self._null.expand(n, v, k, d)                                                         # [N,V,K,D]
        tokens = tokens.reshape(n, v * k, d)                                                               # [N,V·K,D]
        mark("pictures")
        texts = [self._embed(o.instruction) for o in observations]
        longest = max(length for _, length in texts)
        text = torch.stack([e[:longest] if len(e) >= longest else torch.nn.functional.pad(e, (0, 0, 0, longest - len(e)))
                            for e, _ in texts])                                                            # [N,Lt,D]
        text_mask = torch.arange(longest, device=device) < torch.tensor([[length] for _, length in texts], device=device)
        mark("text")
        proprio = robot.proprio(np.stack([o.state for o in observations]))                                 # [N,128]
        horizon = self.net.config.dit.horizon
        full, zero = torch.ones(n, dtype=torch.bool, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        view_id = torch.arange(v, device=device).repeat_interleave(k).expand(n, -1).contiguous()           # [N,V·K]
        batch = FeatureBatch(
            tokens=tokens, token_mask=torch.ones_like(view_id, dtype=torch.bool), view_id=view_id,
            frame_id=torch.zeros_like(view_id), text=text.to(tokens.dtype), text_mask=text_mask,
            proprio=torch.from_numpy(proprio).to(device), action=torch.zeros(n, horizon, UNIFIED_DIM, device=device),
            action_mask=torch.from_numpy(robot.action_map.mask).to(device).expand(n, -1).contiguous(),
            step_mask=full[:, None].expand(-1, horizon).contiguous(), embodiment=zero + robot.embodiment,
            control_hz=torch.full((n,), robot.control_hz, device=device), dataset=zero, frame_index=zero).check()
        mark("state")
        return batch

    def _pictures(self, observation: Observation) -> list[np.ndarray]:
        for view in self.robot.views:
            if view not in observation.images:
                raise unknown("view", view, observation.images) if observation.images else UserError(
                    f"the policy needs pictures of {', '.join(self.robot.views)}; the observation has none")
        return [observation.images[view] for view in self.robot.views]

    def _embed(self, instruction: str) -> tuple[torch.Tensor, int]:
        if instruction not in self._text:
            if len(self._text) >= KEPT_TEXTS:
                self._text.clear()
            embedding, length = self.encoder.encode_text([instruction])
            self._text[instruction] = embedding[0].to(torch.float16).to(embedding.dtype), int(length[0])    # as in the cache
        return self._text[instruction]


def read_document(folder: Path) -> dict[str, Any]:
    """policy.json of a checkpoint or an exported folder; `UserError` for one of another version."""
    document = ck.read_json(folder / "policy.json")
    if document.get("format") != ck.POLICY_FORMAT:
        raise UserError(f"{folder} has policy format {document.get('format')}, this version reads {ck.POLICY_FORMAT}")
    return document


def load_net(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PolicyNet:
    """The network that policy.json describes, with these weights (`checkpoint.policy_tensors`)."""
    net = PolicyNet(from_mapping(PolicyNetConfig, document["net"], "policy.json"))
    net.load_state_dict(tensors)
    return net


def choose_dataset(datasets: Sequence[Mapping[str, Any]], name: str | None, environment: str | None) -> Mapping[str, Any]:
    """The dataset entry whose robot the policy shall drive."""
    names = [d["name"] for d in datasets]
    if name is not None:
        if name not in names:
            raise unknown("dataset of this policy", name, names)
        return datasets[names.index(name)]
    if environment is not None:
        fitting = [d for d in datasets if d["environment"] == environment]
        if len(fitting) == 1:
            return fitting[0]
        trained = sorted({d["environment"] for d in datasets if d["environment"]})
        raise UserError(f"this policy has {len(fitting)} datasets recorded in '{environment}' (trained environments: "
                        f"{', '.join(trained) or 'none'}); name the dataset whose robot it shall drive: {', '.join(names)}")
    if len(datasets) == 1:
        return datasets[0]
    raise UserError(f"this policy was trained on {', '.join(names)}; say which with dataset=…")


def load_policy_encoder(folder: Path, document: Mapping[str, Any], device: torch.device | str = "cpu",
                        vlm_path: str | None = None) -> VisionLanguageEncoder:
    """The encoder a checkpoint belongs to, with its adapter, or the weights it was merged into; refuses other weights, naming the differing fields."""
    spec = from_mapping(EncoderSpec, document["encoder"]["spec"], "policy.json")
    spec = dataclasses.replace(spec, path=vlm_path) if vlm_path else spec
    encoder = load_encoder(spec, device)
    if (folder / "vision.safetensors").is_file():       # of an exported policy: what features owe to fine-tuning is in them
        put_weights(encoder, ck.load_tensors(folder, "vision"), document["encoder"]["fingerprint"]["adapter"], str(folder / "vision.safetensors"))
    require_encoder(encoder, document["encoder"]["fingerprint"], f"checkpoint {folder}")
    if (folder / "adapter").is_dir():
        load_adapter(encoder, folder / "adapter")
    return encoder


def require_encoder(encoder: VisionLanguageEncoder, fingerprint: Mapping[str, Any], what: str) -> None:
    """`UserError` naming the differing fields unless the encoder (without adapter) is the one the features came from."""
    lines = encoder_differences(fingerprint, encoder.fingerprint())
    if lines:
        raise UserError(f"{what} belongs to another VLM than {encoder.spec.path}: {'; '.join(lines[:6])}; give the folder of the right one")


def encoder_differences(a: Mapping[str, Any], b: Mapping[str, Any], **words: str) -> list[str]:
    """`fingerprint.diff` of two encoders' fingerprints, but for the dtype of the computation: it changes rounding, not what is computed."""
    first, second = ({k: v for k, v in one.items() if k != "dtype"} for one in (a, b))
    return fp.diff(first, second, **words)
