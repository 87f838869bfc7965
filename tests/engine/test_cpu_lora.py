"""The CPU's LoRA arithmetic against plain float64, on vLLM's own kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

from river_engine.cpu_experts import MergedLoRAExperts
from river_engine.cpu_punica import GroupedPunica

EXPERTS, HIDDEN, INNER, RANK, SLOTS, TOP = 4, 64, 48, 8, 3, 2
# Lora ids by slot; the last slot is the one that -1 wrongly reaches.
SLOT_IDS: list[int | None] = [11, None, 13]
ROW_IDS = [0, 13, 11, 0, 13, 13, 0, 11]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def punica(row_ids: list[int]) -> GroupedPunica:
    wrapper = GroupedPunica(64, 16, "cpu")
    mapping = LoRAMapping(tuple(row_ids), tuple(row_ids), is_prefill=True)
    wrapper.update_metadata(mapping, SLOT_IDS, SLOTS + 1, 512)
    return wrapper


def slot_of(row_id: int) -> int:
    return SLOT_IDS.index(row_id) if row_id else -1


@pytest.mark.parametrize("row_ids", [ROW_IDS, [0] * 5, [13] * 5], ids=["mixed", "base", "one"])
def test_linear_rows_get_their_own_adapter(generator: torch.Generator, row_ids: list[int]) -> None:
    """Each row gets the two low-rank updates of its own slot; rows without an adapter get none."""
    widths = (32, 16)
    x = torch.randn(len(row_ids), HIDDEN, generator=generator)
    y = torch.randn(len(row_ids), sum(widths), generator=generator)
    a = tuple(torch.randn(SLOTS, 1, RANK, HIDDEN, generator=generator) for _ in widths)
    b = tuple(torch.randn(SLOTS, 1, width, RANK, generator=generator) for width in widths)
    expected = y.double()
    for row, row_id in enumerate(row_ids):
        if row_id:
            slot = slot_of(row_id)
            deltas = [
                b[i][slot, 0].double() @ a[i][slot, 0].double() @ x[row].double() for i in (0, 1)
            ]
            expected[row] += torch.cat(deltas)

    punica(row_ids).add_lora_linear(y, x, a, b, 1.0, widths)

    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-5)


def test_logits_rows_get_their_own_adapter(generator: torch.Generator) -> None:
    """The head's update goes by the rows that are sampled from."""
    x = torch.randn(len(ROW_IDS), HIDDEN, generator=generator)
    y = torch.randn(len(ROW_IDS), 100, generator=generator)
    a = torch.randn(SLOTS, 1, RANK, HIDDEN, generator=generator)
    b = torch.randn(SLOTS, 1, 100, RANK, generator=generator)
    expected = y.double()
    for row, row_id in enumerate(ROW_IDS):
        if row_id:
            slot = slot_of(row_id)
            expected[row] += b[slot, 0].double() @ a[slot, 0].double() @ x[row].double()

    punica(ROW_IDS).add_lora_logits(y, x, a, b, 1.0)

    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-5)


