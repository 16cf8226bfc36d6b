"""PolicyNet: the trained part of the policy: projects cached or live VLM features to the DiT's width, generates.

Letters: B observations, L vision tokens of all frames, Lt text tokens, Hp past states, S = L+Lt+Hp, D feature width of
the VLM, Dt width of its text features, W width of the DiT, G noise samples, T action steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batch import UNIFIED_DIM, FeatureBatch
from ..errors import UserError
from .config import require_range
from .dit import FOURIER_FEATURES, Context, DiTConfig, DriftingDiT, fourier


@dataclass(frozen=True)
class PolicyNetConfig:
    """Shape of the projector; the generator's is nested."""

    feature_width: int = 2048  # D, width of the VLM features
    text_width: int | None = None  # Dt, of text features; None: D, and both share one projection
    dit: DiTConfig = field(default_factory=DiTConfig)  # the generator
    max_views: int = 8  # distinct cameras (view_id < max_views)
    max_frames: int = 8  # distinct frame offsets (frame_id < max_frames)
    layers: int = 1  # n, layers of the VLM that features are made of
    layers_as: str = "width"  # where they are: side by side in the width, D = n·d, or as n tokens beside each other
    past_states: int = 0  # Hp, states before the current one, as tokens of the context
    slots: tuple[int, ...] = ()  # of the 128, ascending: all that the generator reads and gives (an ablation); () = all

    def __post_init__(self) -> None:
        require_range("network", self, {n: 65536 for n in ("feature_width", "text_width", "max_views", "max_frames")})
        if not 1 <= self.layers <= 64 or self.layers_as not in ("width", "tokens"):
            raise UserError(
                f"network layers is {self.layers} as '{self.layers_as}'; it must be 1 to 64, as width or tokens"
            )
        if self.mixes and (self.feature_width % self.layers or self.text_width is None):
            raise UserError(
                f"network layers is {self.layers} as width; feature_width {self.feature_width} must be a multiple of "
                f"it, and text_width be given"
            )
        if not 0 <= self.past_states < self.max_frames:
            raise UserError(f"network past_states is {self.past_states}; it must be 0 to {self.max_frames - 1}")
        if list(self.slots) != sorted({s for s in self.slots if 0 <= s < UNIFIED_DIM}):
            raise UserError(
                f"network slots are {list(self.slots)[:9]}; they must be ascending, of 0 to {UNIFIED_DIM - 1}"
            )
        if self.slots and (
            len(self.slots) != self.dit.action_dim or len(self.slots) != self.dit.proprio_dim or self.dit.denoising
        ):
            raise UserError(
                f"the generator has {self.dit.action_dim} action and {self.dit.proprio_dim} proprioception entries for "
                f"{len(self.slots)} slots; their counts must match, and a denoising head reads all 128"
            )

    @property
    def mixes(self) -> bool:
        """Whether several layers are side by side in the width of the features."""
        return self.layers > 1 and self.layers_as == "width"


