"""Observations in clients' messages, under any of the names that clients use.

Native: `{"images": {view: uint8 [H, W, 3]}, "state": [ds], "prompt": text}`. Names of nested maps are joined by "/" and
a leading "observation/" is dropped, so that "observation/images/front" and {"observation": {"images": {"front": …}}}
are the native "images/front". LeRobot's `observation.images.front`, `observation.state` and `task`, and openpi's
`observation/image`, `observation/wrist_image` and `observation/state`, are known where they are plain: `wrist_image` is
the only view with "wrist" in its name, `image` the only other one. Other names need a field map, native=theirs:
`images/front=observation/exterior_image_1_left`, or `state=observation/joint_position,observation/gripper_position`,
which are concatenated. An image may also be the bytes of a JPEG or WebP file.

Letters: H, W image size, ds native state width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...cache.readers.episode import CorruptEpisode
from ...cache.readers.images import check_size, decode, open_image
from ...errors import UserError, unknown
from ..policy.observation import Observation

DEPTH = 3  # of nested maps: observation, images, view
LONGEST_PROMPT = 4096  # characters
ENCODINGS = ("raw", "jpeg", "webp")  # of images


class ObservationReader:
    """Turns clients' messages into observations for one policy."""

    def __init__(
        self,
        views: Sequence[str],
        state_names: Sequence[str],
        fields: Sequence[str] = (),
        require_fits: Callable[[str], None] = lambda prompt: None,
        require_state: Callable[[np.ndarray], None] = lambda state: None,
        most: int = 1 << 25,
    ) -> None:
        """`views`: those the policy uses (none if it is blind).

        `fields`: "native=theirs"; `UserError` for any other form. `require_fits`: `UserError` for an instruction that
        the policy's encoder cannot read, which would fail the requests of others in its batch. `require_state`: the
        same for a state. `most`: bytes that a compressed image may become.
        """
        self._require_state, self._most = require_state, most
        self._require_fits = require_fits
        self._views, self._state_names = tuple(views), tuple(state_names)
        native = [*(f"images/{view}" for view in views), "state", "prompt"]
        self._keys: dict[str, tuple[str, ...]] = {name: (name,) for name in native}
        for field in fields:
            name, equals, theirs = field.partition("=")
            if name not in native:
                raise unknown("field of an observation", name, native)
            keys = tuple(_bare(key.strip()) for key in theirs.split(","))
            if not equals or not all(keys) or (len(keys) > 1 and name != "state"):
                raise UserError(
                    f"field map '{field}': give native=theirs, e.g. images/front=observation/image; only state may "
                    "have several names, separated by commas"
                )
            self._keys[name] = keys
        others = {"task": "prompt", **_plain_names(views)}  # name that clients may use → ours, where that is not mapped
        self._others = {theirs: ours for theirs, ours in others.items() if self._keys[ours] == (ours,)}

    def prompt(self, message: Mapping[Any, Any]) -> str | None:
        """The message's instruction, or None. `UserError` if it is not text or too long."""
        text = self._flat(message).get(self._keys["prompt"][0])
        if text is not None and not isinstance(text, str):
            raise UserError(f"'{self._keys['prompt'][0]}' must be text, got {_what(text)}")
        if text is not None and len(text) > LONGEST_PROMPT:
            raise UserError(f"'{self._keys['prompt'][0]}' has {len(text)} characters; at most {LONGEST_PROMPT}")
        return text

    def brings_frame(self, message: Mapping[Any, Any]) -> bool:
        """Whether a message has an image or a state."""
        known = {key for name, keys in self._keys.items() if name != "prompt" for key in keys}
        return not known.isdisjoint(self._flat(message))

    def observation(
        self, message: Mapping[Any, Any], start: int = 0, step: int = 0, otherwise: str | None = None
    ) -> Observation:
        """The policy's observation; `otherwise` is its instruction where the message has none. `UserError` naming what
        is missing or wrong."""
        found, prompt = self._flat(message), self.prompt(message)
        prompt = otherwise if prompt is None else prompt
        if prompt is None:
            self._value(found, self._keys["prompt"][0], "text")
        self._require_fits(str(prompt))
        images = {view: self._image(found, self._keys[f"images/{view}"][0]) for view in self._views}
        return Observation(images, str(prompt), self._state(found), start, step)

    def _flat(self, message: Mapping[Any, Any]) -> dict[str, Any]:
        """The message's values by the policy's names, where it has those that LeRobot's or openpi's clients use."""
        found = flatten(message)
        for theirs, ours in self._others.items():
            if ours not in found and (theirs != "task" or isinstance(found.get(theirs), str)) and theirs in found:
                found[ours] = found.pop(theirs)
        return found

    def _image(self, found: Mapping[str, Any], key: str) -> np.ndarray:
        """uint8 [H,W,3]; openpi's ALOHA clients send [3,H,W]."""
        image = self._value(found, key, "uint8 [H, W, 3]")
        if isinstance(image, bytes):
            image = self._decoded(image, f"'{key}'")
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
            raise UserError(f"'{key}' must be an image, uint8 [H, W, 3]; got {_what(image)}")
        if image.shape[0] == 3 and image.shape[-1] != 3:
            image = np.ascontiguousarray(image.transpose(1, 2, 0))
        if image.shape[-1] != 3 or 0 in image.shape:
            raise UserError(f"'{key}' must be an image, uint8 [H, W, 3]; got {_what(image)}")
        try:
            check_size(image.shape[0], image.shape[1], f"'{key}'")  # it is padded to a square of its longer side
        except CorruptEpisode as error:
            raise UserError(str(error)) from None
        return image

    def _decoded(self, data: bytes, what: str) -> np.ndarray:
        """uint8 [H,W,3] of a JPEG or WebP file; its size is looked at before anything of that size is made."""
        try:
            width, height = open_image(data, what, ("JPEG", "WEBP")).size
            if 3 * width * height > self._most:
                raise UserError(
                    f"{what} is {width}x{height} pixels; at most {self._most // 3 / 1e6:.1f} million are decoded: "
                    "resize it to what the server's metadata says (`images`)"
                )
            return decode(data, what, ("JPEG", "WEBP"))
        except CorruptEpisode as error:
            raise UserError(str(error)) from None

    def _state(self, found: Mapping[str, Any]) -> np.ndarray:
        """[ds] float32."""
        parts, width = [], len(self._state_names)
        for key in self._keys["state"]:
            value = self._value(found, key, f"[{width}] numbers" if len(self._keys["state"]) == 1 else "numbers")
            part = (
                np.asarray(value)
                if isinstance(value, (np.ndarray, np.generic, int, float)) or _flat(value)
                else np.array([None])
            )
            if part.dtype.kind not in "biuf" or part.ndim > 1:
                raise UserError(f"'{key}' must be numbers [{width}]; got {_what(value)}")
            with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused below
                parts.append(part.reshape(-1).astype(np.float32))
        state, name = np.concatenate(parts), ", ".join(self._keys["state"])
        if len(state) != width:
            raise UserError(
                f"'{name}' has {len(state)} numbers; the robot's state has {width}: {', '.join(self._state_names)}"
            )
        if not np.isfinite(state).all():
            bad = ", ".join(self._state_names[i] for i in np.flatnonzero(~np.isfinite(state)))
            raise UserError(f"'{name}' has numbers that are not finite: {bad}")
        self._require_state(state)
        return state

    def _value(self, found: Mapping[str, Any], key: str, what: str) -> Any:
        if key not in found:
            near = difflib.get_close_matches(key, found, n=1, cutoff=0.6)
            names = ", ".join(sorted(found)[:12]) or "nothing"
            guess = f"; did you mean {near[0]!r:.80}?" if near else ""
            raise UserError(f"'{key}' ({what}) is missing{guess} (the message has: {names:.300})")
        return found[key]


def flatten(message: Mapping[Any, Any], depth: int = DEPTH) -> dict[str, Any]:
    """Values by their joined names without a leading "observation/"."""
    out: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str):
            continue
        inner = flatten(value, depth - 1) if isinstance(value, Mapping) and depth > 1 else None
        out.update({_bare(key): value} if inner is None else {_bare(f"{key}/{name}"): v for name, v in inner.items()})
    return out


def _bare(key: str) -> str:
    if key.startswith("observation."):  # LeRobot's
        key = key.replace(".", "/")
    return key.removeprefix("observation/")


def _plain_names(views: Sequence[str]) -> dict[str, str]:
    """openpi's names of images → ours, where there is one view that each may mean."""
    wrist = [view for view in views if "wrist" in view]
    others = [view for view in views if "wrist" not in view]
    named = {"wrist_image": wrist, "image": others if others else wrist}
    return {name: f"images/{found[0]}" for name, found in named.items() if len(found) == 1}


def _flat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, (int, float, np.generic)) for x in value)


def _what(value: Any) -> str:
    return (
        f"{value.dtype} {list(value.shape)}"
        if isinstance(value, (np.ndarray, np.generic))
        else f"{type(value).__name__} {value!r:.40}"
    )
