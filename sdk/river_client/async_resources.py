"""What a tenant has: runs and checkpoints; and what an admin looks after: tenants and keys."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import msgspec

from river_client import exceptions, feedback_wire, limits, wire
from river_client.progress import Bar, downloading, waiting
from river_client.samples_wire import SamplesPage
from river_client.transport import Transport

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT and vLLM load; a checkpoint may hold an optimizer besides.
EXPORTED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
MODEL_CARD_FILE = "README.md"


class AsyncRuns:
    """`client.runs`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(self) -> list[wire.Run]:
        """Your runs, newest first."""
        page = await self._transport.call("GET", "/runs", wire.Page)
        return page.runs or []

    async def get(self, run_id: str) -> wire.Run:
        """One run, as far as it has come."""
        return await self._transport.call("GET", f"/runs/{quote(run_id, safe='')}", wire.Run)

    async def samples(
        self,
        run_id: str,
        *,
        step: int | None = None,
        reward_min: float | None = None,
        reward_max: float | None = None,
        before: int | None = None,
        limit: int | None = None,
    ) -> SamplesPage:
        """What `model.log_samples` has kept, newest first: of one step, or with a reward between two bounds.

        The answer's `before` leads to the next page.
        """
        asked = {
            "step": step,
            "reward_min": reward_min,
            "reward_max": reward_max,
            "before": before,
            "limit": limit,
        }
        params = {name: str(value) for name, value in asked.items() if value is not None}
        path = f"/runs/{quote(run_id, safe='')}/samples"
        return await self._transport.call("GET", path, SamplesPage, params=params)


