"""PaliGemma 2's parts between pixels and features, on transformers' own modules: SigLIP, the projector, and the first
layers of Gemma 2.

Letters: N images or observations, S patches of one image = its tokens (SigLIP has no class token), or tokens of a
sequence, F values of one patch, C vision width, A heads, E head width, D language width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ....common.documents import shown
from ....errors import UserError
from ..blocks import attention, through


class PaliGemmaVision(nn.Module):
    """SigLIP and the projector, with modules named as the hub's tensors are, and with depth language `language`."""

    vision_tower: Any  # modules that only name what is in them
    multi_modal_projector: Any
    language: GemmaLanguage
    recompute: bool  # gradient checkpointing; the encoder sets it

    def __init__(self, config: Any, out_width: int) -> None:
        from transformers.models.siglip.modeling_siglip import SiglipVisionModel

        super().__init__()
        tower = SiglipVisionModel(config)
        self.vision_tower, self.multi_modal_projector = nn.Module(), nn.Module()
        self.vision_tower.vision_model = getattr(tower, "vision_model", tower)
        self.multi_modal_projector.linear = nn.Linear(config.hidden_size, out_width)

    @property
    def siglip(self) -> Any:
        """transformers' vision transformer."""
        return self.vision_tower.vision_model

    def rebuild_buffers(self, device: torch.device) -> None:
        """Make the position indices, buffers that a state dict does not hold."""
        embeddings = self.siglip.embeddings
        for name, buffer in list(embeddings.named_buffers()):
            setattr(embeddings, name, torch.arange(buffer.shape[-1], device=device).expand(1, -1))

    def lower(self, patches: torch.Tensor, end: int) -> torch.Tensor:
        """Normalized patch rows [N,S,F], row by row -> hidden states that enter layer `end` [N,S,C]."""
        conv = self.siglip.embeddings.patch_embedding  # stride = kernel: one matrix product
        hidden = F.linear(patches.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)  # [N,S,C]
        hidden = hidden + self._positions(patches.shape[1])  # [N,S,C]
        return self._run(hidden, 0, end)  # [N,S,C]

    def upper(self, hidden: torch.Tensor, begin: int) -> torch.Tensor:
        """Hidden states that enter layer `begin` [N,S,C] -> SigLIP's output after its last LayerNorm [N,S,C]."""
        hidden = self._run(hidden, begin, len(self.siglip.encoder.layers))  # [N,S,C]
        return self.siglip.post_layernorm(hidden)  # [N,S,C]

    def _run(self, hidden: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        def run(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + _attend(layer.self_attn, layer.layer_norm1(hidden))  # [N,S,C]
            return hidden + layer.mlp(layer.layer_norm2(hidden))  # [N,S,C]

        return through(self.siglip.encoder.layers[begin:end], run, hidden, self.recompute)

    def _positions(self, patches: int) -> torch.Tensor:
        """Learned positions [S,C] of a square image of S patches."""
        learned = self.siglip.embeddings.position_embedding.weight  # [S0,C]
        if patches == len(learned):
            return learned
        side, target = int(len(learned) ** 0.5), int(patches**0.5)
        grid = learned.T.reshape(1, -1, side, side)  # [1,C,side,side]
        return F.interpolate(grid, (target, target), mode="bicubic", align_corners=False)[0].flatten(1).T


def _attend(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of SigLIP: [N,S,C] -> [N,S,C], one call for all images."""
    q, k, v = (
        layer(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    return attn.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))  # q, k, v [N,A,S,E]


class GemmaLanguage(nn.Module):
    """The first `count` layers of Gemma 2, and its last norm where these are all of them.

    Every token attends to every other, as in PaliGemma's prefix. transformers adds the prefix to the mask of layers
    with a sliding window, too, so that no window bounds it, however long it is."""

    layers: Any
    rotary_emb: Any

    def __init__(self, config: Any, count: int) -> None:
        from transformers.models.gemma2 import modeling_gemma2 as gemma

        super().__init__()
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"text_config has rotary positions of type {shown(rope)}; PaliGemma 2 has the default ones")
        config._attn_implementation = "eager"  # the only one in transformers that always soft-caps Gemma 2's logits
        self.context: int = config.max_position_embeddings  # most tokens of a sequence
        self.layers = nn.ModuleList(gemma.Gemma2DecoderLayer(config, i) for i in range(count))
        self.rotary_emb = gemma.Gemma2RotaryEmbedding(config)
        whole = count == config.num_hidden_layers
        self.norm = gemma.Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if whole else None

    def rebuild_buffers(self, config: Any, device: torch.device) -> None:
        """Make the rotary frequencies, buffers that a state dict does not hold."""
        self.rotary_emb = type(self.rotary_emb)(config=config).to(device)

    def run(self, hidden: torch.Tensor, wanted: Collection[int], recompute: bool) -> list[torch.Tensor]:
        """Hidden states [N,S,D] through all layers -> what left each `wanted` one, 1 for the first; of the model's last
        one it is the norm's output."""
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None]  # counted from 1
        rotary = self.rotary_emb(hidden, positions)

        def through_layer(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            out = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
            return out[0] if isinstance(out, tuple) else out  # [N,S,D]

        found = []
        for i in range(len(self.layers)):
            hidden = through(self.layers[i : i + 1], through_layer, hidden, recompute)  # [N,S,D]
            if i + 1 in wanted:
                found.append(hidden if self.norm is None or i + 1 < len(self.layers) else self.norm(hidden))
        return found
