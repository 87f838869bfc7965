"""Sampling, chat, checkpoints, errors, settings."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import typing
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.stub_gateway import CHECKPOINT_PATH, FILES, KEY, RUN_ID, Fault, StubGateway

import river_client as river
from river_client import exceptions, limits, wire
from river_client.arrays import pack, pack_data, unpack
from river_client.cli import river as command
from river_client.samples_wire import LoggedCompletion, LoggedGroup, LogSamples, SamplesLogged
from river_client.settings import Login, login_path, save_login


def test_samples_say_what_they_are(model: river.Model, gateway: StubGateway) -> None:
    """A list of samples per prompt, each with its tokens and the version that made it."""
    groups = model.sample(prompts=["a", "b"], num_samples=3, stop="<end>", max_tokens=5)
    assert [len(group) for group in groups] == [3, 3]
    sample = groups[0][0]
    assert (sample.text, sample.tokens, sample.logprobs) == ("x", [7], [-0.5])
    assert sample.prompt_token_ids == [1, 2]
    assert sample.policy_version == f"{RUN_ID}@3"
    assert gateway.sampled[0] == wire.SampleRequest(
        model=f"river://{RUN_ID}", prompts=["a", "b"], num_samples=3, stop=["<end>"], max_tokens=5
    )


def test_prompts_may_be_arrays_of_tokens(client: river.Client, gateway: StubGateway) -> None:
    """Token ids come as lists, numpy arrays or torch tensors."""
    prompts = [[1, 2], np.array([3, 4]), torch.tensor([5, 6])]
    client.sample(prompt_token_ids=prompts, base_model="base")
    assert gateway.sampled[0].prompt_token_ids == [[1, 2], [3, 4], [5, 6]]


def test_chat_and_its_stream(client: river.Client) -> None:
    """A text or messages in, a text or its pieces out."""
    reply = client.chat("hello", model="m")
    assert (reply.text, reply.finish_reason, reply.prompt_tokens) == ("to 1", "stop", 3)
    assert reply.policy_version == f"{RUN_ID}@4"
    assert client.chat([{"role": "user", "content": "x"}] * 2, model="m").text == "to 2"
    assert list(client.chat_stream("hello", model="m")) == ["a", "b", "c"]


def test_metrics_are_kept_with_the_run(model: river.Model, gateway: StubGateway) -> None:
    """Any number is a metric."""
    model.log({"reward": np.float32(0.5), "count": 3}, step=2)
    assert gateway.logged == [wire.LogMetrics(metrics={"reward": 0.5, "count": 3.0}, step=2)]


def test_samples_are_kept_with_the_run(model: river.Model, gateway: StubGateway) -> None:
    """What was sampled is logged at the step of the version that drew it, mere text at the model's, or as one says."""
    groups = model.sample(prompts=["a", "b"], num_samples=2)
    rewards = [[np.float32(0.5), 1], [0, -1.0]]
    logged = model.log_samples(["a", "b"], groups, rewards)
    assert logged == SamplesLogged(kept=2)
    model.log_samples(["a"], [["x", "y"]])
    model.log_samples(["a"], [["x"]], step=9)
    first, text, later = gateway.logged_samples
    assert first.step == 3
    assert [one.reward for one in first.groups[0].completions] == [0.5, 1.0]
    assert [one.text for one in first.groups[1].completions] == [one.text for one in groups[1]]
    assert text == LogSamples(
        groups=[
            LoggedGroup(prompt="a", completions=[LoggedCompletion(text=text) for text in "xy"])
        ],
        step=0,
    )
    assert later.step == 9


@pytest.mark.parametrize(
    ("samples", "rewards", "param"),
    [
        ([["x"]], None, "samples"),
        ([["x"], ["y"]], [[1.0]], "rewards"),
        ([["x"], ["y"]], [[1.0], [1.0, 2.0]], "rewards[1]"),
    ],
)
def test_samples_that_do_not_match_are_refused(
    model: river.Model,
    gateway: StubGateway,
    samples: list[list[str]],
    rewards: list[list[float]] | None,
    param: str,
) -> None:
    """As many groups as prompts and as many rewards as completions, or nothing is logged."""
    with pytest.raises(river.InvalidRequestError) as refused:
        model.log_samples(["a", "b"], samples, rewards)
    assert refused.value.param == param
    assert gateway.logged_samples == []


# ---- Checkpoints -------------------------------------------------------------------------------------------------


