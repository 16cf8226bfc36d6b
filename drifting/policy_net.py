"""PolicyNet: the trained part of the policy: projects cached or live VLM features to the DiT's width, generates.

Letters: B observations, L vision tokens, Lt text tokens, S = L+Lt, D feature width of the VLM, W width of the DiT,
G draws, T action steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batch import FeatureBatch
from .dit import FOURIER_FEATURES, Context, DiTConfig, DriftingDiT, fourier


@dataclass(frozen=True)
class PolicyNetConfig:
    """Shape of the projector; the generator's is nested."""

    feature_width: int = 2048                            # D, width of the VLM features
    dit: DiTConfig = field(default_factory=DiTConfig)    # the generator
    max_views: int = 8                                   # distinct cameras (view_id < max_views)
    max_frames: int = 8                                  # distinct frame offsets (frame_id < max_frames)


class PolicyNet(nn.Module):
    """(FeatureBatch, noise, α) → normalised unified actions.

    `encode` projects the observation once; `decode` generates any number of draws from it; `forward` is both.
    """

    def __init__(self, config: PolicyNetConfig) -> None:
        super().__init__()
        self.config = config
        d, w = config.feature_width, config.dit.width
        self.proj_seq = nn.Sequential(nn.Linear(d, w), nn.LayerNorm(w))
        self.proj_pool = nn.Sequential(nn.Linear(d, w), nn.LayerNorm(w))
        self.camera_embed = nn.Embedding(config.max_views, w)
        self.time_embed = nn.Embedding(config.max_frames, w)
        self.text_position = nn.Linear(FOURIER_FEATURES, w, bias=False)   # embedded words have no order of their own
        self.dit = DriftingDiT(config.dit)
        for linear in (self.proj_seq[0], self.proj_pool[0], self.text_position):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.proj_seq[0], self.proj_pool[0]):
            nn.init.zeros_(linear.bias)
        for embedding in (self.camera_embed, self.time_embed):
            nn.init.normal_(embedding.weight, std=0.02)

    def encode(self, batch: FeatureBatch) -> Context:
        """The context of every observation. Masked tokens are replaced by zero before anything reads them."""
        device, l = batch.tokens.device.type, batch.tokens.shape[1]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.proj_seq[0].weight.dtype
        mask = torch.cat([batch.token_mask, batch.text_mask], dim=1)            # [B,S]
        features = torch.cat([batch.tokens.to(dtype), batch.text.to(dtype)], dim=1)   # [B,S,D]
        features = features.masked_fill(~mask[..., None], 0)                    # [B,S,D]
        mean = features.sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True).clamp(min=1)   # [B,D]
        pooled = self.proj_pool(mean.to(dtype))                                 # [B,W]
        sequence = self.proj_seq(features)                                      # [B,S,W]
        place = self.camera_embed(batch.view_id) + self.time_embed(batch.frame_id)    # [B,L,W]
        index = torch.arange(batch.text.shape[1], device=batch.text.device)     # [Lt]
        order = self.text_position(fourier(index.float()).to(dtype))            # [Lt,W]
        sequence = torch.cat([sequence[:, :l] + place, sequence[:, l:] + order], dim=1)   # [B,S,W]
        return Context(sequence, mask, pooled, batch.embodiment, batch.proprio, batch.control_hz)

    def decode(self, context: Context, noise: Tensor, alpha: Tensor) -> Tensor:
        """Chunks [B,G,T,128] in the parameters' dtype, for `noise` [B,G,T,64] and scales α `alpha` [B]."""
        return self.dit(noise, context, alpha)

    def forward(self, batch: FeatureBatch, noise: Tensor, alpha: Tensor) -> Tensor:
        """`decode(encode(batch), noise, alpha)`: noise [B,G,T,64], alpha [B] → [B,G,T,128]."""
        return self.decode(self.encode(batch), noise, alpha)
