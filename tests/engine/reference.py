"""What transformers and PEFT say of the same weights and the same adapter files, in float32."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from river_engine.protocol import AdapterRef


@cache
def _model(path: Path, adapter: AdapterRef | None) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, unquote(urlsplit(adapter.location).path))
    return model.eval()


def all_logits(path: Path, adapter: AdapterRef | None, tokens: list[int]) -> torch.Tensor:
    """What each position says of the token after it, float32 [T, V]."""
    with torch.inference_mode():
        return _model(path, adapter)(torch.tensor([tokens])).logits[0].float()


def token_logprobs(path: Path, adapter: AdapterRef | None, tokens: list[int]) -> list[float]:
    """Of `tokens[1:]`, each given those before it."""
    logprobs = all_logits(path, adapter, tokens).log_softmax(-1)
    return [logprobs[position, token].item() for position, token in enumerate(tokens[1:])]


def chosen_experts(path: Path, adapter: AdapterRef | None, tokens: list[int]) -> np.ndarray:
    """Of every token in every MoE layer, [T, layers, K], most likely first."""
    chosen: list[torch.Tensor] = []
    model = _model(path, adapter)
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[2]))
        for name, module in model.named_modules()
        if name.endswith(".mlp.gate")
    ]
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(chosen, dim=1).numpy()