class Experts:
    """Real expert kernels over random weights, with adapters in slots 0 and 2, and the same in float64."""

    def __init__(self, generator: torch.Generator) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * 0.2

        self.w13, self.w2 = random(EXPERTS, 2 * INNER, HIDDEN), random(EXPERTS, HIDDEN, INNER)
        self.a13 = tuple(random(SLOTS, EXPERTS, RANK, HIDDEN) for _ in range(2))
        self.b13 = tuple(random(SLOTS, EXPERTS, INNER, RANK) for _ in range(2))
        self.a2, self.b2 = random(SLOTS, EXPERTS, RANK, INNER), random(SLOTS, EXPERTS, HIDDEN, RANK)
        self.enabled = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
        self.layer: Any = torch.nn.Module()
        self.layer.w13_weight = torch.nn.Parameter(self.w13.clone(), requires_grad=False)
        self.layer.w2_weight = torch.nn.Parameter(self.w2.clone(), requires_grad=False)
        # Only what these kernels read of vLLM's configuration.
        self.kernels = MergedLoRAExperts.__new__(MergedLoRAExperts)
        config: Any = SimpleNamespace(
            intermediate_size_per_partition=INNER, activation=MoEActivation.SILU
        )
        self.kernels.moe_config = config
        self.kernels.quant_config = FusedMoEQuantConfig.make()
        self.kernels.process_weights_after_loading(self.layer)

    def run(
        self, row_ids: list[int], x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        context: Any = SimpleNamespace(
            punica_wrapper=punica(row_ids),
            adapter_enabled=self.enabled,
            w13_lora_a_stacked=self.a13,
            w13_lora_b_stacked=self.b13,
            w2_lora_a_stacked=(self.a2,),
            w2_lora_b_stacked=(self.b2,),
        )
        self.kernels.set_lora_context(context)
        output = torch.full_like(x, float("nan"))
        rest = dict.fromkeys(
            (
                "expert_map",
                "a1q_scale",
                "a2_scale",
                "workspace13",
                "workspace2",
                "expert_tokens_meta",
            )
        )
        self.kernels.apply(
            output=output,
            hidden_states=x,
            w1=self.layer.w13_weight,
            w2=self.layer.w2_weight,
            topk_weights=weights,
            topk_ids=ids,
            activation=MoEActivation.SILU,
            global_num_experts=EXPERTS,
            apply_router_weight_on_input=False,
            **rest,
        )
        return output

    def reference(
        self, row_ids: list[int], x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros(x.shape, dtype=torch.float64)
        for row, row_id in enumerate(row_ids):
            for choice in range(TOP):
                expert, slot = int(ids[row, choice]), slot_of(row_id)
                gate_up, down = self.w13[expert].double(), self.w2[expert].double()
                if slot >= 0:
                    deltas = [
                        self.b13[i][slot, expert].double() @ self.a13[i][slot, expert].double()
                        for i in (0, 1)
                    ]
                    gate_up = gate_up + torch.cat(deltas)
                    down = down + self.b2[slot, expert].double() @ self.a2[slot, expert].double()
                gate, up = (gate_up @ x[row].double()).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                output[row] += float(weights[row, choice]) * (down @ inner)
        return output


@pytest.mark.parametrize("row_ids", [ROW_IDS, [0] * 5, [13] * 5], ids=["mixed", "base", "one"])
def test_experts_match_float64(generator: torch.Generator, row_ids: list[int]) -> None:
    """Gate, up and down with their updates inside the non-linearity, for every row's own adapter or none."""
    experts = Experts(generator)
    x = torch.randn(len(row_ids), HIDDEN, generator=generator)
    weights = torch.rand(len(row_ids), TOP, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in row_ids]).to(
        torch.int32
    )

    output = experts.run(row_ids, x, weights, ids)

    expected = experts.reference(row_ids, x, weights, ids)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_experts_follow_a_slot_that_changes(generator: torch.Generator) -> None:
    """After `forget`, the next step merges what is in the slot then."""
    experts = Experts(generator)
    x = torch.randn(4, HIDDEN, generator=generator)
    weights, ids = torch.ones(4, TOP), torch.tensor([[0, 1]] * 4, dtype=torch.int32)
    experts.run([13] * 4, x, weights, ids)
    experts.b2[2] *= -1.0
    experts.kernels.forget(2)

    output = experts.run([13] * 4, x, weights, ids)

    expected = experts.reference([13] * 4, x, weights, ids)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_experts_without_weights_in_the_adapter_are_the_base(generator: torch.Generator) -> None:
    """An adapter on other modules only leaves the experts' packed path as it is."""
    experts = Experts(generator)
    experts.enabled.zero_()
    x = torch.randn(4, HIDDEN, generator=generator)
    weights, ids = torch.ones(4, TOP), torch.tensor([[0, 1]] * 4, dtype=torch.int32)

    output = experts.run([13] * 4, x, weights, ids)

    torch.testing.assert_close(
        output.double(), experts.reference([0] * 4, x, weights, ids), atol=1e-5, rtol=1e-5
    )
