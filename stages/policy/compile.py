"""torch.compile for the blocks of a policy network."""

from __future__ import annotations

import os
import shutil

from ...drifting.policy_net import PolicyNet
from ...errors import UserError


def compile_blocks(net: PolicyNet) -> None:
    """`torch.compile` every transformer block, in place: one compilation serves all, and no parameter changes its name."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        raise UserError(
            "compile needs a C++ compiler and there is none (g++ or clang++; on Debian: apt install g++); install one, or train without it"
        )
    for block in net.dit.blocks:
        block.compile()
