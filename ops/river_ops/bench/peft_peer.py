"""The peer of the training benchmark: PEFT's layers on transformers' model, trained as its users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from river_trainer.protocol import Adam

Experts = Literal["grouped_mm", "eager"]


class PeftTrainer:
    """One adapter, read from files, on one model. Switching between adapters is left out, in the peer's favour."""

    def __init__(self, model_path: Path, adapter: Path, *, experts: Experts, adam: Adam) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, experts_implementation=experts
        )
        self._model: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).train()
        self._weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        self._clip_norm = adam.grad_clip_norm
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=adam.lr,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=True,
        )

    def step(self, tokens_ST: torch.Tensor) -> float:  # noqa: N803  # shapes are in capitals
        """Forward, backward, clipping and AdamW on one batch; returns the loss summed over tokens."""
        logits_STV = self._model(input_ids=tokens_ST, use_cache=False).logits  # noqa: N806
        loss = functional.cross_entropy(
            logits_STV[:, :-1].flatten(0, 1), tokens_ST[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._weights, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
