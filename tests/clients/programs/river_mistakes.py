"""Wrong input of every kind; prints what the client raises for each as JSON: its exception and its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

from river_setup import BASE_MODEL, PROBLEMS, TOKENIZER, connect, new_model

import river_client as river

raised: dict[str, list[str]] = {}


def expect(name: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except river.RiverError as error:
        raised[name] = [type(error).__name__, str(error)]
    else:
        raised[name] = ["none", ""]


def open_session(client: river.Client) -> None:
    with client.session():
        pass


with closing(connect("rv-wrong")) as stranger:
    expect("key", lambda: open_session(stranger))
with closing(connect()) as client, client.session() as session:
    lora = river.LoraConfig(rank=8)
    prompt = PROBLEMS[0]["prompt"]
    expect("base", lambda: session.create_model("nobody/none", lora=lora, tokenizer=TOKENIZER))
    expect(
        "rank",
        lambda: session.create_model(
            BASE_MODEL, lora=river.LoraConfig(rank=4096), tokenizer=TOKENIZER
        ),
    )
    expect(
        "full weight",
        lambda: session.create_model(BASE_MODEL, full_weight=True, tokenizer=TOKENIZER),
    )
    model = new_model(session)
    for name, datum, options in (
        ("vocabulary", {"input_ids": [1, 99999]}, {}),
        ("nan", {"input_ids": [1, 2, 3], "weights": [1.0, float("nan"), 0.0]}, {}),
        ("length", {"input_ids": [1] * 100_000}, {}),
        ("shape", {"input_ids": [1, 2, 3], "weights": [1.0]}, {}),
        ("field", {"input_ids": [1, 2], "labels": [1, 2]}, {}),
        ("missing", {"input_ids": [1, 2]}, {"loss_fn": "cispo"}),
        ("loss", {"input_ids": [1, 2]}, {"loss_fn": "hinge"}),
        ("setting", {"input_ids": [1, 2]}, {"eps_max": 2.0}),
        ("temperature", {"input_ids": [1, 2]}, {"logprob_temperature": 0.0}),
        ("replay", {"input_ids": [1, 2]}, {"force_routing_replay": True}),
        (
            "image",
            {"model_input": [{"type": "image", "data": b"x", "expected_tokens": 2}]},
            {},
        ),
        ("policy", {"input_ids": [1, 2]}, {"expected_policy_id": f"{model.model_id}@9"}),
    ):
        expect(
            name, lambda datum=datum, options=options: model.forward_backward([datum], **options)
        )
    expect("empty", lambda: model.forward_backward([]))
    expect("nothing to apply", lambda: model.optim_step(lr=1e-3))
    expect("rate", lambda: model.optim_step(lr=-1.0))
    expect("name", lambda: model.save_weights("a b"))
    expect("publish", lambda: model.save_weights("x", mode="publish"))
    expect("path", lambda: model.load_weights(f"river://{model.model_id}/weights/none"))
    expect("max_tokens", lambda: model.sample(prompt, max_tokens=100_000))
    expect("top", lambda: model.sample(prompt, max_tokens=1, top_p=2.0))
    expect("images", lambda: model.sample(prompt, max_tokens=1, images=[b"x"]))
    expect("upload image", lambda: session.upload_image(b"x"))
    expect(
        "checkpoint",
        lambda: session.sample(
            prompt,
            base_model=BASE_MODEL,
            checkpoint="river://run_none/weights/x",
            tokenizer=TOKENIZER,
        ),
    )
    expect("chat", lambda: client.chat_complete([], base_model="nobody/none"))
    done, _ = model.train_step([{"input_ids": [1, 2, 3]}], lr=1e-3)
    raised["afterwards"] = ["fine" if done.metrics["num_tokens"] == 2 else "wrong", ""]
print(json.dumps(raised))
