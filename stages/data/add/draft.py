"""`dvla data add`: a dataset config from what the files say; guesses are marked, the rest is asked.

Embodiment, units, gripper values, rotation form, and whether an action is a target or a displacement are answers, each
with a proposal where names or ranges suggest one. A config is written only when all answers that it needs are given.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....cache.actions.action_map import FieldSpec
from ....cache.actions.rotations import WIDTH
from ....cache.actions.slots import SLOTS
from ....cache.readers import open_source
from ....cache.readers.search import load_config
from ....common.files import write_output
from ....errors import UserError, unknown
from .dataset import Dataset
from .guesses import Target, guess
from .proposals import Vector, propose
from .questions import QUESTIONS, Question, plain


@dataclass(frozen=True)
class Request:
    """The arguments of `dvla data add`."""

    source: str
    answers: Mapping[str, str]  # option → text as given
    fields: tuple[str, ...] = ()  # the --field values
    action_columns: tuple[str, ...] | None = None  # None: the usual ones
    state_columns: tuple[str, ...] | None = None  # None: the usual ones, where there are some
    name: str | None = None
    license: str = ""
    take_certain: bool = False  # proposals that leave no doubt count as answers
    take_all: bool = False  # every proposal does

    def answered(self, question: Question, answer: str) -> Request:
        """This request with one more answer."""
        if question.prefix:
            return dataclasses.replace(self, fields=(*self.fields, question.prefix + answer))
        return dataclasses.replace(self, answers={**self.answers, question.option: answer})


def draft(dataset: Dataset, request: Request) -> tuple[str, list[Question]]:
    """The YAML text, and the questions to answer first (while there is one, the text means nothing).

    `UserError` for an invalid answer, or a column or dimension that does not exist.
    """
    columns = {"action": dataset.columns("action", request.action_columns)}
    columns["state"] = dataset.columns("state", request.state_columns)
    given, targets, vectors, missing = _given(request.fields), {}, {}, {}
    for what in columns:
        names = dataset.names(what, columns[what])
        targets[what] = guess(names, _given_targets(what, given[what], names))
        vectors[what] = Vector(targets[what], *dataset.range_of(columns[what]))
        for first, last in _gaps(targets[what]):
            span = f"{what}.{first}-{last}" if last > first else f"{what}.{first}"
            called = f"{names[first]} … {names[last]}" if last > first else names[first]
            missing[span] = Question("--field", f"meaning of {called}: slots, rotation:FORM or drop", str, f"{span}=")
    ask = _Asker(request, vectors, dataset.robot)
    kind = ask("--action-kind") or "absolute"
    ask("--embodiment")
    ask.missing |= missing
    if not dataset.source.rate_known:
        ask("--control-hz")
    lines = {}
    for what in columns:
        moving = kind if what == "action" else "absolute"
        lines[what] = [
            f"  - {_flow(_entry(t, what, moving, ask))}  # {_origin(t)}" for t in targets[what] if t.kind != "unknown"
        ]
    return _text(dataset, request, ask, columns, lines), list(ask.missing.values())


def write(request: Request, text: str, out: Path) -> None:
    """Write the config after it was read back and opened the dataset; an existing file is refused."""
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out}: a dataset config is a .yaml file; choose another --out")
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / out.name
        trial.write_text(text)
        open_source(request.source, load_config(trial))
    write_output(out, text.encode())


class _Asker:
    """Answers by option; keeps which were used and which are missing, with what is proposed for them."""

    def __init__(self, request: Request, vectors: Mapping[str, Vector], robot: str) -> None:
        self._request, self._vectors, self._robot = request, vectors, robot
        self.missing: dict[str, Question] = {}
        self.used: dict[str, str] = {}

    @property
    def state_differs(self) -> bool:
        """Whether the state's gripper has ends of its own: given, or far from the action's."""
        if "--state-gripper" in self._request.answers:
            return True
        ends = [v.span("gripper_open") for v in (self._vectors["action"], self._vectors["state"])]
        if "--gripper" in self._request.answers or not all(ends):
            return False
        sizes = [high - low for low, high in filter(None, ends)]
        return max(sizes) > 3 * min(sizes) > 0

    def __call__(self, option: str) -> Any:
        """The answer's value, or that of a proposal that is taken; None where there is none yet."""
        question, answer = QUESTIONS[option], self._request.answers.get(option)
        if answer is None:
            proposal = propose(option, self._vectors, self._robot, self.used)
            if not proposal or not (proposal.certain and self._request.take_certain or self._request.take_all):
                self.missing[option] = dataclasses.replace(question, proposal=proposal)
                return question.read(proposal.answer) if proposal else None
            answer = proposal.answer
        self.used[option] = answer
        try:
            return question.read(answer)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None


