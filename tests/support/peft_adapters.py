"""Adapters that PEFT itself makes of the tiny model, and what transformers and PEFT say with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from river_ops.models import TINY_MOE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

Tensors = dict[str, torch.Tensor]


def new_base() -> Any:
    """The tiny model in float32, as transformers has it."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


def make_adapter(directory: Path, **lora: Any) -> Path:
    """Has PEFT make and save an adapter that changes a good deal."""
    torch.manual_seed(7)
    with quiet():
        model = get_peft_model(
            new_base(), LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | lora)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(str(directory))
    return directory


def peft_logprobs(directory: Path, tokens: list[int]) -> torch.Tensor:
    """The log-probabilities of `tokens[1:]` by PEFT, each given those before it."""
    with quiet():
        model = PeftModel.from_pretrained(new_base(), str(directory)).eval()
    return logprobs_of(model, tokens)


def logprobs_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """The log-probabilities of `tokens[1:]` by a model."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def change_files(
    directory: Path,
    tensors: Callable[[Tensors], Tensors] | None = None,
    **config: Any,
) -> None:
    """Rewrites an adapter's tensors and fields of its configuration."""
    if tensors is not None:
        save_file(tensors(load_file(directory / WEIGHTS_FILE)), directory / WEIGHTS_FILE)
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


@contextmanager
def quiet() -> Generator[None]:
    """Without what transformers and PEFT warn about of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
