"""The packed model with adapters against plain transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.training import VOCAB_SIZE, random_sequences, shape
from transformers import AutoModelForCausalLM

from river_trainer.adapter import Adapter, layout_of, new_adapter
from river_trainer.base_model import BaseModel
from river_trainer.errors import InvalidTaskError
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.losses import LOSSES
from river_trainer.packing import TrainingSequence, decode_sequence
from river_trainer.passes import JobOutput, Passes
from river_trainer.peft_files import CONFIG_FILE, WEIGHTS_FILE, export_adapter, import_adapter
from river_trainer.protocol import AdapterShape, ExpertLayout
from river_trainer.strands import Job

LENGTHS = [7, 33, 2, 18]
RANK = 6
RunJobs = Callable[..., list[JobOutput]]


def learned_adapter(base: BaseModel, adapter_shape: AdapterShape) -> Adapter:
    """An adapter whose B is not zero, as after some steps."""
    adapter = new_adapter(base.sites, adapter_shape)
    generator = torch.Generator().manual_seed(adapter_shape.seed + 100)
    for name, tensor in adapter.tensors.items():
        if name.endswith("lora_B"):
            tensor.normal_(0, 0.02, generator=generator)
    return adapter


def sequences(seed: int, lengths: list[int]) -> list[TrainingSequence]:
    return [
        decode_sequence(sequence, index=index, vocab_size=VOCAB_SIZE, context_length=256)
        for index, sequence in enumerate(random_sequences(seed, lengths))
    ]


@pytest.fixture
def run_jobs(base: BaseModel, lanes: Lanes) -> RunJobs:
    """Runs jobs, in passes of a chosen size."""

    def run(jobs: Sequence[Job], piece_tokens: int = 1000) -> list[JobOutput]:
        passes = Passes(
            base,
            lanes,
            GradientPool(),
            tokens_max=max(piece_tokens, 400),
            piece_tokens=piece_tokens,
        )
        return passes.run(jobs)

    return run


def write(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    for name, data in export_adapter(adapter, base_model="tiny").items():
        (folder / name).write_bytes(data)
    return folder


def plain_logprobs(model: torch.nn.Module, sequence: TrainingSequence) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=sequence.input_ids[None]).logits[0]
    chosen = logits.log_softmax(-1).gather(1, sequence.targets[:, None])[:, 0]
    chosen[-1] = 0.0
    return chosen


LAYOUTS: tuple[ExpertLayout, ...] = ("shared_outer", "per_expert")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unembed", [True, False], ids=["with lm_head", "without"])
def test_packed_logprobs_equal_peft(
    base: BaseModel,
    run_jobs: RunJobs,
    tiny_moe: Path,
    tmp_path: Path,
    layout: ExpertLayout,
    *,
    unembed: bool,
) -> None:
    """Exported files load in PEFT, and its log-probabilities are those of the packed pass to 1e-5."""
    adapter = learned_adapter(base, shape(rank=5, unembed=unembed, expert_layout=layout))
    data = sequences(3, LENGTHS)
    job = Job(adapter, data, LOSSES["cross_entropy"], backward=False)
    (output,) = run_jobs([job])

    plain = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    without = plain_logprobs(plain, data[1])
    model = PeftModel.from_pretrained(plain, write(adapter, tmp_path / "adapter")).eval()
    for sequence, logprobs in zip(data, output.logprobs, strict=True):
        torch.testing.assert_close(logprobs, plain_logprobs(model, sequence), atol=1e-5, rtol=0)
    assert (output.logprobs[1] - without).abs().max() > 1e-2, "the adapter has to matter"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapter_files_round_trip(base: BaseModel, layout: ExpertLayout) -> None:
    """Importing what was exported gives the same shape and the same bits."""
    adapter = learned_adapter(base, shape(rank=3, seed=9, expert_layout=layout))
    files = export_adapter(adapter, base_model="tiny")
    stored, tensors = import_adapter(files, base.sites, seed=9)
    assert stored == adapter.shape
    assert tensors.keys() == adapter.tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, adapter.tensors[name]), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files.pop(CONFIG_FILE), "no file"),
        (lambda files: files.update({"adapter_model.safetensors": b"x"}), "cannot be read"),
        (lambda files: files.update({CONFIG_FILE: b'{"r": 4, "lora_alpha": 8}'}), "has the shape"),
        (
            lambda files: files.update(
                {CONFIG_FILE: b'{"r": 3, "lora_alpha": 8, "use_dora": true}'}
            ),
            "not a plain LoRA",
        ),
    ],
    ids=["no config", "broken file", "other rank", "dora"],
)
def test_wrong_adapter_files_are_refused(
    base: BaseModel, damage: Callable[[dict[str, bytes]], object], message: str
) -> None:
    """Files that are no adapter of this base model say what is wrong with them."""
    files = export_adapter(new_adapter(base.sites, shape(rank=3)), base_model="tiny")
    damage(files)
    with pytest.raises(InvalidTaskError, match=message):
        import_adapter(files, base.sites, seed=0)


def test_a_shared_factor_with_different_copies_is_refused(base: BaseModel) -> None:
    """A file that says its experts share a factor, and has different ones, is broken."""
    adapter = new_adapter(base.sites, shape(rank=3, expert_layout="per_expert"))
    files = export_adapter(adapter, base_model="tiny")
    end = 8 + int.from_bytes(files[WEIGHTS_FILE][:8], "little")
    header = files[WEIGHTS_FILE][8:end].replace(b'"per_expert"', b'"shared_outer"')
    lying = len(header).to_bytes(8, "little") + header + files[WEIGHTS_FILE][end:]
    with pytest.raises(InvalidTaskError, match="differs from expert to expert"):
        import_adapter(files | {WEIGHTS_FILE: lying}, base.sites, seed=0)


def test_shared_factors_make_an_adapter_smaller(base: BaseModel) -> None:
    """Of the experts' factors those of the model's width are stored once, not once for each expert."""
    sizes = {
        layout: layout_of(base.sites, shape(rank=RANK, expert_layout=layout)).size
        for layout in LAYOUTS
    }
    saved = sum(
        RANK * (site.experts - 1) * (site.inputs if site.outer == "a" else site.outputs)
        for site in base.sites
        if site.experts is not None
    )
    assert sizes["per_expert"] - sizes["shared_outer"] == saved


def test_the_seed_decides_about_a_new_adapter(base: BaseModel) -> None:
    """The same seed gives the same A, another one another; B is zero."""
    one, same, other = (new_adapter(base.sites, shape(seed=seed)) for seed in (4, 4, 5))
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, same.tensors[name])
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other.tensors[name])


def test_a_job_gets_the_same_bits_alone_and_in_company(base: BaseModel, run_jobs: RunJobs) -> None:
    """Log-probabilities, sums and gradients of every job are bit for bit those of the job alone, and of a second time.

    Ranks, targets, layouts, losses and lengths differ; some jobs are cut into pieces, and pieces share passes.
    """
    kinds: list[tuple[int, ExpertLayout, list[int], str]] = [
        (4, "shared_outer", LENGTHS, "cross_entropy"),
        (16, "per_expert", [40, 3], "importance_sampling"),
        (1, "shared_outer", [2], "cross_entropy"),
        (8, "shared_outer", [64] * 9, "cross_entropy"),
        (3, "per_expert", [200, 100, 1, 90, 31], "importance_sampling"),
    ]
    jobs = [
        Job(
            learned_adapter(
                base, shape(rank=rank, seed=rank, unembed=rank != 8, expert_layout=layout)
            ),
            sequences(rank, lengths),
            LOSSES[loss],
            backward=True,
        )
        for rank, layout, lengths, loss in kinds
    ]
    for piece_tokens in (100, 256):
        mixed = run_jobs(jobs, piece_tokens)
        again = run_jobs(list(reversed(jobs)), piece_tokens)
        for job, output, second in zip(jobs, mixed, reversed(again), strict=True):
            (alone,) = run_jobs([job], piece_tokens)
            for other in (alone, second):
                assert output.sums == other.sums
                for one, two in zip(output.logprobs, other.logprobs, strict=True):
                    assert torch.equal(one, two)
                assert output.gradient is not None
                assert other.gradient is not None
                assert torch.equal(output.gradient.flat, other.gradient.flat)


def test_gradients_of_small_passes_add_up(base: BaseModel, run_jobs: RunJobs) -> None:
    """A job cut into many pieces has the gradients and metrics of one."""
    adapter = learned_adapter(base, shape())
    job = Job(adapter, sequences(8, LENGTHS), LOSSES["cross_entropy"], backward=True)
    (whole,) = run_jobs([job])
    (split,) = run_jobs([job], 20)
    assert whole.metrics(job.loss) == pytest.approx(split.metrics(job.loss), rel=1e-5)
    assert whole.gradient is not None
    assert split.gradient is not None
    torch.testing.assert_close(whole.gradient.flat, split.gradient.flat, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_peft(
    base: BaseModel, run_jobs: RunJobs, tiny_moe: Path, tmp_path: Path, layout: ExpertLayout
) -> None:
    """Autograd through transformers and PEFT gives the gradients of our own functions.

    PEFT has a copy of a shared factor for every expert: the sum of their gradients is that of the one.
    """
    adapter = learned_adapter(base, shape(rank=4, expert_layout=layout))
    data = sequences(3, [24])
    job = Job(adapter, data, LOSSES["cross_entropy"], backward=True)
    (output,) = run_jobs([job])

    plain = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    folder = write(adapter, tmp_path / "adapter")
    model = PeftModel.from_pretrained(plain, folder, is_trainable=True)
    logits = model(input_ids=data[0].input_ids[None]).logits[0]
    chosen = logits.log_softmax(-1).gather(1, data[0].targets[:, None])[:, 0]
    (-(data[0].weights * chosen).sum()).backward()
    named = dict(model.named_parameters())
    for site in adapter.layout.sites:
        for key in ("lora_A", "lora_B"):
            theirs = named[f"{site.peft_prefix}.{key}.default.weight"].grad
            assert theirs is not None
            assert output.gradient is not None
            ours = output.gradient.tensors[f"{site.name}.{key}"]
            if site.experts is not None:
                theirs = (
                    theirs.unflatten(0, (site.experts, -1))
                    if key == "lora_A"
                    else theirs.unflatten(1, (-1, site.experts)).permute(2, 0, 1)
                )
                if ours.shape[0] == 1:
                    theirs = theirs.sum(0, keepdim=True)
            torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=2e-3)
