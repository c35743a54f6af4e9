"""`/v1/files` and `/v1/batches`."""

import re
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta

from pymongo.client_session import ClientSession
from quart import Blueprint, Response, request
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import RequestEntityTooLarge

from quern.events.v1.desk import Desk, reply
from quern.events.v1.listing import Listing
from quern.jobs.queue import Opened
from quern.observe.logs import request_id
from quern.openai import batches, files
from quern.openai.batches import Batch
from quern.openai.error import ApiError, not_found
from quern.openai.files import StoredFile
from quern.openai.request import BatchBody
from quern.store import clock, identifier
from quern.tenants.keys import Principal

READ, WRITE = "ai:read", "ai:write"
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,255}")


def add_routes(routes: Blueprint, desk: Desk) -> None:
    """Add the routes over `desk`."""

    @routes.post("/files")
    async def create_file() -> Response:
        principal = await desk.admit(WRITE)
        async with desk.uploads:
            upload, purpose, seconds = await _read_upload(desk)
            made = await desk.run(_store_file, desk, principal, upload, purpose, seconds)
        return reply(made.shown)

    @routes.get("/files")
    async def list_files() -> Response:
        principal = await desk.admit(READ)
        listing = Listing.of_request(newest_first=True, most=10_000, default=100)
        after = _internal(files.internal_id(listing.after), "file", listing.after) if listing.after else None

        def find() -> list[StoredFile]:
            purpose = request.args.get("purpose")
            return files.listing(
                desk.db,
                principal.tenant,
                purpose=purpose,
                after=after,
                limit=listing.limit + 1,
                newest_first=listing.newest_first,
            )

        return reply(listing.page(await desk.run(find), lambda file: file.shown))

    @routes.get("/files/<identity>")
    async def get_file(identity: str) -> Response:
        principal = await desk.admit(READ)
        return reply((await _file(desk, principal, identity)).shown)

    @routes.get("/files/<identity>/content")
    async def get_content(identity: str) -> Response:
        principal = await desk.admit(READ)
        file = await _file(desk, principal, identity)
        headers = {"Content-Length": str(file.size), "X-Content-Type-Options": "nosniff"}
        body = _content(desk, file) if request.method == "GET" else b""
        return Response(body, headers=headers, content_type="application/octet-stream")

    @routes.delete("/files/<identity>")
    async def delete_file(identity: str) -> Response:
        principal = await desk.admit(WRITE)
        file = await _file(desk, principal, identity)

        def work(session: ClientSession) -> None:
            files.delete(desk.db, session, file)
            desk.audit(session, principal, "ai_file.deleted", file.public_id)

        await desk.run(desk.transact, work)
        return reply({"id": file.public_id, "object": "file", "deleted": True})

    @routes.post("/batches")
    async def create_batch() -> Response:
        principal = await desk.admit(WRITE)
        body = await desk.json(BatchBody)
        return reply((await desk.run(_create_batch, desk, principal, body)).shown)

    @routes.get("/batches")
    async def list_batches() -> Response:
        principal = await desk.admit(READ)
        listing = Listing.of_request(newest_first=True, most=100)
        after = _internal(batches.internal_id(listing.after), "batch", listing.after) if listing.after else None

        def find() -> list[Batch]:
            return batches.listing(desk.db, principal.tenant, after=after, limit=listing.limit + 1)

        return reply(listing.page(await desk.run(find), lambda batch: batch.shown))

    @routes.get("/batches/<identity>")
    async def get_batch(identity: str) -> Response:
        principal = await desk.admit(READ)
        return reply((await _batch(desk, principal, identity)).shown)

    @routes.post("/batches/<identity>/cancel")
    async def cancel_batch(identity: str) -> Response:
        principal = await desk.admit(WRITE)
        batch = await _batch(desk, principal, identity)
        cancelled = await desk.run(_cancel_batch, desk, principal, batch)
        if cancelled is None:
            batch = await _batch(desk, principal, identity)
            if batch.status not in ("cancelling", "cancelled"):
                raise ApiError(409, f"The batch is {batch.status}; it cannot be cancelled.", code="invalid_state")
        return reply((cancelled or batch).shown)