# --- dimensions ------------------------------------------------------------------------------------------------------


def _given(fields: Sequence[str]) -> dict[str, dict[int, tuple[int, str]]]:
    """--field values by vector and first dimension: (last dimension, what they are)."""
    found: dict[str, dict[int, tuple[int, str]]] = {"action": {}, "state": {}}
    for text in fields:
        parts = re.fullmatch(r"(action|state)\.(\d+)(?:-(\d+))?=(.+)", text.strip())
        if not parts:
            raise UserError(
                f"--field '{text}': expected e.g. action.6=gripper_open, state.0-5='arm_joint_{{0..5}}_pos', "
                "action.3-6=rotation:quat_xyzw or action.7=drop"
            )
        first = int(parts[2])
        if first in found[parts[1]]:
            raise UserError(f"--field '{text}': {parts[1]}.{first} is given twice")
        found[parts[1]][first] = int(parts[3] or first), parts[4]
    return found


def _given_targets(what: str, given: Mapping[int, tuple[int, str]], names: Sequence[str]) -> dict[int, Target]:
    targets: dict[int, Target] = {}
    for first, (last, text) in sorted(given.items()):
        where, at = f"--field {what}.{first}-{last}={text}", first
        if not first <= last < len(names) or first in {i for f, t in targets.items() for i in range(f, f + t.width)}:
            raise UserError(f"{where}: the {what} has dimensions 0 to {len(names) - 1}, and each is given once")
        for element in [f"drop:{last + 1 - first}"] if text == "drop" else text.split(","):
            for target in _elements(element.strip()):
                targets[at] = dataclasses.replace(target, native=tuple(names[at : at + target.width]), guessed=False)
                at += target.width
        if at != last + 1:
            raise UserError(
                f"{where}: describes {at - first} dimensions, but {what}.{first}-{last} has {last + 1 - first}"
            )
    return targets


def _elements(text: str) -> list[Target]:
    """One element of --field: drop, drop:N, rotation:FORM[:PREFIX], a slot or a range of slots."""
    if dropped := re.fullmatch(r"drop(?::([1-9]\d*))?", text):
        return [Target("drop", ("",) * int(dropped[1] or 1))]
    if text.startswith("rotation:"):
        form, _, prefix = text.removeprefix("rotation:").partition(":")
        if form not in WIDTH:
            raise unknown("rotation form", form, WIDTH)
        return [Target("rotation", ("",) * WIDTH[form], form=form, prefix=prefix or "eef_angle")]
    return [Target("field", ("",), name) for name in FieldSpec(field=text).names]


def _gaps(targets: Sequence[Target]) -> list[tuple[int, int]]:
    """(first, last) dimension of every range that is not understood."""
    flat = [t.kind == "unknown" for t in targets for _ in t.native]
    edges = [i for i in range(len(flat) + 1) if (i < len(flat) and flat[i]) != (i > 0 and flat[i - 1])]
    return [(first, stop - 1) for first, stop in zip(edges[::2], edges[1::2])]


# --- entries ---------------------------------------------------------------------------------------------------------


def _entry(target: Target, what: str, kind: str, ask: _Asker) -> dict[str, Any]:
    """The field map entry of one target of a vector that holds absolute values, displacements or velocities."""
    moving = kind != "absolute" and target.guessed
    if target.kind == "drop":
        return {"drop": target.width}
    if target.kind == "rotation" and not moving:
        prefix = {"prefix": target.prefix} if target.prefix != "eef_angle" else {}
        return {"rotation": target.form or ask("--rotation"), **prefix}
    if target.kind == "rotation":
        if target.form:
            raise UserError(
                f"{what}: {', '.join(target.native)} cannot be a {kind} as a quaternion; describe them with --field"
            )
        side = target.prefix.removesuffix("eef_angle")
        slots = [f"{side}eef_angular_vel_{axis}" for axis in ("roll", "pitch", "yaw")]
    else:
        slots = [_velocity(target.slot, what, target.native[0]) if moving else target.slot]
    scale, offset = _scale(slots[0], what, ask)
    entry: dict[str, Any] = {"field": slots[0]} if len(slots) == 1 else {"fields": slots}
    entry |= {"scale": scale} if scale != 1 else {}
    entry |= {"offset": offset} if offset else {}
    delta = kind == "delta" and "_vel" in slots[0] and not slots[0].startswith("base")
    entry |= {"delta": True} if delta else {}
    said = ask.used.get(_unit_option(slots[0]), "").split(",")
    unit = plain(said[-1] if "angular" in slots[0] else said[0])
    entry |= {"unit": unit} if re.fullmatch(r"[a-z]+", unit) else {}
    return entry | (
        {} if any(re.fullmatch(r"\w+\[\d+\]", n) for n in target.native) else {"native": list(target.native)}
    )


