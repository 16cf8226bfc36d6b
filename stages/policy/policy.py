"""Policy: images, instruction and state in, native actions out, in one forward pass, or in several with a denoising
head.

Letters: N observations, T action steps, d native action width, V views, H frames (or image height), W image width,
Hp past states, K tokens of one image, D feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...batch import FeatureBatch
from ...cache.actions.history import NO_HISTORY, History, history_of
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.observations import encode_observations
from ...common.device import pick_device
from ...common.hashing import mix
from ...drifting.config import LossConfig
from ...drifting.heads import generate
from ...drifting.policy_net import PolicyNet
from ...errors import UserError
from . import checkpoint as ck
from .document import loss_config, read_document
from .history import Past
from .load import load_net, load_policy_encoder
from .observation import LEROBOT_STATE, Observation, Step, Window, as_observation, from_lerobot, require_views
from .robot import RobotInterface, choose_dataset

KEPT_TEXTS = 64 << 20  # bytes of the instructions' embeddings that a policy keeps: a server may meet any number


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
        history: History = NO_HISTORY,
        without: Collection[str] = (),
    ) -> None:
        self.net, self.encoder, self.robot, self.seed = net, encoder, robot, seed
        self.without = without  # of text, images and proprio: what gives way to its null embedding, as in training
        self.needs_images = sees and "images" not in without
        self.loss = loss or LossConfig()  # that it was trained with: says how the head samples
        self.history = history  # what it sees besides the current step
        self.path: Path | None = None  # of the policy directory it came from
        self._text: dict[str, tuple[torch.Tensor, int]] = {}  # the latest used last
        self._text_nbytes = 0
        self._null = encoder.null_image_features(len(robot.views))  # [V,K,D]
        self._episode = self._step = 0  # of `act`, where it has a history
        self._pasts: dict[int, Past] = {}  # of each robot

    def __repr__(self) -> str:
        views = ", ".join(self.robot.views) if self.needs_images else "none (blind)"
        return (
            f"Policy(robot {self.robot.name}, views {views}, state [{len(self.robot.state_map.field_names)}], actions "
            f"[{self.net.config.dit.horizon}, {len(self.robot.action_map.field_names)}], {self.loss.kind} head, "
            f"device {self.encoder.device})"
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dataset: str | None = None,
        environment: str | None = None,
        device: torch.device | str = "auto",
        blind: bool = False,
        seed: int = 0,
        vlm_path: str | None = None,
        steps: int | None = None,
    ) -> Policy:
        """Load a run's newest intact checkpoint, a checkpoint folder, `RUN/checkpoints/best`, an exported policy, or
        "owner/name[@revision]" of the hub.

        Args:
            dataset: whose robot and normalization to use, where the policy was trained on several datasets.
            environment: the same choice by the simulated environment the dataset was recorded in.
            device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:N", or a `torch.device`.
            blind: act with images blanked.
            seed: of the noise.
            vlm_path: folder or hub id of the VLM, if it is not where the policy says.
            steps: forward passes per action of a flow or diffusion head, instead of those it was trained for.

        Raises:
            UserError: the checkpoint is missing or damaged, the robot is ambiguous, or the VLM is not the one that the
                features came from (the fields that differ are named).
        """
        device = device if isinstance(device, torch.device) else pick_device(device)
        folder = ck.resolve(path)
        document = read_document(folder)
        robot = RobotInterface(choose_dataset(document["datasets"], dataset, environment))
        loss = loss_config(document)
        loss = loss if steps is None else dataclasses.replace(loss, sample_steps=steps)
        net = load_net(document, folder)
        encoder = load_policy_encoder(folder, document, device, vlm_path)
        blind = blind or document["conditions"]["blind"]
        history = history_of(document)
        without = {name for name, share in document["conditions"]["masking"].items() if share == 1}
        policy = cls(
            net.to(device).eval(),
            encoder,
            robot,
            sees=not blind,
            seed=seed,
            loss=loss,
            history=history,
            without=without,
        )
        policy.path = folder
        return policy

    def to(self, device: torch.device | str) -> Policy:
        """Move it to another device; returns itself."""
        self.net.to(device)
        self.encoder.to(device)
        self._null, self._text = self._null.to(device), {}
        return self

    def push_to_hub(self, repo: str, private: bool = True, evaluations: Sequence[str | Path] = ()) -> str:
        """Upload the policy, with a card, to "owner/name" of the hub, as `dvla push` does; returns its URL."""
        from .hub import push_policy  # which builds on this file

        if self.path is None:
            raise UserError(
                "push the run or the folder this policy was saved in with `dvla push`: it was not loaded from one"
            )
        return push_policy(self.path, repo, private, evaluations)

    def act(self, images: Mapping[str, Any], instruction: str | None = None, state: Any = None) -> np.ndarray:
        """The native action chunk [T,d] float32 for one observation.

        A policy with a history sees the steps before, too: call this or `observe` once at every control step, and
        `reset` when an episode begins. Steps that it was not shown are masked.

        Args:
            images: view name → uint8 [H,W,3] or floating [3,H,W] in [0,1], as arrays or tensors. Or, alone, an
                observation dict of LeRobot (`observation.images.<view>`, `observation.state`, `task`); one with a
                batch dimension gives [N,T,d].
            instruction: what to do.
            state: native state [ds].

        Raises:
            UserError: a view is missing, or an image or the state has another form.
        """
        actions = self.act_batch(self._seen(images, instruction, state))
        return actions if instruction is None and np.ndim(images[LEROBOT_STATE]) > 1 else actions[0]

    def observe(self, images: Mapping[str, Any], instruction: str | None = None, state: Any = None) -> None:
        """Show a control step that no action is asked at to a policy with a history; arguments as of `act`."""
        self._seen(images, instruction, state)

    def reset(self) -> None:
        """Begin a new episode: forget the steps that `act` and `observe` were given."""
        self._episode, self._step, self._pasts = self._episode + (self._step > 0), 0, {}

    def _seen(self, images: Mapping[str, Any], instruction: str | None, state: Any) -> list[Observation]:
        """The observations of one control step, with what its history sees of earlier ones."""
        views, state_names = self.robot.views if self.needs_images else (), self.robot.state_map.field_names
        if instruction is not None and state is not None:
            found = [as_observation(images, instruction, state, views, state_names)]
        elif instruction is not None or state is not None:
            raise UserError("give images, instruction and state, or one observation dict of LeRobot alone")
        else:
            found = from_lerobot(images, views, state_names)
        if not self.history:
            return found
        now = [dataclasses.replace(o, start=self._episode, step=self._step) for o in found]
        self._step += 1
        return [self._pasts.setdefault(i, Past(self.history)).push(o) for i, o in enumerate(now)]

    @torch.inference_mode()
    def act_batch(
        self, observations: Sequence[Observation], mark: Callable[[str], None] = lambda part: None
    ) -> np.ndarray:
        """N observations → native action chunks [N,T,d] float32. Noise depends on (seed, start, step) only.

        Of earlier steps it sees those in an observation's `window`, which `Past.push` gives it.

        `mark` is called with the name of each part when it ends (`stopwatch.PARTS`), to time it."""
        batch = self._batch(observations, mark)
        config = self.net.config.dit
        noise = torch.stack([self._noise(o, (config.horizon, config.noise_dim)) for o in observations])  # [N,T,n]
        device = batch.tokens.device
        alpha = torch.ones(len(observations), device=device)  # [N]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = generate(self.net, self.net.encode(batch), noise[:, None].to(device), alpha, self.loss)  # [N,1,T,128]
        mark("dit")
        state = np.stack([o.state for o in observations])  # [N,ds]
        actions = self.robot.actions(out[:, 0].float().cpu().numpy(), state)  # [N,T,d]
        mark("actions")
        return actions

    def _noise(self, observation: Observation, shape: tuple[int, int]) -> torch.Tensor:
        key = int(mix(self.seed, 5, observation.start, observation.step)) >> 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(key))

    def _batch(
        self, observations: Sequence[Observation], mark: Callable[[str], None] = lambda part: None
    ) -> FeatureBatch:
        robot, device = self.robot, self.encoder.device
        windows = [o.window or Past(self.history).window(o) for o in observations]
        tokens, frames = self._tokens(windows, [o.instruction for o in observations])  # [N,H·V,K,D], [N,H]
        mark("pictures")
        text, text_mask = self._texts([o.instruction for o in observations])
        mark("text")
        batch = FeatureBatch.to_act_on(
            tokens,
            text,
            text_mask,
            self._proprio(np.stack([o.state for o in observations])),  # [N,128]
            torch.from_numpy(robot.action_map.mask).to(device),
            horizon=self.net.config.dit.horizon,
            embodiment=robot.embodiment,
            control_hz=robot.control_hz,
            frames=frames,
            past=self._past(windows) if self.history.states else None,
            visible=self._visible([o.instruction for o in observations]),
        )
        mark("state")
        return batch

    def _tokens(self, windows: Sequence[Window], instructions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [N,H·V,K,D] of the images, rounded as cached ones are, null features for a blind policy; bool [N,H]
        which frames there are)."""
        views, device = self.robot.views, self.encoder.device
        if not self.needs_images:
            there = torch.tensor([[step is not None for step in w.frames] for w in windows], device=device)
            return self._null.repeat(len(windows), there.shape[1], 1, 1), there
        waiting: dict[int, tuple[Step, str]] = {}
        for window, instruction in zip(windows, instructions):
            if (now := window.frames[0]) is not None and now.features is None:
                require_views(views, now.images)
            for step in window.frames:
                if step is not None and step.features is None and step.images.keys() >= set(views):
                    waiting.setdefault(id(step), (step, instruction))
        images = [[step.images[view] for view in views] for step, _ in waiting.values()]
        found = encode_observations(self.encoder, images, [instruction for _, instruction in waiting.values()])
        for (step, instruction), features in zip(waiting.values(), found):
            step.features, step.images = features.to(torch.float16).to(self.encoder.dtype), {}
            step.instruction = instruction
        reads, none = self.encoder.reads != "image", torch.zeros_like(self._null)
        shown = [
            [None if s is None or reads and s.instruction != text else s.features for s in window.frames]
            for window, text in zip(windows, instructions)
        ]
        tokens = [torch.cat([none if f is None else f.to(device) for f in row]) for row in shown]  # [H·V,K,D] each
        return torch.stack(tokens), torch.tensor([[f is not None for f in row] for row in shown], device=device)

    def _past(self, windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalized states [N,Hp,128], bool [N,Hp]) of earlier steps."""
        there = np.array([[step is not None for step in w.states] for w in windows])
        rows = [[step or w.frames[0] for step in w.states] for w in windows]
        states = np.array([[step.state for step in row if step is not None] for row in rows])  # [N,Hp,ds]
        proprio = self._proprio(states.reshape(-1, states.shape[-1])).unflatten(0, there.shape)
        mask = torch.from_numpy(there & ("proprio" not in self.without)).to(proprio.device)
        return proprio * mask[..., None], mask

    def _proprio(self, states: np.ndarray) -> torch.Tensor:
        """Native states [n,ds] → normalized [n,128]; zeros for a policy without proprioception."""
        found = torch.from_numpy(self.robot.proprio(states)).to(self.encoder.device)
        return torch.zeros_like(found) if "proprio" in self.without else found

    def require_fits(self, instruction: str) -> None:
        """`UserError` for an instruction longer than what the encoder reads beside the images."""
        if self.needs_images:
            self.encoder.require_fits(len(self.robot.views), [instruction])

    def _visible(self, instructions: Sequence[str]) -> torch.Tensor | None:
        """int64 [N]: how many of the tokens of a view are real for each instruction; None: all of them."""
        if self.encoder.reads != "instruction":
            return None
        return torch.tensor([self.encoder.visible(text if self.needs_images else "") for text in instructions])

    def _texts(self, instructions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(embeddings [N,Lt,Dt], mask [N,Lt] bool), padded to the longest; on a GPU to a multiple of 16, since kernels
        are chosen, or compiled, for each length."""
        found = [self._embed("" if "text" in self.without else instruction) for instruction in instructions]
        longest = max(length for _, length in found)
        longest += -longest % 16 if self.encoder.device.type == "cuda" else 0
        text = torch.nn.utils.rnn.pad_sequence([e[:longest] for e, _ in found], batch_first=True)
        text = torch.nn.functional.pad(text, (0, 0, 0, longest - text.shape[1]))
        lengths = torch.tensor([[length] for _, length in found], device=text.device)
        return text, torch.arange(longest, device=text.device) < lengths

    def _embed(self, instruction: str) -> tuple[torch.Tensor, int]:
        found = self._text.pop(instruction, None)
        if found is None:
            embedding, length = self.encoder.encode_text([instruction])
            found = embedding[0].to(torch.float16).to(embedding.dtype), int(length[0])  # rounded as in the cache
            self._text_nbytes += found[0].nbytes
        self._text[instruction] = found
        while self._text_nbytes > KEPT_TEXTS and len(self._text) > 1:
            self._text_nbytes -= self._text.pop(next(iter(self._text)))[0].nbytes
        return found
