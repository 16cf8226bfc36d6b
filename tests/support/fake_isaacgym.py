"""A stand-in for the package isaacgym with its documented calls and shapes: only the hand moves, to its targets.

`write_isaacgym(folder)` makes it importable from there. An object rises with the hand whose drives closed within REACH.
"""

from __future__ import annotations

from pathlib import Path

CODE = """
import json, os, types
import numpy as np, torch
REACH = 0.2

class Record(types.SimpleNamespace):
    def __getattr__(self, name):            # settings of settings, like SimParams().physx
        if name.startswith("__"):
            raise AttributeError(name)
        self.__dict__[name] = Record()
        return self.__dict__[name]

class Gym:
    def create_sim(self, compute, graphics, engine, params):
        assert graphics == -1 and params.gravity.z == -9.81
        self.places, self.drives, self.path = [], None, []
        return self
    def add_ground(self, sim, plane): pass
    def create_env(self, sim, low, high, per_row): return 0
    def load_asset(self, sim, root, name, options):
        assert os.path.isfile(os.path.join(root, name))
        return name
    def get_asset_dof_names(self, asset):
        return ["j%d" % i for i in (1, 0, *range(2, 16))] + ["x", "y", "z", "rx", "ry", "rz"]
    def create_actor(self, env, asset, pose, name, group, mask):
        assert name == "hand" or self.places      # the hand comes first
        p, r = getattr(pose, "p", None), getattr(pose, "r", None)
        self.places.append([p.x, p.y, p.z, r.x, r.y, r.z, r.w] if name != "hand" else [0, 0, 0, 0, 0, 0, 1])
        return len(self.places) - 1
    def get_actor_dof_properties(self, env, actor):
        return {"driveMode": np.zeros(22), "stiffness": np.zeros(22), "damping": np.zeros(22)}
    def set_actor_dof_properties(self, env, actor, properties):
        stiffness = properties["stiffness"]
        assert (stiffness[16:] > stiffness[:16].max()).all() and (properties["driveMode"] == 1).all()
    def get_actor_rigid_shape_properties(self, env, actor): return [Record()]
    def set_actor_rigid_shape_properties(self, env, actor, properties): assert properties[0].friction > 0
    def get_actor_rigid_body_properties(self, env, actor): return [Record()]
    def set_actor_rigid_body_properties(self, env, actor, properties, recomputeInertia): assert recomputeInertia
    def prepare_sim(self, sim):
        self.roots = torch.tensor([place + [0.0] * 6 for place in self.places], dtype=torch.float32)
        self.dofs = torch.zeros(22, 2)
    def acquire_actor_root_state_tensor(self, sim): return self.roots
    def acquire_dof_state_tensor(self, sim): return self.dofs
    def refresh_actor_root_state_tensor(self, sim): pass
    def set_dof_state_tensor(self, sim, dofs): pass
    def set_dof_position_target_tensor(self, sim, targets):
        assert targets.shape == (22,)
        self.path.append(targets.clone())
    def simulate(self, sim): pass
    def fetch_results(self, sim, wait):
        if len(self.path) == 130:           # the whole way
            hand = torch.stack(self.path)[:, 16:19]
            closed = hand[69]               # after the third way point
            for root in self.roots[1:]:
                if (root[:3] - closed).norm() < REACH:
                    root[2] += hand[-1, 2] - closed[2]
    def destroy_sim(self, sim): print("chatter that is no answer", flush=True)
"""
API = """
from . import Gym, Record
acquire_gym = Gym
SimParams, PlaneParams, AssetOptions, Transform = Record, Record, Record, Record
UP_AXIS_Z, SIM_PHYSX, DOF_MODE_POS = 1, 0, 1
class Vec3:
    def __init__(self, x, y, z): self.x, self.y, self.z = x, y, z
class Quat:
    def __init__(self, x, y, z, w): self.x, self.y, self.z, self.w = x, y, z, w
"""
TORCH = "def wrap_tensor(tensor): return tensor\nunwrap_tensor = wrap_tensor\n"


def write_isaacgym(folder: Path) -> Path:
    """`folder`, for PYTHONPATH."""
    package = folder / "isaacgym"
    package.mkdir(parents=True)
    for name, text in (("__init__", CODE), ("gymapi", API), ("gymtorch", TORCH)):
        (package / f"{name}.py").write_text(text)
    return folder