def _velocity(slot: str, what: str, native: str) -> str:
    """The slot of this quantity's rate of change; a gripper stays absolute, a base is a velocity already."""
    if "gripper_open" in slot or "_vel" in slot:
        return slot
    found = slot.replace("eef_pos_", "eef_vel_").replace("_pos", "_vel")
    if found not in SLOTS or not ("arm_joint" in slot or "eef_pos" in slot):
        raise UserError(f"{what}: {native} looks like {slot}, which has no velocity slot; describe it with --field")
    return found


def _scale(slot: str, what: str, ask: _Asker) -> tuple[float, float]:
    """(scale, offset) from the files' unit to the slot's; (1, 0) while the answer is missing."""
    turns = "angular" in slot
    if "gripper_open" in slot:
        option = "--state-gripper" if what == "state" and ask.state_differs else "--gripper"
        opened, closed = ask(option) or (1.0, 0.0)
        return 1 / (opened - closed), -closed / (opened - closed)
    answer = ask(_unit_option(slot))
    return (answer[turns] if isinstance(answer, tuple) else answer or 1.0), 0.0


def _unit_option(slot: str) -> str:
    """The option that gives a slot's native unit; "" of a gripper."""
    if "gripper_open" in slot:
        return ""
    if slot.startswith("base"):
        return "--base-unit"
    if "eef" in slot:
        return "--delta-scale" if "_vel" in slot else "--position-unit"
    return "--finger-unit" if "finger" in slot else "--joint-unit"


# --- text ------------------------------------------------------------------------------------------------------------


def _flow(entry: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {json.dumps(v)}" for k, v in entry.items()) + "}"


def _origin(target: Target) -> str:
    names = ", ".join(json.dumps(n, ensure_ascii=False) for n in target.native)
    return f"guessed from {names}" if target.guessed else f"{names}, by --field"


def _text(
    dataset: Dataset,
    request: Request,
    ask: _Asker,
    columns: Mapping[str, Sequence[str]],
    lines: Mapping[str, list[str]],
) -> str:
    source, (cameras, sizes) = dataset.source, dataset.cameras()
    known, name = list(dataset.known), request.name or source.name
    answers = ", ".join(f"{option} {answer}" for option, answer in ask.used.items() if option != "--embodiment")
    rate = f", {source.fps:g} Hz" if source.rate_known else ""
    robot = f"; add {json.dumps(dataset.robot)} for every dataset of this robot" if dataset.robot else ""
    head = [
        f'# {source.name}: {dataset.version}{rate}. Written by `dvla data add`: check every line marked "guessed".',
        f"name: {json.dumps(name)}",
        f"match: [{json.dumps(glob.escape(known[0]) if known else name)}]  # the dataset's name{robot}",
        *([f"format: {source.format}"] if source.format != "lerobot" else ()),
        f"embodiment: {plain(ask.used.get('--embodiment', ''))}",
        f"license: {json.dumps(request.license)}" + ("" if request.license else "  # not in the files"),
        f"source: [{json.dumps(dataset.path)}]",
        f"note: {json.dumps('as given to `dvla data add`: ' + answers, ensure_ascii=False)}",
        f"views: {json.dumps(cameras)}  # {sizes}",
    ]
    if hz := ask.used.get("--control-hz"):
        head.append(f"control_hz: {QUESTIONS['--control-hz'].read(hz):g}")
    head += [f"{what}_columns: {json.dumps(list(found))}" for what, found in columns.items() if found]
    for what in ("action", "state"):
        head += [f"{what}:", *lines[what]] if lines[what] else [f"{what}: []"]
    return "\n".join(head) + "\n"
