"""The client's own asynchronous RL on a small environment: an answer in a box is right or wrong."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from river_setup import PROBLEMS, TOKENIZER, connect, new_model
from river_setup import reward as reward_of

from river_client import rl
from river_client.renderers import ParsedResponse, Renderer, SamplePrompt

END = "<|im_end|>"
STEPS = 5


class TinyRenderer(Renderer):
    """The chat format of the tiny model, for one question and its answer."""

    def build_prompt_str(self, messages: list[dict], **_: Any) -> str:
        said = "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in messages)
        return f"{said}<|im_start|>assistant\n"

    def build_continuation_prompt(
        self, messages: list[dict], *, last_stop: str | None
    ) -> SamplePrompt:
        end = "" if last_stop == END else END
        return SamplePrompt(f"{end}\n{self.build_prompt_str(messages)}")

    def get_stop_strings(self) -> list[str]:
        return [END]

    def parse_response(self, text: str, **_: Any) -> ParsedResponse:
        message = {"role": "assistant", "content": text.removesuffix(END)}
        return ParsedResponse(message=message, stop_found=text.endswith(END))

    def build_training_example(self, messages: list[dict], **_: Any) -> Any:
        raise NotImplementedError


class Arithmetic(rl.Env):
    """One question of the list; the reward is 1 for the right box."""

    async def reset(self, row: dict) -> list[dict]:
        question = re.sub(r"<\|im_(start|end)\|>(user|assistant)?\n?", "", row["prompt"])
        return [{"role": "user", "content": question.strip()}]

    async def reward(self, trajectory: rl.Trajectory, row: dict) -> float:
        return reward_of(trajectory.final_text, row["answer"])


async def train(model: Any, until: int, folder: Path | None) -> dict[str, Any]:
    engine = rl.RolloutEngine(
        model,
        env=Arithmetic(),
        renderer=TinyRenderer(TOKENIZER),
        budget=rl.Budget(max_context_tokens=160, max_generated_tokens=32),
        sample_timeout=120.0,
        return_expert_routing="routing" in sys.argv,
    )
    trainer = rl.AsyncTrainer(
        engine=engine,
        optimizer=rl.Adam(lr=1e-3),
        completion=rl.GroupCompletion(mode="wait"),
        loss=rl.CISPO(normalize="token"),
        groups_per_step=8,
        group_size=4,
        advantage=rl.GroupCentered(),
        max_staleness=0,
        routing_replay="routing" in sys.argv,
        checkpoint=rl.Checkpointing(run_dir=folder) if folder is not None else None,
    )
    seen: dict[str, Any] = {"rewards": [], "steps": [], "metrics": {}}
    running = trainer.run(PROBLEMS[:64], steps=STEPS)
    async for step in running:
        seen["rewards"].append(step.metrics["reward/mean"])
        seen["steps"].append(step.model_step)
        seen["metrics"] = {
            name: value
            for name, value in step.metrics.items()
            if name.startswith(("loss/", "optimizer/"))
        }
        if step.n == until:
            break
    await running.aclose()
    return seen


def main() -> dict[str, Any]:
    """Goes on from what is kept in a folder, if there is anything, and up to the step that is asked for."""
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 and sys.argv[2] != "-" else None
    with closing(connect()) as client, client.session() as session:
        return asyncio.run(train(new_model(session), int(sys.argv[1]), folder))


print(json.dumps(main()))