def test_how_long_a_checkpoint_is_kept(client: river.Client, gateway: StubGateway) -> None:
    """A time in seconds or as a span is from now on, None is for ever; the command says the same."""
    for ttl in (60.4, timedelta(days=2), None):
        client.checkpoints.set_ttl(CHECKPOINT_PATH, ttl)
    environment = {"RIVER_API_KEY": KEY, "RIVER_BASE_URL": gateway.base_url}
    for typed, said in (("30d", "until 2030-01-02"), ("forever", "for ever"), ("soon", "no time")):
        shown = CliRunner().invoke(
            command, ["checkpoints", "ttl", CHECKPOINT_PATH, typed], env=environment
        )
        assert said in shown.output, shown.output
    assert gateway.ttls == [60, 2 * 86_400, None, 30 * 86_400, None]


def test_a_download_is_resumed(client: river.Client, gateway: StubGateway, tmp_path: Path) -> None:
    """A download that breaks off goes on where it was, and leaves nothing but the files."""
    gateway.cut_file_after_bytes = 700_000
    assert client.checkpoints.download(CHECKPOINT_PATH, tmp_path / "all") == tmp_path / "all"
    found = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    assert found == gateway.files
    name = "adapter_model.safetensors"
    assert len([asked for asked in gateway.ranges if asked.startswith(name)]) == 2
    assert f"{name} 0" in gateway.ranges


def test_an_interrupted_download_is_taken_up_later(
    client: river.Client, gateway: StubGateway, tmp_path: Path
) -> None:
    """What an earlier process got is not fetched again."""
    name = "adapter_model.safetensors"
    (tmp_path / f".{name}.ckpt_1.part").write_bytes(FILES[name][:1000])
    client.checkpoints.export(CHECKPOINT_PATH, tmp_path)
    assert f"{name} 1000" in gateway.ranges
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    card = found.pop("README.md").decode()
    assert found == FILES
    assert card.startswith('---\nbase_model: "base"\nlibrary_name: peft\n')


