"""Many LoRA adapters over one frozen model in one pass over packed tokens. Imports only torch."""

from river_kernels.adam import AdamRule, AdamUpdate, gradient_norms, multi_adam
from river_kernels.attention import Packing, make_packing, packed_causal_attention
from river_kernels.expert_parallel import moe_lora_parallel
from river_kernels.frozen import verify_rows
from river_kernels.linear import Block, lora_linear, lora_linear_blocks
from river_kernels.logprobs import lora_logprobs
from river_kernels.moe import moe_lora
from river_kernels.norm import RmsNorm
from river_kernels.quantized import (
    Fp8Weight,
    FrozenWeight,
    Nvfp4Weight,
    QuantizedWeight,
    Scratch,
    StoredWeight,
    dense_weight,
    matrices_of,
    rows_of,
)
from river_kernels.rotary import rotate
from river_kernels.segments import NO_ADAPTER, LoraPair, Pairs, Segment, Segments

__all__ = [
    "NO_ADAPTER",
    "AdamRule",
    "AdamUpdate",
    "Block",
    "Fp8Weight",
    "FrozenWeight",
    "LoraPair",
    "Nvfp4Weight",
    "Packing",
    "Pairs",
    "QuantizedWeight",
    "RmsNorm",
    "Scratch",
    "Segment",
    "Segments",
    "StoredWeight",
    "dense_weight",
    "gradient_norms",
    "lora_linear",
    "lora_linear_blocks",
    "lora_logprobs",
    "make_packing",
    "matrices_of",
    "moe_lora",
    "moe_lora_parallel",
    "multi_adam",
    "packed_causal_attention",
    "rotate",
    "rows_of",
    "verify_rows",
]
