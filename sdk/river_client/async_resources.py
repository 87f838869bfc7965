"""What a tenant has: runs, checkpoints, aliases; and what an admin looks after: tenants and keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from river_client import exceptions, limits, wire
from river_client.progress import Bar, downloading
from river_client.transport import Transport

# What PEFT and vLLM load; a checkpoint may hold an optimizer besides.
EXPORTED_FILES = ("adapter_config.json", "adapter_model.safetensors")


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


class AsyncAliases:
    """`client.aliases`: model names of your own."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(self) -> list[wire.Alias]:
        """Your aliases, by name."""
        page = await self._transport.call("GET", "/aliases", wire.Page)
        return page.aliases or []

    async def set(self, name: str, target: str) -> wire.Alias:
        """Points a name at a checkpoint, or at `river://<run>` to follow its live version."""
        return await self._transport.call(
            "PUT", f"/aliases/{quote(name, safe='')}", wire.Alias, body=wire.PutAlias(target=target)
        )

    async def delete(self, name: str) -> None:
        """Removes a name; what it pointed at stays."""
        await self._transport.tell("DELETE", f"/aliases/{quote(name, safe='')}")


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

    async def promote(self, path: str, name: str) -> wire.Alias:
        """Serves a checkpoint under a name from now on. Rolling back is promoting an older one."""
        body = wire.PutAlias(target=path)
        return await self._transport.call(
            "PUT", f"/aliases/{quote(name, safe='')}", wire.Alias, body=body
        )

    async def download(self, path: str, directory: str | Path) -> Path:
        """Copies all files of a checkpoint into a directory; one that broke off goes on where it was.

        Raises:
            NotFoundError: there is no such checkpoint.
        """
        return await self._fetch(path, Path(directory), await self.files(path))

    async def export(self, path: str, directory: str | Path) -> Path:
        """Copies what PEFT and vLLM load, the adapter without its optimizer, into a directory."""
        files = await self.files(path)
        return await self._fetch(
            path, Path(directory), [file for file in files if file.name in EXPORTED_FILES]
        )

    async def _fetch(
        self, path: str, directory: Path, files: Sequence[wire.CheckpointFile]
    ) -> Path:
        # Parts are named after the checkpoint, not its path: another may have taken that since.
        checkpoint = await self.get(path)
        parts = [(file, _part(directory, checkpoint, file)) for file in files]
        done_bytes = sum(_size(part) for _, part in parts)
        total_bytes = sum(file.size_bytes for file in files)
        with downloading(checkpoint.name, total_bytes=total_bytes, done_bytes=done_bytes) as bar:
            for file, part in parts:
                part.parent.mkdir(parents=True, exist_ok=True)
                await self._fetch_file(path, file, part, bar)
        for file, part in parts:
            part.replace(directory / file.name)
        return directory

    async def _fetch_file(self, path: str, file: wire.CheckpointFile, part: Path, bar: Bar) -> None:
        """Fetches what is missing of a file, in as many attempts as it takes within the limits."""
        if _size(part) > file.size_bytes:
            part.unlink()
        part.touch()
        for attempt in range(limits.DOWNLOAD_ATTEMPTS_MAX):
            if _size(part) == file.size_bytes:
                return
            try:
                await self._append(path, file, part, bar)
            except exceptions.ConnectionError:
                if attempt + 1 == limits.DOWNLOAD_ATTEMPTS_MAX:
                    raise
        if _size(part) != file.size_bytes:
            raise exceptions.ConnectionError(f"{file.name} broke off at {_size(part)} bytes")

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

    async def create_tenant(self, name: str) -> wire.Tenant:
        """A new tenant."""
        body = wire.CreateTenant(name=name)
        return await self._transport.call("POST", "/tenants", wire.Tenant, body=body)

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
    ) -> wire.ApiKey:
        """A new key for a tenant; its `secret` is in this answer and nowhere else."""
        body = wire.CreateKey(tenant=tenant, name=name, scopes=[*scopes], expires_at=expires_at)
        return await self._transport.call("POST", "/keys", wire.ApiKey, body=body)

    async def revoke_key(self, key_id: str) -> None:
        """Ends a key."""
        await self._transport.tell("DELETE", f"/keys/{quote(key_id, safe='')}")


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
