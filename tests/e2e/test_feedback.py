"""The feedback loop: served, judged, trained on, served anew, and one write back to what was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

import river_client as river
from river_ops.demo.loop import MAX_TOKENS
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo
from river_ops.tiny_moe.problems import Problem, problems, reward

ALIAS = "tutor"
CHATS = 200
SAMPLES = 4
PER_ROUND = 40
HELD_OUT = 96
AT_ONCE = 8
LEARNT_WITHIN_S = 90.0
VERSION = "x-river-policy-version"


def _ask(chat: openai.OpenAI, problem: Problem, **options: object) -> tuple[str, list[str], str]:
    """The id of a completion, its answers, and the version that answered."""
    raw = chat.chat.completions.with_raw_response.create(
        model=ALIAS,
        messages=[{"role": "user", "content": problem.question}],
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        **options,  # type: ignore[arg-type]
    )
    answer = raw.parse()
    texts = [choice.message.content or "" for choice in answer.choices]
    return answer.id, texts, raw.headers[VERSION]


def _accuracy(chat: openai.OpenAI, pool: ThreadPoolExecutor) -> float:
    held_out = problems("held_out", HELD_OUT)
    answers = list(pool.map(lambda problem: _ask(chat, problem, n=2)[1], held_out))
    rewards = [
        reward(text, problem.answer)
        for texts, problem in zip(answers, held_out, strict=True)
        for text in texts
    ]
    return sum(rewards) / len(rewards)


def test_an_alias_learns_from_feedback_and_goes_back(
    stack: StackInfo, client: river.Client
) -> None:
    """200 stored chats and their rewards raise the accuracy on held-out problems by 0.2; rollback undoes it at once."""
    client.aliases.set(ALIAS, TINY_MOE_NAME)
    rows = problems("train", CHATS, seed=11)
    with (
        client.session() as session,
        openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=client.api_key) as chat,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        before = _accuracy(chat, pool)
        model = session.create_model(TINY_MOE_NAME, lora=river.LoraConfig(rank=16))
        learning = model.learn_from(
            ALIAS, lr=2e-3, min_batch=PER_ROUND * SAMPLES, max_batch=PER_ROUND * SAMPLES
        )
        for start in range(0, CHATS, PER_ROUND):
            part = rows[start : start + PER_ROUND]
            answered = pool.map(lambda row: _ask(chat, row, store=True, n=SAMPLES), part)
            for row, (completion_id, texts, _) in zip(part, answered, strict=True):
                given = [
                    river.Feedback(
                        completion_id=completion_id, choice=choice, reward=reward(text, row.answer)
                    )
                    for choice, text in enumerate(texts)
                ]
                client.feedback_many(given)
            learning.wait(completions=(start + PER_ROUND) * SAMPLES, timeout=LEARNT_WITHIN_S)
        learnt = learning.stop()
        assert (learnt.status, learnt.steps) == ("stopped", CHATS // PER_ROUND)
        after = _accuracy(chat, pool)
        assert _ask(chat, rows[0])[2] == model.policy_version == f"{model.run_id}@{learnt.steps}"
        assert after >= before + 0.2, (before, after)
        assert client.aliases.rollback(ALIAS).target == TINY_MOE_NAME
        assert _ask(chat, rows[0])[2] == TINY_MOE_NAME


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_text_is_kept_as_the_engine_made_it(
    stack: StackInfo, client: river.Client, stream: bool
) -> None:
    """Tokens and log-probabilities of a stored text completion are those that the engine tells whoever asks."""
    shown: dict[int, list[float]] = {0: [], 1: []}
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=client.api_key) as chat:
        made = chat.completions.create(
            model=TINY_MOE_NAME,
            prompt="2 + 2 =",
            max_tokens=5,
            n=2,
            logprobs=1,
            stream=stream,
            extra_body={"store": True},
        )
        parts = [made] if isinstance(made, openai.types.Completion) else list(made)
        for part in parts:
            for choice in part.choices:
                told = choice.logprobs.token_logprobs if choice.logprobs else None
                shown[choice.index] += told or []
        hidden = chat.completions.create(
            model=TINY_MOE_NAME, prompt="2 + 2 =", max_tokens=5, extra_body={"store": True}
        )
        assert hidden.choices[0].logprobs is None
    given = [(parts[0].id, 0, 0.0), (parts[0].id, 1, 1.0), (hidden.id, 0, 0.5)]
    client.feedback_many(
        [
            river.Feedback(completion_id=completion_id, choice=choice, reward=reward)
            for completion_id, choice, reward in given
        ]
    )
    batch = client.feedback_batch(TINY_MOE_NAME, min_batch=3)
    assert batch is not None
    by_choice = {
        (one.completion_id, one.choice): datum
        for one, datum in zip(batch.feedback, batch.data, strict=True)
    }
    for choice in (0, 1):
        datum = by_choice[parts[0].id, choice]
        produced = len(shown[choice])
        assert produced
        assert list(datum.old_logprobs)[-1 - produced : -1] == shown[choice]  # type: ignore[arg-type]
    assert sum(1 for value in by_choice[hidden.id, 0].old_logprobs if value) > 0  # type: ignore[union-attr]
