"""The Drifting DiT: noise and an observation's context in, an action chunk out, in one forward pass.

The same trunk carries the denoising heads it is compared with (`heads.py`): they read noisy actions in the place of the
noise, and the time of each sample as one more condition.

Letters: B observations, G noise samples per observation, T action steps (horizon), L context tokens, W width, H heads,
h = W/H head width. An observation's context, its keys and values and its modulation are computed once and shared by its
G noise samples: for cross-attention the G·T action tokens of one observation are one longer query sequence.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, unknown
from .attention import Attend, Kernel, kernel, sdpa
from .config import require_range

FOURIER_FEATURES = 64  # features of the control frequency and of the guidance scale
FRONT_LAYERS = 2  # blocks with cross-attention in the "front" variant


MOST = {  # of each number of a DiT, beyond which it is a mistake and would only fill the memory
    **{"width": 16384, "blocks": 512, "heads": 512, "mlp_ratio": 64, "horizon": 4096, "noise_dim": 4096},
    **{"action_dim": 4096, "proprio_dim": 4096, "embodiments": 4096},
}


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the generator; `dit_config(size)` gives the named sizes."""

    width: int = 768  # W
    blocks: int = 12  # transformer blocks
    heads: int = 12  # attention heads; W/heads must be even (RoPE)
    mlp_ratio: int = 4  # SwiGLU hidden width / W
    cross_attention: Literal["all", "front"] = "all"  # in every block, or only in the first two
    horizon: int = 16  # T, action steps of a chunk
    noise_dim: int = 64  # noise entries per action step (denoising: action_dim)
    action_dim: int = 128  # unified action entries
    proprio_dim: int = 128  # unified proprioception entries
    embodiments: int = 7  # distinct robot types
    embodiment_token: bool = True  # whether the robot's type is a condition (False: an ablation)
    skip_std: float = 0.2  # std of the initial samples (normalized actions have std 0.2)
    denoising: bool = False  # input is noisy actions at a time of their own (heads.head_dit)

    def __post_init__(self) -> None:
        require_range("DiT", self, MOST)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(f"DiT width {self.width} with {self.heads} heads: width/heads must be an even whole number")
        if not 0 <= self.skip_std < 100:  # NaN, too
            raise UserError(f"DiT skip_std is {self.skip_std}; it must be 0 to 100")
        if self.cross_attention not in ("all", "front"):
            raise unknown("cross_attention", str(self.cross_attention), ("all", "front"))
        if self.denoising and self.noise_dim != self.action_dim:
            raise UserError(
                f"DiT noise_dim is {self.noise_dim}; a denoising head reads actions, so it must be {self.action_dim}"
            )


SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "blocks": 4, "heads": 4, "mlp_ratio": 2},
    "small": {"width": 512, "blocks": 8, "heads": 8},
    "base": {"width": 768, "blocks": 12, "heads": 12},
    "large": {"width": 1024, "blocks": 24, "heads": 16},
}


def dit_config(size: str, **overrides: Any) -> DiTConfig:
    """The config of a named size with some fields replaced; `UserError` for an unknown size or field."""
    if size not in SIZES:
        raise unknown("DiT size", size, SIZES)
    for name in overrides:
        if name not in DiTConfig.__dataclass_fields__:
            raise unknown("DiT setting", name, DiTConfig.__dataclass_fields__)
    return DiTConfig(**{**SIZES[size], **overrides})


def build_dit(size: str, **overrides: Any) -> DriftingDiT:
    """A freshly initialized model of a named size: tiny, small, base (147 M parameters) or large."""
    return DriftingDiT(dit_config(size, **overrides))


class Context(NamedTuple):
    """What the generator knows of B observations, computed once and shared by all noise samples."""

    sequence: Tensor  # [B,L,W] projected vision and text tokens
    mask: Tensor  # [B,L] bool, False: invisible
    pooled: Tensor  # [B,W] global feature
    embodiment: Tensor  # [B] int64
    proprio: Tensor  # [B,128] float, normalized
    control_hz: Tensor  # [B] float, Hz
    action_mask: Tensor  # [B,128] bool, active action slots: denoising heads see zeros in the others


