"""Policy: pictures, instruction and state in, native actions out: in one forward pass, or in several with a denoising head.

Letters: N observations, T action steps, d native action width, V views, H, W picture size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ...batch import UNIFIED_DIM, FeatureBatch
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.observations import encode_observations
from ...common.config import from_mapping
from ...common.hashing import mix
from ...drifting.config import LossConfig
from ...drifting.heads import generate
from ...drifting.policy_net import PolicyNet
from ...errors import UserError, unknown
from ..policy.observation import Observation
from . import checkpoint as ck
from .load import load_net, load_policy_encoder, read_document
from .robot import RobotInterface, choose_dataset

KEPT_TEXTS = 1024  # instructions whose embeddings a policy keeps: a server may meet any number


class Policy:
    """A trained policy. Make it with `from_pretrained`; call `act`, or `act_batch` for several robots at once."""

    def __init__(
        self,
        net: PolicyNet,
        encoder: VisionLanguageEncoder,
        robot: RobotInterface,
        *,
        sees: bool = True,
        seed: int = 0,
        loss: LossConfig | None = None,
    ) -> None:
        self.net, self.encoder, self.robot, self.needs_images, self.seed = net, encoder, robot, sees, seed
        self.loss = loss or LossConfig()  # of what was trained: says how the head samples
        self.path: Path | None = None  # of the policy directory it came from
        self._text: dict[str, tuple[torch.Tensor, int]] = {}
        self._null = encoder.null_image_features(len(robot.views))  # [V,K,D]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dataset: str | None = None,
        environment: str | None = None,
        device: torch.device | str = "cpu",
        blind: bool = False,
        seed: int = 0,
        vlm_path: str | None = None,
        steps: int | None = None,
    ) -> Policy:
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
        loss = from_mapping(LossConfig, document.get("loss", {}), "policy.json")  # older ones had one-step heads only
        loss = loss if steps is None else dataclasses.replace(loss, sample_steps=steps)
        net = load_net(document, ck.policy_tensors(folder, "ema"))
        encoder = load_policy_encoder(folder, document, device, vlm_path)
        blind = blind or document["conditions"]["blind"]
        policy = cls(net.to(device).eval(), encoder, robot, sees=not blind, seed=seed, loss=loss)
        policy.path = folder
        return policy

    def push_to_hub(self, repo: str, private: bool = True, evaluations: Sequence[str | Path] = ()) -> str:
        """Upload the policy to "owner/name" of the hub, with a card; returns its URL. See `hub.push_policy` (`dvla push`)."""
        from .hub import push_policy  # which builds on this file

        if self.path is None:
            raise UserError(
                "this policy was not loaded from a folder; push the run or the folder it was saved in with `dvla push`"
            )
        return push_policy(self.path, repo, private, evaluations)

    def act(self, images: Mapping[str, np.ndarray], instruction: str, state: np.ndarray) -> np.ndarray:
        """Pictures by view name (uint8 [H,W,3]), text, native state [ds] → native action chunk [T,d] float32."""
        return self.act_batch([Observation(dict(images), instruction, np.asarray(state, np.float32))])[0]

    @torch.inference_mode()
    def act_batch(
        self, observations: Sequence[Observation], mark: Callable[[str], None] = lambda part: None
    ) -> np.ndarray:
        """N observations → native action chunks [N,T,d] float32. Noise depends on (seed, start, step) only.

        `mark` is told the name of each part when it ends (`stopwatch.PARTS`), to time it."""
        batch = self._batch(observations, mark)
        config = self.net.config.dit
        noise = torch.stack([self._noise(o, (config.horizon, config.noise_dim)) for o in observations])  # [N,T,n]
        device = batch.tokens.device
        alpha = torch.ones(len(observations), device=device)  # [N]
        out = generate(self.net, self.net.encode(batch), noise[:, None].to(device), alpha, self.loss)  # [N,1,T,128]
        mark("dit")
        actions = self.robot.actions(out[:, 0].float().cpu().numpy())  # [N,T,d]
        mark("actions")
        return actions

    def _noise(self, observation: Observation, shape: tuple[int, int]) -> torch.Tensor:
        key = int(mix(self.seed, 5, observation.start, observation.step)) >> 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(key))

    def _batch(
        self, observations: Sequence[Observation], mark: Callable[[str], None] = lambda part: None
    ) -> FeatureBatch:
        n, encoder, robot = len(observations), self.encoder, self.robot
        device, k, d, v = encoder.device, encoder.tokens, encoder.width, len(robot.views)
        if self.needs_images:
            found = encode_observations(
                encoder, [self._pictures(o) for o in observations], [o.instruction for o in observations]
            )
            tokens = torch.stack(found).to(torch.float16).to(encoder.dtype)  # [N,V,K,D], rounded as cached ones
        else:
            tokens = self._null.expand(n, v, k, d)  # [N,V,K,D]
        tokens = tokens.reshape(n, v * k, d)  # [N,V·K,D]
        mark("pictures")
        texts = [self._embed(o.instruction) for o in observations]
        longest = max(length for _, length in texts)
        text = torch.stack(
            [
                e[:longest] if len(e) >= longest else torch.nn.functional.pad(e, (0, 0, 0, longest - len(e)))
                for e, _ in texts
            ]
        )  # [N,Lt,D]
        text_mask = torch.arange(longest, device=device) < torch.tensor(
            [[length] for _, length in texts], device=device
        )
        mark("text")
        proprio = robot.proprio(np.stack([o.state for o in observations]))  # [N,128]
        horizon = self.net.config.dit.horizon
        full, zero = torch.ones(n, dtype=torch.bool, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        view_id = torch.arange(v, device=device).repeat_interleave(k).expand(n, -1).contiguous()  # [N,V·K]
        batch = FeatureBatch(
            tokens=tokens,
            token_mask=torch.ones_like(view_id, dtype=torch.bool),
            view_id=view_id,
            frame_id=torch.zeros_like(view_id),
            text=text.to(tokens.dtype),
            text_mask=text_mask,
            proprio=torch.from_numpy(proprio).to(device),
            action=torch.zeros(n, horizon, UNIFIED_DIM, device=device),
            action_mask=torch.from_numpy(robot.action_map.mask).to(device).expand(n, -1).contiguous(),
            step_mask=full[:, None].expand(-1, horizon).contiguous(),
            embodiment=zero + robot.embodiment,
            control_hz=torch.full((n,), robot.control_hz, device=device),
            dataset=zero,
            frame_index=zero,
        ).check()
        mark("state")
        return batch

    def _pictures(self, observation: Observation) -> list[np.ndarray]:
        for view in self.robot.views:
            if view not in observation.images:
                raise (
                    unknown("view", view, observation.images)
                    if observation.images
                    else UserError(
                        f"the policy needs pictures of {', '.join(self.robot.views)}; the observation has none"
                    )
                )
        return [observation.images[view] for view in self.robot.views]

    def _embed(self, instruction: str) -> tuple[torch.Tensor, int]:
        if instruction not in self._text:
            if len(self._text) >= KEPT_TEXTS:
                self._text.clear()
            embedding, length = self.encoder.encode_text([instruction])
            self._text[instruction] = (
                embedding[0].to(torch.float16).to(embedding.dtype),
                int(length[0]),
            )  # as in the cache
        return self._text[instruction]