class AsyncCheckpoints:
    """`client.checkpoints`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(self) -> list[wire.Checkpoint]:
        """Your checkpoints, newest first."""
        page = await self._transport.call("GET", "/checkpoints", wire.Page)
        return page.checkpoints or []

    async def get(self, path: str) -> wire.Checkpoint:
        """The checkpoint of a path."""
        page = await self._transport.call("GET", "/checkpoints", wire.Page, params={"path": path})
        if not page.checkpoints:
            raise exceptions.NotFoundError(f"there is no checkpoint {path}", param="path")
        return page.checkpoints[0]

    async def files(self, path: str) -> Sequence[wire.CheckpointFile]:
        """The files of a checkpoint."""
        page = await self._transport.call(
            "GET", "/checkpoints/files", wire.Page, params={"path": path}
        )
        return page.files or []

    async def delete(self, path: str) -> None:
        """Deletes a checkpoint and its files."""
        await self._transport.tell("DELETE", "/checkpoints", params={"path": path})

    async def publish(self, path: str) -> None:
        """Lets every tenant load a checkpoint and sample from it, by its path."""
        await self._transport.tell("POST", "/checkpoints/public", params={"path": path})

    async def unpublish(self, path: str) -> None:
        """Lets nobody else use a checkpoint from now on; copies of it stay."""
        await self._transport.tell("DELETE", "/checkpoints/public", params={"path": path})

    async def copy(self, path: str, *, ttl: float | timedelta | None = None) -> wire.Checkpoint:
        """A copy of your own checkpoint, or of one that is shown to all, whose storage you pay.

        It goes to a run of its own, which cannot be trained on. `ttl` (seconds) is how long to keep it.
        """
        body = wire.CopyCheckpoint(path=path, ttl_s=None if ttl is None else ttl_seconds(ttl))
        return await self._transport.call("POST", "/checkpoints/copy", wire.Checkpoint, body=body)

    async def signed_urls(self, path: str) -> wire.SignedUrls:
        """A URL for each file of a checkpoint, which opens it for an hour without a key."""
        return await self._transport.call(
            "GET", "/checkpoints/urls", wire.SignedUrls, params={"path": path}
        )

    async def set_ttl(self, path: str, ttl: float | timedelta | None) -> wire.Checkpoint:
        """Keeps a checkpoint for `ttl` (seconds) from now on; None is for ever.

        Raises:
            NotFoundError: there is no such checkpoint, or its time is up.
        """
        body = wire.ChangeTtl(ttl_s=None if ttl is None else ttl_seconds(ttl))
        params = {"path": path}
        return await self._transport.call(
            "PATCH", "/checkpoints", wire.Checkpoint, body=body, params=params
        )

    async def promote(self, path: str, name: str) -> wire.Alias:
        """Serves a checkpoint under a name from now on. Rolling back is promoting an older one."""
        body = wire.PutAlias(target=path)
        return await self._transport.call(
            "PUT", f"/aliases/{quote(name, safe='')}", wire.Alias, body=body
        )

    async def download(self, path: str, directory: str | Path) -> Path:
        """Copies all files of a checkpoint into a directory; one that broke off goes on where it was.

        Every file is checked against the SHA-256 with which it was stored.

        Raises:
            NotFoundError: there is no such checkpoint.
            ServerError: a file is not what was stored.
        """
        return await self._fetch(await self.get(path), Path(directory), await self.files(path))

    async def export(self, path: str, directory: str | Path) -> Path:
        """Makes a directory that PEFT and vLLM load: the adapter without its optimizer, and a model card; no code.

        Raises:
            NotFoundError: there is no such checkpoint.
            ServerError: a file is not what was stored.
        """
        checkpoint = await self.get(path)
        files = [file for file in await self.files(path) if file.name in EXPORTED_FILES]
        made = await self._fetch(checkpoint, Path(directory), files)
        (made / MODEL_CARD_FILE).write_text(_model_card(checkpoint), encoding="utf-8")
        return made

    async def import_adapter(
        self,
        source: str | Path | Mapping[str, str | Path],
        *,
        base_model: str,
        name: str = "imported",
        ttl: float | timedelta | None = None,
    ) -> wire.Checkpoint:
        """Makes a checkpoint of a LoRA adapter that PEFT made elsewhere.

        `source` is its directory, or its two files by name: `adapter_config.json` and `adapter_model.safetensors`. What
        comes of it can be sampled and chatted with, and `create_model(checkpoint=…, optimizer=False)` goes on from it.
        `ttl` (seconds) is how long to keep it.

        Raises:
            InvalidRequestError: it lacks a file, is too large, or no LoRA that can be represented; `param` is the file.
            NotFoundError: there is no such base model.
        """
        if isinstance(source, Mapping):
            paths = {file: Path(source[file]) for file in EXPORTED_FILES if file in source}
        else:
            paths = {file: Path(source) / file for file in EXPORTED_FILES}
        for file in EXPORTED_FILES:
            if file not in paths or not paths[file].is_file():
                message = f"{file}: missing; an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}"
                raise exceptions.InvalidRequestError(message, param=file)
        params = {"base_model": base_model, "name": name}
        if ttl is not None:
            params["ttl_s"] = str(ttl_seconds(ttl))
        async with waiting(f"importing {name}"):
            return await self._transport.upload(
                "/checkpoints/import",
                wire.Checkpoint,
                files={"config": paths[CONFIG_FILE], "weights": paths[WEIGHTS_FILE]},
                params=params,
            )

    async def _fetch(
        self, checkpoint: wire.Checkpoint, directory: Path, files: Sequence[wire.CheckpointFile]
    ) -> Path:
        # Parts are named after the checkpoint, not its path: another may have taken that since.
        parts = [(file, _part(directory, checkpoint, file)) for file in files]
        done_bytes = sum(_size(part) for _, part in parts)
        total_bytes = sum(file.size_bytes for file in files)
        with downloading(checkpoint.name, total_bytes=total_bytes, done_bytes=done_bytes) as bar:
            for file, part in parts:
                part.parent.mkdir(parents=True, exist_ok=True)
                await self._fetch_checked(checkpoint.path, file, part, bar)
        for file, part in parts:
            part.replace(directory / file.name)
        return directory

    async def _fetch_checked(
        self, path: str, file: wire.CheckpointFile, part: Path, bar: Bar
    ) -> None:
        """Fetches a file; one that is wrong in the end, maybe by what an earlier attempt left, is fetched anew once."""
        for _ in range(2):
            await self._fetch_file(path, file, part, bar)
            if file.sha256 is None or await asyncio.to_thread(_digest, part) == file.sha256:
                return
            part.unlink()
            bar.update(-file.size_bytes)
        raise exceptions.ServerError(f"{file.name}: what came is not what was stored")

    async def _fetch_file(self, path: str, file: wire.CheckpointFile, part: Path, bar: Bar) -> None:
        """Fetches what is missing of a file; gives up after some attempts in a row that bring nothing."""
        if _size(part) > file.size_bytes:
            part.unlink()
        part.touch()
        in_vain = 0
        while (have := _size(part)) != file.size_bytes:
            problem = exceptions.ConnectionError(f"{file.name} broke off at {have} bytes")
            try:
                await self._append(path, file, part, bar)
            except exceptions.ConnectionError as error:
                problem = error
            in_vain = in_vain + 1 if _size(part) == have else 0
            if in_vain == limits.DOWNLOAD_ATTEMPTS_MAX:
                raise problem

    async def _append(self, path: str, file: wire.CheckpointFile, part: Path, bar: Bar) -> None:
        """One attempt: everything from where the part ends."""
        start = _size(part)
        async with self._transport.stream(
            "GET",
            f"{wire.API_PREFIX}/checkpoints/file",
            params={"path": path, "name": file.name},
            headers={"range": f"bytes={start}-"},
        ) as response:
            if (
                start
                and response.headers.get("content-range", "").split("-")[0] != f"bytes {start}"
            ):
                raise exceptions.ServerError(f"{file.name}: the server does not resume downloads")
            with part.open("ab") as output:
                async for chunk in response.aiter_bytes(limits.DOWNLOAD_CHUNK_BYTES):
                    output.write(chunk)
                    bar.update(len(chunk))


class AsyncAdmin:
    """`client.admin`, for keys with the scope `admin`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def tenants(self) -> list[wire.Tenant]:
        """All tenants."""
        page = await self._transport.call("GET", "/tenants", wire.Page)
        return page.tenants or []

    async def create_tenant(self, name: str, *, limits: wire.Limits | None = None) -> wire.Tenant:
        """A new tenant; `limits` are over all its keys."""
        body = wire.CreateTenant(name=name, limits=limits)
        return await self._transport.call("POST", "/tenants", wire.Tenant, body=body)

    async def change_tenant_limits(self, tenant: str, change: wire.ChangeLimits) -> wire.Tenant:
        """Changes those limits of a tenant, given by id or name, that are given; None ends one."""
        path = f"/tenants/{quote(tenant, safe='')}/limits"
        return await self._transport.call("PATCH", path, wire.Tenant, body=change)

    async def change_retention(
        self, tenant: str, change: feedback_wire.ChangeRetention
    ) -> wire.Tenant:
        """Changes for how long a tenant's stored completions are kept, if that is given; those there are count too."""
        path = f"/tenants/{quote(tenant, safe='')}/retention"
        return await self._transport.call("PATCH", path, wire.Tenant, body=change)

    async def keys(self, tenant: str | None = None) -> list[wire.ApiKey]:
        """The keys of one tenant or of all, without their secrets."""
        params = {"tenant": tenant} if tenant else {}
        page = await self._transport.call("GET", "/keys", wire.Page, params=params)
        return page.keys or []

    async def create_key(
        self,
        tenant: str,
        *,
        name: str = "default",
        scopes: Sequence[str] = ("infer", "train"),
        expires_at: str | None = None,
        limits: wire.Limits | None = None,
    ) -> wire.ApiKey:
        """A new key for a tenant; its `secret` is in this answer and nowhere else."""
        body = wire.CreateKey(
            tenant=tenant, name=name, scopes=[*scopes], expires_at=expires_at, limits=limits
        )
        return await self._transport.call("POST", "/keys", wire.ApiKey, body=body)

    async def change_key_limits(self, key_id: str, change: wire.ChangeLimits) -> wire.ApiKey:
        """Changes those limits of a key that are given; None ends one."""
        path = f"/keys/{quote(key_id, safe='')}/limits"
        return await self._transport.call("PATCH", path, wire.ApiKey, body=change)

    async def change_key(self, key_id: str, change: wire.ChangeKey) -> wire.ApiKey:
        """Changes name, scopes and expiry of a key, those that are given; None ends an expiry."""
        path = f"/keys/{quote(key_id, safe='')}"
        return await self._transport.call("PATCH", path, wire.ApiKey, body=change)

    async def rotate_key(self, key_id: str, *, grace_s: int = 0) -> wire.ApiKey:
        """Gives a key a new secret, in this answer and nowhere else; for `grace_s`, up to 7 days, the old goes on."""
        path = f"/keys/{quote(key_id, safe='')}/rotate"
        body = wire.RotateKey(grace_s=grace_s)
        return await self._transport.call("POST", path, wire.ApiKey, body=body)

    async def revoke_key(self, key_id: str) -> None:
        """Ends a key."""
        await self._transport.tell("DELETE", f"/keys/{quote(key_id, safe='')}")