class SelfAttention(nn.Module):
    """Attention among the T steps of each chunk, with QK-norm and RoPE."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(width // heads)), nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [n,H,T,h] each
        q = rotate(rms(q, self.q_scale), rotation).to(v.dtype)  # [n,H,T,h]
        k = rotate(rms(k, self.k_scale), rotation).to(v.dtype)  # [n,H,T,h]
        y = attend(q, k, v)  # [n,H,T,h]
        return self.out(y.transpose(1, 2).flatten(2))  # [n,T,W]


class CrossAttention(nn.Module):
    """Attention of the action tokens to the context, with QK-norm; no positions (the context tokens carry theirs)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(width // heads)), nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor, attend: Attend, kept: list[Tensor] | None = None) -> Tensor:
        """`kept`, if given, is filled with the keys and values by the first call and read by the later ones."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,H,G·T,h]
        if kept:
            k, v = kept  # [B,H,L,h] each
        else:
            both = self.kv(context).unflatten(-1, (2, self.heads, -1))  # [B,L,2,H,h]
            k, v = both.permute(2, 0, 3, 1, 4).unbind(0)  # [B,H,L,h] each
            k = rms(k, self.k_scale).to(v.dtype)  # [B,H,L,h]
            if kept is not None:
                kept += (k, v)
        q = rms(q, self.q_scale).to(v.dtype)  # [B,H,G·T,h]
        y = attend(q, k, v)  # [B,H,G·T,h]
        return self.out(y.transpose(1, 2).flatten(2))  # [B,G·T,W]


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [B,G,T,hidden] each
        return self.down(F.silu(gate) * up)  # [B,G,T,W]


class Block(nn.Module):
    """Self-attention, optional cross-attention, feed-forward; each behind an adaLN-Zero gate (identity at the start).

    The modulation is one projection shared by all blocks plus this block's own table (as in PixArt-α).
    """

    def __init__(self, config: DiTConfig, cross: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.width, config.heads)
        self.cross_attention = CrossAttention(config.width, config.heads) if cross else None
        self.feed_forward = FeedForward(config.width, config.mlp_ratio * config.width)
        self.modulation = nn.Parameter(torch.zeros(7 if cross else 6, config.width))

    def forward(
        self,
        x: Tensor,
        shared: Tensor,
        context: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: tuple[Attend, Attend],
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """x [B,G,T,W]; `shared` [B,g,7,W] with g = 1 where the samples of an observation share their modulation, else
        G; `attend` within a chunk and to the context."""
        table = (shared[:, :, : len(self.modulation)] + self.modulation).unsqueeze(3).unbind(2)  # 6 or 7 of [B,g,1,W]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table[:6]  # [B,g,1,W] each
        y = normed(x) * (1 + scale_a) + shift_a  # [B,G,T,W]
        y = self.self_attention(y.flatten(0, 1), rotation, attend[0])  # [B·G,T,W]
        x = x + gate_a * y.reshape(x.shape)  # [B,G,T,W]
        if self.cross_attention is not None:
            y = self.cross_attention(normed(x).flatten(1, 2), context, attend[1], kept)  # [B,G·T,W]
            x = x + table[6] * y.reshape(x.shape)  # [B,G,T,W]
        y = normed(x) * (1 + scale_f) + shift_f  # [B,G,T,W]
        return x + gate_f * self.feed_forward(y)  # [B,G,T,W]


class DriftingDiT(nn.Module):
    """noise [B,G,T,64] → actions [B,G,T,128], given a `Context`; α [B] is the guidance scale as an input.

    At initialization the output is exactly the linear skip of the noise: the G samples of an observation spread with
    `skip_std`. (Drifting starts from spread samples; a collapsed set separates only like 1/(G−1).)
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.attention: Kernel = sdpa  # `set_attention` replaces it
        w = config.width
        self.noise_in = nn.Linear(config.noise_dim, w)
        self.null_token = nn.Parameter(torch.zeros(1, 1, w))  # always visible: a fully masked observation is defined
        self.conditioning = nn.ModuleDict(
            {
                "embodiment": nn.Embedding(config.embodiments, w),
                "proprio": nn.Sequential(nn.Linear(config.proprio_dim, w // 2), nn.SiLU(), nn.Linear(w // 2, w)),
                "control_hz": nn.Linear(FOURIER_FEATURES, w),
                "alpha": nn.Linear(FOURIER_FEATURES, w),
            }
        )
        if not config.embodiment_token:
            del self.conditioning["embodiment"]
        if config.denoising:
            self.conditioning["time"] = nn.Linear(FOURIER_FEATURES, w)
        self.modulation = nn.Linear(w, 7 * w)
        cross = config.blocks if config.cross_attention == "all" else FRONT_LAYERS
        self.blocks = nn.ModuleList(Block(config, cross=i < cross) for i in range(config.blocks))
        self.action_head = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, config.action_dim))
        self.skip = nn.Linear(config.noise_dim, config.action_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier linears, embeddings of std 0.02, zero modulation (adaLN-Zero) and zero last layer of the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.null_token, std=0.02)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.action_head[-1].get_parameter("weight"))
        nn.init.normal_(self.skip.weight, std=self.config.skip_std / math.sqrt(self.config.noise_dim))

    def condition(self, context: Context, alpha: Tensor, time: Tensor | None = None) -> Tensor:
        """Global condition [B,1,W]: pooled features + embodiment + proprioception + control frequency + α; with the
        time [B,G] of each sample added [B,G,W]."""
        part, dtype = self.conditioning, self.skip.weight.dtype
        known = context.pooled  # [B,W]
        if self.config.embodiment_token:
            known = known + part["embodiment"](context.embodiment)  # [B,W]
        shared = (
            known
            + part["proprio"](context.proprio.to(dtype))  # [B,W]
            + part["control_hz"](fourier(context.control_hz.clamp(min=1e-3).log2()).to(dtype))  # [B,W]
            + part["alpha"](fourier(alpha).to(dtype))
        ).unsqueeze(1)  # [B,1,W]
        return shared if time is None else shared + part["time"](fourier(10 * time).to(dtype))  # [B,1,W] or [B,G,W]

    def forward(
        self,
        noise: Tensor,
        context: Context,
        alpha: Tensor,
        time: Tensor | None = None,
        kept: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """A denoising head needs `time` [B,G] in [0, 1] and takes noisy actions as `noise` [B,G,T,128]. `kept`: one
        empty list per block, for several calls with one context: the first alone computes keys and values."""
        b, g, t, n = noise.shape
        if (t, n) != (self.config.horizon, self.config.noise_dim) or b != context.sequence.shape[0]:
            raise ValueError(
                f"noise: expected [B,G,{self.config.horizon},{self.config.noise_dim}] for "
                f"{context.sequence.shape[0]} observations, got {tuple(noise.shape)}"
            )
        if (time is not None) != self.config.denoising or (time is not None and time.shape != (b, g)):
            raise ValueError(
                f"time: expected {(b, g) if self.config.denoising else None}, "
                f"got {None if time is None else tuple(time.shape)}"
            )
        noise = noise.to(self.skip.weight.dtype)  # [B,G,T,64]
        shared = self.modulation(F.silu(self.condition(context, alpha, time))).unflatten(2, (7, -1))  # [B,1 or G,7,W]
        sequence = torch.cat([self.null_token.expand(b, -1, -1).to(context.sequence.dtype), context.sequence], dim=1)
        if sequence.is_cuda and torch.is_autocast_enabled("cuda"):
            sequence = sequence.to(torch.get_autocast_dtype("cuda"))  # once, and not again in every block
        mask = F.pad(context.mask, (1, 0), value=True)  # [B,1+L]
        attend = self.attention(None, t), self.attention(mask, g * t)
        rotation = rope(t, self.config.width // self.config.heads, noise.device)  # [T,h/2] each
        x = self.noise_in(noise)  # [B,G,T,W]
        for i, block in enumerate(self.blocks):
            x = block(x, shared, sequence, rotation, attend, None if kept is None else kept[i])  # [B,G,T,W]
        return self._actions(self.action_head[:-1](x), noise)

    def _actions(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """[B,G,T,W] and noise -> [B,G,T,128], in the parameters' dtype also under autocast: near 1 bfloat16 has steps
        of 0.004, a fifth of the field's smallest temperature."""
        device, dtype = noise.device.type, self.skip.weight.dtype
        whole = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with whole:
            return self.action_head[-1](hidden.to(dtype)) + self.skip(noise)


def set_attention(net: nn.Module, kind: str) -> None:
    """Switch every DiT inside `net` to a kernel: auto (= sdpa), sdpa, flex or flash; weights and configs do not change.

    Call it when the net is on its device. `UserError` for an unknown name, or a missing library or device."""
    for module in net.modules():
        if isinstance(module, DriftingDiT):
            module.attention = kernel(kind, module.skip.weight.device, module.config.width // module.config.heads)


def normed(x: Tensor) -> Tensor:
    """LayerNorm without parameters (the modulation has them)."""
    return F.layer_norm(x, x.shape[-1:])


def rms(x: Tensor, scale: Tensor) -> Tensor:
    """x over its root mean square along the last axis, times `scale`: the QK-norm."""
    return F.rms_norm(x, x.shape[-1:], scale.to(x.dtype))


def rope(steps: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, h/2] of the rotary positions 0..T−1, base 10000 (arXiv:2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)  # [h/2]
    angle = torch.arange(steps, device=device, dtype=torch.float32)[:, None] * frequency  # [T,h/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [n,H,T,h] with its halves rotated as pairs."""
    cos, sin = rotation[0].to(x.dtype), rotation[1].to(x.dtype)  # [T,h/2]
    a, b = x.chunk(2, dim=-1)  # [n,H,T,h/2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)  # [n,H,T,h]


def fourier(x: Tensor) -> Tensor:
    """sin and cos features [..., 64] of a real number of size about 1 to 10; wavelengths from 0.5 to 64."""
    octave = torch.linspace(1.0, -6.0, FOURIER_FEATURES // 2, device=x.device)  # [32]
    phase = 2 * math.pi * x.float()[..., None] * octave.exp2()  # [...,32]
    return torch.cat([phase.sin(), phase.cos()], dim=-1)  # [...,64]


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Number of parameters by part (self_attention, cross_attention, feed_forward, modulation, …) and "total"."""
    counts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        part = next(p for p in name.split(".") if p not in ("dit", "blocks") and not p.isdigit())
        counts[part] = counts.get(part, 0) + parameter.numel()
    return {**counts, "total": sum(counts.values())}