def test_a_download_is_checked(client: river.Client, gateway: StubGateway, tmp_path: Path) -> None:
    """A file that is not what was stored is fetched anew once, then refused; so is what an earlier process left."""
    gateway.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(1000)}
    gateway.garbled_downloads = 1
    client.checkpoints.download(CHECKPOINT_PATH, tmp_path)
    (tmp_path / ".adapter_model.safetensors.ckpt_1.part").write_bytes(b"not what was stored")
    client.checkpoints.download(CHECKPOINT_PATH, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == gateway.files
    gateway.garbled_downloads = 2
    with pytest.raises(river.ServerError, match=r"adapter_config.json: what came is not"):
        client.checkpoints.download(CHECKPOINT_PATH, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_download_goes_on_as_long_as_something_comes(
    client: river.Client, gateway: StubGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad line with many breaks is enough; one that brings nothing is given up."""
    monkeypatch.setattr(limits, "DOWNLOAD_ATTEMPTS_MAX", 3)
    gateway.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(1000)}
    fault = Fault("GET /checkpoints/file", times=2)
    gateway.faults.append(fault)
    client.checkpoints.download(CHECKPOINT_PATH, tmp_path)
    fault.times = 3
    with pytest.raises(river.ConnectionError):
        client.checkpoints.download(CHECKPOINT_PATH, tmp_path)


def test_an_adapter_is_uploaded(client: river.Client, gateway: StubGateway, tmp_path: Path) -> None:
    """Both files go as one form, whole again after a failed attempt; a directory and a mapping mean the same."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    gateway.faults.append(Fault("POST /checkpoints/import", status=503))
    made = client.checkpoints.import_adapter(tmp_path, base_model="base", name="theirs", ttl=60)
    assert made.path == CHECKPOINT_PATH
    client.checkpoints.import_adapter({name: tmp_path / name for name in FILES}, base_model="base")
    first, second = gateway.uploads
    assert first[0] == {"base_model": "base", "name": "theirs", "ttl_s": "60"}
    assert second[0] == {"base_model": "base", "name": "imported"}
    for _, body in (first, second):
        for content in FILES.values():
            assert content in body
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(river.InvalidRequestError) as refusal:
        client.checkpoints.import_adapter(tmp_path, base_model="base")
    assert refusal.value.param == "adapter_model.safetensors"


def test_a_file_name_cannot_lead_out_of_the_directory(
    client: river.Client, gateway: StubGateway, tmp_path: Path
) -> None:
    """A server cannot make the client write elsewhere."""
    gateway.files = {"../evil": b"x"}
    with pytest.raises(river.ServerError, match="evil"):
        client.checkpoints.download(CHECKPOINT_PATH, tmp_path / "in")
    assert not (tmp_path / "evil").exists()


def test_a_download_shows_a_bar_on_a_terminal(
    client: river.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A progress bar on a terminal, nothing elsewhere."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for kind, is_shown in ((Terminal, True), (io.StringIO, False)):
        stderr = kind()
        monkeypatch.setattr(sys, "stderr", stderr)
        client.checkpoints.download(CHECKPOINT_PATH, tmp_path)
        assert ("final" in stderr.getvalue()) == is_shown


# ---- Data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "back"),
    [
        ([1, 2], "int32", [1, 2]),
        ([1, 2**40], "int64", [1, 2**40]),
        ([0.5, float("nan")], "float32", [0.5, float("nan")]),
        (np.array([[1.0], [2.0]]), "float32", [[1.0], [2.0]]),
        (np.array([True, False]), "int32", [1, 0]),
        (np.arange(6)[::2], "int32", [0, 2, 4]),
        (np.array([[[3, 255]]], np.uint8), "uint8", [[[3, 255]]]),
        (np.array([256], ">u2"), "uint16", [256]),
        (torch.tensor([1, 2]), "int32", [1, 2]),
        (torch.tensor([0.5], dtype=torch.bfloat16), "float32", [0.5]),
        (torch.tensor([0.5], requires_grad=True), "float32", [0.5]),
        ([1e300], "float32", [float("inf")]),
    ],
    ids=repr,
)
def test_numbers_are_packed_without_loss(value: Any, dtype: str, back: list[Any]) -> None:
    """Lists, arrays and tensors become the narrowest type of the wire that holds them."""
    tensor = pack(value, "data[0].weights")
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(unpack(tensor), np.array(back))


@pytest.mark.parametrize(
    ("datum", "param"),
    [
        ({"input_ids": [1, "two"]}, "data[1].input_ids"),
        ({"input_ids": [[1], [1, 2]]}, "data[1].input_ids"),
        ({"input_ids": [1, None]}, "data[1].input_ids"),
        ({"input_ids": [1], "labels": [1]}, "data[1].labels"),
        ({"weights": [1]}, "data[1].input_ids"),
    ],
    ids=repr,
)
def test_what_is_no_data_is_named(datum: dict[str, Any], param: str) -> None:
    """What the wire cannot carry is refused by name before it is sent."""
    with pytest.raises(river.InvalidRequestError) as refused:
        pack_data([{"input_ids": [1]}, datum])
    assert refused.value.param == param


# ---- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, river.InvalidRequestError),
        (401, river.AuthenticationError),
        (402, river.OutOfCreditError),
        (403, river.PermissionDeniedError),
        (404, river.NotFoundError),
        (409, river.InvalidRequestError),
        (413, river.InvalidRequestError),
        (422, river.InvalidRequestError),
        (429, river.RateLimitError),
        (500, river.ServerError),
        (503, river.ServerError),
        (507, river.ServerError),
    ],
)
def test_each_status_has_its_exception(
    gateway: StubGateway, status: int, kind: type[river.RiverError]
) -> None:
    """Errors carry what the server said."""
    gateway.faults = [Fault("GET /runs", status=status, headers={"retry_after": "7"})]
    with (
        river.Client(api_key=KEY, base_url=gateway.base_url, retry_for_s=0.0) as client,
        pytest.raises(river.RiverError) as raised,
    ):
        client.runs.list()
    assert type(raised.value) is kind
    assert (raised.value.status, raised.value.type) == (status, "refused")
    assert raised.value.retry_after == 7.0
    assert gateway.requests["GET /runs"] == 1


def test_an_unreachable_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not there is a connection error that names it."""
    with (
        river.Client(api_key=KEY, base_url="http://127.0.0.1:9", retry_for_s=0.2) as client,
        pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9") as raised,
    ):
        client.models()
    assert isinstance(raised.value, river.ConnectionError)


def test_errors_cross_processes() -> None:
    """Every exception survives pickling with all it carries."""
    kinds = [kind for kind in vars(exceptions).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, river.RiverError)]
    assert len(kinds) == 11
    for kind in kinds:
        error = kind("message")
        error.param, error.request_id = "data[0].x[1]", "req_1"
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert vars(copy) == vars(error)
        assert str(copy) == "message"


# ---- Settings and names ------------------------------------------------------------------------------------------


def test_settings_come_from_arguments_variables_and_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments win over variables, variables over the stored login, whose key goes to its own server alone."""
    with pytest.raises(river.AuthenticationError, match="RIVER_API_KEY"):
        river.Client()
    path = save_login(Login(api_key="rv-stored", base_url="http://stored"))
    assert path == login_path()
    assert path.stat().st_mode & 0o777 == 0o600

    def seen(api_key: str | None = None, base_url: str | None = None) -> tuple[str, str]:
        client = river.AsyncClient(api_key, base_url)
        return client.api_key, client.base_url

    assert seen() == ("rv-stored", "http://stored")
    with pytest.raises(river.AuthenticationError):
        seen(base_url="http://other")
    monkeypatch.setenv("RIVER_BASE_URL", "http://variable/")
    monkeypatch.setenv("RIVER_API_KEY", "rv-variable")
    assert seen() == ("rv-variable", "http://variable")
    assert seen(api_key="rv-a", base_url="http://a") == ("rv-a", "http://a")


def test_public_names_are_those_exported() -> None:
    """`__all__` is sorted, complete and true; the blocking twin has every method of the asynchronous one."""
    assert sorted(river.__all__, key=str) == river.__all__
    for name in river.__all__:
        assert getattr(river, name).__module__.startswith("river_client")
    for asynchronous, blocking in (
        (river.AsyncClient, river.Client),
        (river.AsyncModel, river.Model),
        (river.AsyncSession, river.Session),
        (river.AsyncPendingOp, river.PendingOp),
    ):
        own = {name for name in vars(asynchronous) if not name.startswith("_")}
        assert own <= set(dir(blocking)) | {"path"}


def test_importing_the_sdk_is_cheap() -> None:
    """Importing loads no other package of weight; what it took is printed."""
    program = (
        "import sys, time; start = time.perf_counter(); import river_client; "
        "print(round((time.perf_counter() - start) * 1000)); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    milliseconds, modules = done.stdout.splitlines()
    print(f"import river_client: {milliseconds} ms")  # noqa: T201 - for whoever reads the log
    heavy = {"torch", "vllm", "transformers", "litestar", "httpx", "numpy", "click", "tqdm"}
    assert heavy.isdisjoint(modules.split())


def test_signatures_survive_blocking() -> None:
    """The blocking methods are documented as their twins are."""
    assert river.Model.forward_backward.__doc__ == river.AsyncModel.forward_backward.__doc__
    assert typing.get_overloads(river.Model.sample) == []


# ---- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_command(gateway: StubGateway, monkeypatch: pytest.MonkeyPatch) -> typing.Callable[..., str]:
    """Runs `river` against the stub gateway and returns what it printed."""
    monkeypatch.setenv("RIVER_API_KEY", KEY)
    monkeypatch.setenv("RIVER_BASE_URL", gateway.base_url)

    def run(*arguments: str, text: str | None = None) -> str:
        done = CliRunner().invoke(command, arguments, input=text, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


def test_usage_is_a_table_and_json(run_command: typing.Callable[..., str]) -> None:
    """Tokens and dollars per tenant, model and kind, with a total."""
    lines = run_command("usage").splitlines()
    assert lines[0].split() == ["TENANT", "MODEL", "KIND", "QUANTITY", "USD"]
    assert lines[1].split() == ["ten_a", "base", "prompt", "1,234", "0.00001234"]
    assert lines[3].split() == ["total", "0.00001239"]
    printed = msgspec.json.decode(run_command("usage", "--json"), type=list[wire.UsageLine])
    assert [line.quantity for line in printed] == [1234, 5]


def test_the_verbs_of_a_user(
    run_command: typing.Callable[..., str], gateway: StubGateway, tmp_path: Path
) -> None:
    """Runs, checkpoints and chat from the command line."""
    assert RUN_ID in run_command("runs", "list")
    assert CHECKPOINT_PATH in run_command("checkpoints", "list")
    run_command("checkpoints", "download", CHECKPOINT_PATH, str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_config.json").exists()
    run_command("checkpoints", "export", CHECKPOINT_PATH, str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "README.md").exists()
    imported = run_command("checkpoints", "import", str(tmp_path / "out"), "--base-model", "base")
    assert imported == f"{CHECKPOINT_PATH}\n"
    assert "prod" in run_command("checkpoints", "promote", CHECKPOINT_PATH, "prod")
    assert run_command("aliases", "set", "prod", "base") == "prod is now base.\n"
    split = run_command("aliases", "split", "prod", f"{CHECKPOINT_PATH}=95", "base=5")
    assert split == f"prod is now {CHECKPOINT_PATH}=95, base=5.\n"
    assert "prod is now base" in run_command("aliases", "rollback", "prod")
    assert "=95" in run_command("aliases", "history", "prod")
    assert run_command("chat", "-m", "base", "hello") == "abc\n"
    assert run_command("chat", "-m", "base", text="one\ntwo\n").count("abc") == 2
    run_command("login", "--base-url", gateway.base_url, "--api-key", KEY)
    assert KEY in login_path().read_text()


def test_an_error_is_one_line(gateway: StubGateway) -> None:
    """The command says what went wrong without a traceback, and fails."""
    environment = {
        "RIVER_API_KEY": "rv-bad",
        "RIVER_BASE_URL": gateway.base_url,
        "PATH": "/usr/bin:/bin",
        "RIVER_DATA_DIR": "/nonexistent",
    }
    done = subprocess.run(
        [sys.executable, "-m", "river_client.cli", "runs", "list"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("river: ")
    assert "Traceback" not in done.stderr