def ttl_seconds(ttl: float | timedelta) -> int:
    """How long a checkpoint is kept, in whole seconds."""
    return round(ttl.total_seconds() if isinstance(ttl, timedelta) else ttl)


def _part(directory: Path, checkpoint: wire.Checkpoint, file: wire.CheckpointFile) -> Path:
    """Where a file is gathered until it is whole.

    Raises:
        ServerError: its name would lead out of the directory.
    """
    name = PurePosixPath(file.name)
    if name.is_absolute() or ".." in name.parts or not name.name:
        raise exceptions.ServerError(f"a file of the checkpoint has the name {file.name!r}")
    return directory / name.parent / f".{name.name}.{checkpoint.checkpoint_id}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(limits.DIGEST_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _model_card(checkpoint: wire.Checkpoint) -> str:
    """What the directory is, for people and for hubs. A JSON text is a YAML text too."""
    base_model = msgspec.json.encode(checkpoint.base_model).decode()
    return f"""---
base_model: {base_model}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# {checkpoint.name}

A LoRA adapter for `{checkpoint.base_model}`, exported from River.

| | |
|---|---|
| checkpoint | `{checkpoint.path}` |
| policy version | `{checkpoint.policy_version}` |
| saved at | {checkpoint.created_at} |

`{CONFIG_FILE}` and `{WEIGHTS_FILE}` are in PEFT's format: `PeftModel.from_pretrained(base, "this directory")` loads
them, and so does vLLM as a LoRA adapter. There is no code in this directory.
"""
