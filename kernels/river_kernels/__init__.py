"""Many LoRA adapters over one frozen model in one pass over packed tokens. Imports only torch."""

from river_kernels.adam import AdamRule, AdamUpdate, gradient_norms, multi_adam
from river_kernels.attention import Packing, make_packing, packed_causal_attention
from river_kernels.expert_parallel import moe_lora_parallel
from river_kernels.frozen import verify_rows
from river_kernels.linear import Block, lora_linear, lora_linear_blocks
from river_kernels.logprobs import lora_logprobs
from river_kernels.moe import moe_lora
from river_kernels.norm import RmsNorm
from river_kernels.rotary import rotate
from river_kernels.segments import NO_ADAPTER, LoraPair, Pairs, Segment, Segments

__all__ = [
    "NO_ADAPTER",
    "AdamRule",
    "AdamUpdate",
    "Block",
    "LoraPair",
    "Packing",
    "Pairs",
    "RmsNorm",
    "Segment",
    "Segments",
    "gradient_norms",
    "lora_linear",
    "lora_linear_blocks",
    "lora_logprobs",
    "make_packing",
    "moe_lora",
    "moe_lora_parallel",
    "multi_adam",
    "packed_causal_attention",
    "rotate",
    "verify_rows",
]
