"""Expert routing on its way out of an engine and back in with training data."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from support.gateway import Rig, error_of
from support.stand_ins import BASE

from river_client import wire
from river_gateway.errors import InvalidFieldError
from river_gateway.training import validation
from river_gateway.training.expert_routing import RoutedExperts, check_replayable
from river_gateway.training.validation import Limits
from river_trainer import protocol

MODEL = RoutedExperts(experts=8, layers=2, per_token=2)
LIMITS = Limits(context_length=8, vocab_size=512, routed_experts=MODEL)
ROUTING = np.array([[[0, 7], [1, 2]], [[3, 0], [6, 5]], [[0, 0], [0, 0]]], "u1")


def tensor(array: np.ndarray) -> wire.Tensor:
    dtype: Any = array.dtype.name
    return wire.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def changed(place: tuple[int, int, int], value: int, dtype: str = "u1") -> wire.Tensor:
    array = ROUTING.astype(dtype)
    array[place] = value
    return tensor(array)


def checked(limits: Limits = LIMITS, **fields: Any) -> protocol.Sequence:
    """The second datum as the trainer gets it; the first has no routing."""
    data = [wire.Datum(input_ids=[1, 2, 3]), wire.Datum(**{"input_ids": [1, 2, 3], **fields})]
    return validation.sequences(data, "cross_entropy", limits)[1]


@pytest.mark.parametrize(
    ("routing", "field", "words"),
    [
        (changed((1, 0, 1), 8), "expert_routing[1][0][1]", "8, the experts are 0 to 7"),
        (changed((0, 1, 0), -1, "i4"), "expert_routing[0][1][0]", "-1, the experts are 0 to 7"),
        (changed((0, 1, 0), 2), "expert_routing[0][1]", "[2, 2] names an expert twice"),
        (tensor(ROUTING[:1]), "expert_routing", "shape [1, 2, 2], must be [3 or 2 tokens, 2 MoE"),
        (tensor(ROUTING[:, :1]), "expert_routing", "shape [3, 1, 2], must be"),
        (tensor(ROUTING[:, :, :1]), "expert_routing", "shape [3, 2, 1], must be"),
        (tensor(ROUTING[:, 0]), "expert_routing", "shape [3, 2], must be"),
        (tensor(ROUTING.astype("f4")), "expert_routing", "float32, must be integers"),
        (wire.Tensor(dtype="uint8", shape=(3, 2, 2), data=b"1"), "expert_routing", "1 bytes, but"),
        (wire.Tensor(dtype="uint8", shape=(-3, 2, 2), data=b""), "expert_routing", "negative"),
        (wire.Tensor(dtype="uint8", shape=(), data=b"1"), "expert_routing", "shape [], must be"),
    ],
)
def test_wrong_routing(routing: wire.Tensor, field: str, words: str) -> None:
    """The error names the datum, the position, the layer and the limit."""
    with pytest.raises(InvalidFieldError) as refused:
        checked(expert_routing=routing)
    assert refused.value.param == f"data[1].{field}"
    assert refused.value.message.startswith(f"data[1].{field}: ")
    assert words in refused.value.message


def test_a_dense_model_has_no_routing() -> None:
    """Routing for a model without routed experts is a mistake, not something to ignore."""
    with pytest.raises(InvalidFieldError, match="has no routed experts to replay"):
        checked(Limits(context_length=8, vocab_size=512), expert_routing=tensor(ROUTING))


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "i8"])
@pytest.mark.parametrize("rows", [2, 3])
def test_right_routing(dtype: str, rows: int) -> None:
    """All integer types give the same bytes, and the row of the last token may be missing or any filler."""
    given = ROUTING.astype(dtype)
    given[-1] = 99
    sequence = checked(expert_routing=tensor(given[:rows]))
    assert sequence.expert_routing == ROUTING.tobytes()
    assert checked().expert_routing is None


def test_padding_is_cut_off_routing() -> None:
    """The rows of masked tokens go with them, and the last one kept becomes the ignored one."""
    sequence = checked(attention_mask=[1, 1, 0], expert_routing=tensor(ROUTING))
    assert sequence.expert_routing == ROUTING[:1].tobytes() + bytes(4)


def test_more_than_256_experts_take_two_bytes() -> None:
    """What goes to the trainer is as wide as the model's experts need."""
    model = RoutedExperts(experts=257, layers=2, per_token=2)
    limits = Limits(context_length=8, vocab_size=512, routed_experts=model)
    sequence = checked(limits, expert_routing=changed((0, 0, 1), 256, "u2"))
    assert np.frombuffer(sequence.expert_routing or b"", "<u2").max() == 256


def test_replay_needs_routing_everywhere() -> None:
    """The first sequence without is named."""
    data = [wire.Datum(input_ids=[1], expert_routing=tensor(ROUTING)), wire.Datum(input_ids=[1])]
    check_replayable(data[:1])
    with pytest.raises(InvalidFieldError, match="force_routing_replay") as refused:
        check_replayable(data)
    assert refused.value.param == "data[1].expert_routing"


@pytest.mark.parametrize("kind", [wire.Forward, wire.ForwardBackward, wire.TrainStep])
async def test_routing_reaches_the_trainer(rig: Rig, kind: type[wire.Operation]) -> None:
    """Routing and the wish to replay it are in the task; without routing the wish is refused."""
    await rig.register_trainer(rig.trainer.record(num_experts=8, moe_layers=2, experts_per_token=2))
    run = await rig.tenant.new_run()
    adam: Any = {"adam": wire.AdamParams(lr=1e-3)} if kind is wire.TrainStep else {}
    data = [wire.Datum(input_ids=[1, 2, 3], expert_routing=tensor(ROUTING))]
    operation: Any = kind(data=data, force_routing_replay=True, **adam)  # pyright: ignore[reportCallIssue]
    assert (await rig.tenant.submit(run.run_id, 1, operation)).status_code == 202
    await rig.tenant.result(f"{run.run_id}-1")
    task: Any = rig.trainer.messages[-1].task
    assert task.force_routing_replay
    assert task.data[0].expert_routing == ROUTING.tobytes()
    bare = msgspec.structs.replace(operation, data=[wire.Datum(input_ids=[1, 2, 3])])
    answer = await rig.tenant.submit(run.run_id, 2, bare)
    assert answer.status_code == 422
    assert error_of(answer).param == "data[0].expert_routing"


async def test_routing_of_samples(rig: Rig) -> None:
    """It is asked of an engine that records it and answered as a tensor; other engines are not asked."""
    asked = wire.SampleRequest(
        model=BASE, prompt_token_ids=[[1]], max_tokens=4, return_expert_routing=True
    )
    answer = await rig.tenant.post("/sample", asked)
    assert answer.status_code == 501
    assert error_of(answer).param == "return_expert_routing"
    assert not any(engine.samples for engine in rig.engines)
    for engine in rig.engines:
        await rig.register(engine.record(expert_routing=True))
    answer = await rig.tenant.post("/sample", asked)
    assert answer.status_code == 200
    response = msgspec.json.decode(answer.content, type=wire.SampleResponse)
    assert response.groups[0].samples[0].expert_routing == tensor(ROUTING)
