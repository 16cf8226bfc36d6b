"""Grasps in Isaac Gym Preview 4: a separate program, for the Python 3.8 that it needs; imports nothing of dvla.

    python3.8 isaac_worker.py      reads one request per line of stdin, answers each with a line on stdout (both JSON)

request   {"hand": URDF of the hand with six virtual root joints, "joints": names of its other joints,
           "waypoints": [K, 6 + J], "steps": [K-1],
           "objects": [{"urdf": path, "pose": [7] position and quaternion xyzw}, …]}    frame of the table, z up; m, rad
answer    {"before": [N, 13], "after": [N, 13]}     root states of the objects (position 3, quaternion xyzw 4,
          velocities 6), or {"error": text}

The hand follows the waypoints in straight lines, `steps` of 1/60 s each; the ground plane is the table. Gravity is
always on. Stiffness and damping are guesses: this was never run in Isaac Gym. Letters: N objects, J finger joints, K
waypoints, D = 6 + J.
"""

import json
import os
import sys

HZ = 60
ROOT_DRIVE, FINGER_DRIVE = (4000.0, 200.0), (20.0, 1.0)  # stiffness, damping of position drives
OBJECT_MASS, FRICTION = 0.1, 1.0  # kg; as in DexGraspNet 2.0's evaluation


def drive_order(names, joints):
    """Index of every URDF joint `names` [D] in a waypoint: six root joints in the URDF's order, then `joints` [J]."""
    missing = [joint for joint in joints if joint not in names]
    roots = [name for name in names if name not in joints]
    if missing or len(roots) != 6:
        raise ValueError(
            "the hand's URDF has the joints %s; six of a virtual root and %s are needed"
            % (", ".join(names), ", ".join(joints))
        )
    places = {name: i for i, name in enumerate(roots + list(joints))}
    return [places[name] for name in names]


def targets(waypoints, steps):
    """Every target [D] through `waypoints` [K][D], with `steps` [K-1] from each to the next."""
    for begin, end, count in zip(waypoints, waypoints[1:], steps):
        for i in range(count):
            share = (i + 1.0) / count
            yield [a + share * (b - a) for a, b in zip(begin, end)]


def simulate(request, gymapi, gymtorch, torch):
    """The answer to one request."""
    gym = gymapi.acquire_gym()
    params = gymapi.SimParams()
    params.dt, params.substeps, params.up_axis, params.use_gpu_pipeline = 1.0 / HZ, 2, gymapi.UP_AXIS_Z, False
    params.gravity = gymapi.Vec3(0.0, 0.0, -9.81)
    params.physx.solver_type, params.physx.num_position_iterations, params.physx.contact_offset = 1, 8, 0.002
    sim = gym.create_sim(0, -1, gymapi.SIM_PHYSX, params)  # -1: no graphics
    if sim is None:
        raise RuntimeError("Isaac Gym made no simulation; is there an NVIDIA GPU with its driver?")
    try:
        plane = gymapi.PlaneParams()
        plane.normal = gymapi.Vec3(0, 0, 1)
        gym.add_ground(sim, plane)
        env = gym.create_env(sim, gymapi.Vec3(-1, -1, 0), gymapi.Vec3(1, 1, 1), 1)
        order = _add_hand(gym, gymapi, sim, env, request)
        for number, thing in enumerate(request["objects"]):
            _add_object(gym, gymapi, sim, env, number, thing)
        gym.prepare_sim(sim)
        roots = gymtorch.wrap_tensor(gym.acquire_actor_root_state_tensor(sim))  # [1 + N, 13], the hand first
        dofs = gymtorch.wrap_tensor(gym.acquire_dof_state_tensor(sim))  # [D, 2] angle and speed
        gym.refresh_actor_root_state_tensor(sim)
        before = roots[1:].tolist()
        first = torch.tensor([request["waypoints"][0][i] for i in order], dtype=torch.float32)
        dofs[:, 0], dofs[:, 1] = first, 0.0
        gym.set_dof_state_tensor(sim, gymtorch.unwrap_tensor(dofs))
        for target in targets(request["waypoints"], request["steps"]):
            wanted = torch.tensor([target[i] for i in order], dtype=torch.float32)
            gym.set_dof_position_target_tensor(sim, gymtorch.unwrap_tensor(wanted))
            gym.simulate(sim)
            gym.fetch_results(sim, True)
        gym.refresh_actor_root_state_tensor(sim)
        return {"before": before, "after": roots[1:].tolist()}
    finally:
        gym.destroy_sim(sim)


def _add_hand(gym, gymapi, sim, env, request):
    options = gymapi.AssetOptions()
    options.fix_base_link = options.disable_gravity = True
    asset = gym.load_asset(sim, os.path.dirname(request["hand"]), os.path.basename(request["hand"]), options)
    order = drive_order(gym.get_asset_dof_names(asset), request["joints"])
    actor = gym.create_actor(env, asset, gymapi.Transform(), "hand", 0, 1)
    properties = gym.get_actor_dof_properties(env, actor)
    properties["driveMode"].fill(gymapi.DOF_MODE_POS)
    for i, place in enumerate(order):
        properties["stiffness"][i], properties["damping"][i] = ROOT_DRIVE if place < 6 else FINGER_DRIVE
    gym.set_actor_dof_properties(env, actor, properties)
    return order


def _add_object(gym, gymapi, sim, env, number, thing):
    options = gymapi.AssetOptions()
    options.vhacd_enabled = True  # meshes are not convex
    asset = gym.load_asset(sim, os.path.dirname(thing["urdf"]), os.path.basename(thing["urdf"]), options)
    place = gymapi.Transform()
    place.p, place.r = gymapi.Vec3(*thing["pose"][:3]), gymapi.Quat(*thing["pose"][3:])
    actor = gym.create_actor(env, asset, place, "object_%d" % number, 0, 2)
    shapes = gym.get_actor_rigid_shape_properties(env, actor)
    for shape in shapes:
        shape.friction = FRICTION
    gym.set_actor_rigid_shape_properties(env, actor, shapes)
    bodies = gym.get_actor_rigid_body_properties(env, actor)
    bodies[0].mass = OBJECT_MASS
    gym.set_actor_rigid_body_properties(env, actor, bodies, recomputeInertia=True)


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Isaac Gym prints on stdout
    import torch  # Isaac Gym refuses to be imported after it
    from isaacgym import gymapi, gymtorch

    for line in sys.stdin:
        try:
            answer = simulate(json.loads(line), gymapi, gymtorch, torch)
        except Exception as error:  # whatever it is, the caller should read it
            answer = {"error": "%s: %s" % (type(error).__name__, error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