async def _read_upload(desk: Desk) -> tuple[FileStorage, str, int | None]:
    most = desk.settings.max_file_bytes
    try:
        form, uploads = await request.form, await request.files
    except RequestEntityTooLarge:
        raise ApiError(413, f"The file is too large; at most {most} bytes are accepted.", code="too_large") from None
    upload = uploads.get("file")
    if upload is None:
        message = "Expected multipart/form-data with a file."
        raise ApiError(400, message, code="missing_required_parameter", param="file")
    purpose = form.get("purpose", "")
    if purpose not in files.PURPOSES:
        known = ", ".join(files.PURPOSES)
        raise ApiError(400, f"purpose: expected one of {known}.", code="invalid_value", param="purpose")
    if not _NAME.fullmatch(upload.filename or ""):
        raise ApiError(400, "Expected a file name without a path.", code="invalid_value", param="file")
    seconds = form.get("expires_after[seconds]")
    if seconds is not None and not (seconds.isascii() and seconds.isdigit() and 3600 <= int(seconds[:9]) <= 2_592_000):
        message = "expires_after.seconds: expected 3600 to 2592000."
        raise ApiError(400, message, code="invalid_value", param="expires_after")
    return upload, purpose, int(seconds) if seconds else None


def _store_file(desk: Desk, principal: Principal, upload: FileStorage, purpose: str, seconds: int | None) -> StoredFile:
    db, identity, most = desk.db, identifier.new("fil"), desk.settings.max_file_bytes
    forget = clock.now() + timedelta(seconds=seconds) if seconds else files.kept_until(desk.settings.keep_stored_days)

    def pieces() -> Iterator[bytes]:
        size = 0
        while piece := upload.stream.read(files.CHUNK):
            size += len(piece)
            if size > most:
                message = f"The file is too large; at most {most} bytes are accepted."
                raise ApiError(413, message, code="too_large")
            yield piece

    size = files.write_content(db, principal.tenant, identity, pieces(), forget)

    def work(session: ClientSession) -> StoredFile:
        made = files.insert(
            db,
            session,
            identity=identity,
            tenant=principal.tenant,
            purpose=purpose,
            filename=upload.filename or "",
            size=size,
            forget=forget,
        )
        desk.audit(session, principal, "ai_file.created", made.public_id, {"bytes": size, "purpose": purpose})
        return made

    return desk.transact(work)


async def _content(desk: Desk, file: StoredFile) -> AsyncIterator[bytes]:
    number = 0
    while (piece := await desk.run(files.chunk, desk.db, file, number)) is not None:
        yield piece
        number += 1


def _create_batch(desk: Desk, principal: Principal, body: BatchBody) -> Batch:
    db = desk.db
    file = files.get(db, principal.tenant, files.internal_id(body.input_file_id))
    if file is None:
        raise ApiError(400, f"No such file: '{body.input_file_id[:100]}'.", code="invalid_value", param="input_file_id")
    if file.purpose != "batch":
        message = f"The file's purpose is {file.purpose}; expected batch."
        raise ApiError(400, message, code="invalid_value", param="input_file_id")
    most = desk.settings.max_batches_per_tenant
    if batches.unended(db, principal.tenant) >= most:
        message = f"At most {most} batches can be under way; wait for one to end, or cancel one."
        raise ApiError(429, message, code="too_many_batches", headers={"Retry-After": "60"})
    identity = identifier.new("bat")

    def work(session: ClientSession) -> tuple[Batch, Opened]:
        request_name = request_id.get() or ""
        made = batches.insert(db, session, identity, principal.tenant, principal.key, body, file.id, request_name)
        desk.audit(session, principal, "ai_batch.created", made[0].public_id)
        return made

    batch, opened = desk.transact(work)
    desk.open(opened)
    return batch


def _cancel_batch(desk: Desk, principal: Principal, batch: Batch) -> Batch | None:
    def work(session: ClientSession) -> tuple[Batch | None, Opened]:
        found = batches.cancel(desk.db, session, batch, request_id.get() or "")
        if found[0] is not None:
            desk.audit(session, principal, "ai_batch.cancelled", batch.public_id)
        return found

    cancelled, opened = desk.transact(work)
    desk.open(opened)
    return cancelled


async def _file(desk: Desk, principal: Principal, identity: str) -> StoredFile:
    file = await desk.run(files.get, desk.db, principal.tenant, files.internal_id(identity))
    if file is None:
        raise not_found("file", identity)
    return file


async def _batch(desk: Desk, principal: Principal, identity: str) -> Batch:
    batch = await desk.run(batches.get, desk.db, principal.tenant, batches.internal_id(identity))
    if batch is None:
        raise not_found("batch", identity)
    return batch


def _internal(found: str | None, what: str, given: str | None) -> str:
    if found is None:
        raise not_found(what, given or "")
    return found