class PolicyNet(nn.Module):
    """(FeatureBatch, noise, α) → normalized unified actions.

    `encode` projects the observation once; `decode` generates any number of samples from it; `forward` is both.

    Several layers of the VLM, side by side, are mixed as ELMo does (arXiv:1802.05365): each is divided by its root mean
    square, and their sum is weighted by a softmax over learned numbers and scaled by one. Layers as tokens have a
    learned embedding each.
    """

    slots: Tensor  # [slots] int64, those of the config

    def __init__(self, config: PolicyNetConfig) -> None:
        super().__init__()
        self.config = config
        d, w = config.feature_width // (config.layers if config.mixes else 1), config.dit.width
        self.proj_seq = nn.Sequential(nn.Linear(d, w), nn.LayerNorm(w))
        self.proj_text = nn.Sequential(nn.Linear(config.text_width, w), nn.LayerNorm(w)) if config.text_width else None
        self.proj_pool = nn.Sequential(nn.Linear(d + (config.text_width or 0), w), nn.LayerNorm(w))
        self.camera_embed = nn.Embedding(config.max_views, w)
        self.time_embed = nn.Embedding(config.max_frames, w)
        self.text_position = nn.Linear(FOURIER_FEATURES, w, bias=False)  # embedded words have no order of their own
        self.dit = DriftingDiT(config.dit)
        # part of the config, not of the weights
        self.register_buffer("slots", torch.tensor(config.slots, dtype=torch.int64), persistent=False)
        projections = [p[0] for p in (self.proj_seq, self.proj_text, self.proj_pool) if p is not None]
        for linear in (*projections, self.text_position):
            nn.init.xavier_uniform_(linear.get_parameter("weight"))
        for linear in projections:
            nn.init.zeros_(linear.get_parameter("bias"))
        for embedding in (self.camera_embed, self.time_embed):
            nn.init.normal_(embedding.weight, std=0.02)
        if config.past_states:  # last, so that all others begin as they do without
            self.proj_past = nn.Sequential(nn.Linear(config.dit.proprio_dim, w), nn.LayerNorm(w))
            self.past_embed = nn.Embedding(config.past_states, w)
            nn.init.normal_(self.past_embed.weight, std=0.02)
        if config.mixes:
            self.layer_mix, self.layer_scale = nn.Parameter(torch.zeros(config.layers)), nn.Parameter(torch.ones(()))
        elif config.layers > 1:
            self.layer_embed = nn.Embedding(config.layers, w)
            nn.init.normal_(self.layer_embed.weight, std=0.02)

    @property
    def layer_weights(self) -> list[float]:
        """Shares of the layers in the mix, whose sum is 1; without one, none."""
        return self.layer_mix.detach().softmax(0).tolist() if self.config.mixes else []

    def encode(self, batch: FeatureBatch) -> Context:
        """The context of every observation. Masked tokens are replaced by zero before anything reads them."""
        device, l = batch.tokens.device.type, batch.tokens.shape[1]
        weights = self.text_position.weight.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights
        mask = torch.cat([batch.token_mask, batch.text_mask], dim=1)  # [B,S]
        parts = [batch.tokens.to(dtype), batch.text.to(dtype)]  # [B,L,D], [B,Lt,Dt]
        if self.proj_text is None:
            parts = [torch.cat(parts, dim=1).masked_fill(~mask[..., None], 0)]  # [B,S,D]
            sequence = self.proj_seq(parts[0])  # [B,S,W]
        else:
            parts = [p.masked_fill(~m[..., None], 0) for p, m in zip(parts, (batch.token_mask, batch.text_mask))]
            parts[0] = self._mixed(parts[0]) if self.config.mixes else parts[0]  # [B,L,d]
            sequence = torch.cat([self.proj_seq(parts[0]), self.proj_text(parts[1])], dim=1)  # [B,S,W]
        total = torch.cat([p.sum(1, dtype=torch.float32) for p in parts], dim=-1)  # [B,D] or [B,D+Dt]
        pooled = self.proj_pool((total / mask.sum(1, keepdim=True).clamp(min=1)).to(dtype))  # [B,W]
        place = self.camera_embed(batch.view_id) + self.time_embed(batch.frame_id)  # [B,L,W]
        if self.config.layers > 1 and not self.config.mixes:
            place = place + self.layer_embed(torch.arange(l, device=batch.tokens.device) % self.config.layers)
        index = torch.arange(batch.text.shape[1], device=batch.text.device)  # [Lt]
        order = self.text_position(fourier(index.float()).to(dtype))  # [Lt,W]
        # [B,L,W], [B,Lt,W]; slices would bind an exported graph to Lt > 1
        seen, words = sequence.split([l, batch.text.shape[1]], dim=1)
        sequence = torch.cat([seen + place, words + order], dim=1)  # [B,S,W]
        proprio = batch.proprio[:, self.slots] if self.config.slots else batch.proprio  # [B,128], or those of the slots
        if batch.past_proprio is not None and batch.past_mask is not None:
            sequence = torch.cat([sequence, self._past(batch.past_proprio, batch.past_mask).to(sequence.dtype)], dim=1)
            mask = torch.cat([mask, batch.past_mask], dim=1)
        return Context(sequence, mask, pooled, batch.embodiment, proprio, batch.control_hz, batch.action_mask)

    def _mixed(self, tokens: Tensor) -> Tensor:
        """Layers side by side [B,L,n·d] -> their mix [B,L,d]."""
        layers = tokens.unflatten(-1, (self.config.layers, -1))  # [B,L,n,d]
        size = torch.linalg.vector_norm(layers, dim=-1, dtype=torch.float32) / layers.shape[-1] ** 0.5  # [B,L,n]
        share = self.layer_scale * self.layer_mix.softmax(0) / size.clamp(min=1e-3)  # a masked token is zero
        return (layers * share.to(tokens.dtype)[..., None]).sum(-2)

    def _past(self, states: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B,Hp,W] of past states [B,Hp,128]; masked ones are replaced by zero before anything reads them."""
        if states.shape[1] != self.config.past_states:
            raise ValueError(f"past_proprio: expected {self.config.past_states} states, got {states.shape[1]}")
        states = states[..., self.slots] if self.config.slots else states
        projected = self.proj_past(states.masked_fill(~mask[..., None], 0).to(self.text_position.weight.dtype))
        return projected + self.past_embed.weight

    def decode(
        self,
        context: Context,
        noise: Tensor,
        alpha: Tensor,
        time: Tensor | None = None,
        kept: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Chunks [B,G,T,128] in the parameters' dtype, for `noise` [B,G,T,64] and scales α `alpha` [B].

        Of a denoising head: its prediction for noisy actions `noise` [B,G,T,128] at `time` [B,G]; `kept` as in
        `DriftingDiT`."""
        out = self.dit(noise, context, alpha, time, kept)
        if not self.config.slots:
            return out
        zeros = out.new_zeros(*out.shape[:-1], UNIFIED_DIM)  # in the other slots, which no loss reads
        return zeros.index_copy(-1, self.slots, out)

    def forward(self, batch: FeatureBatch, noise: Tensor, alpha: Tensor, time: Tensor | None = None) -> Tensor:
        """`decode(encode(batch), noise, alpha, time)`: noise [B,G,T,64], alpha [B] → [B,G,T,128]."""
        return self.decode(self.encode(batch), noise, alpha, time)
