"""Copy Quern's database, keys and settings into a restic repository, and bring a copy back.

Runs under systemd with its secrets as credentials. The database is read at one moment of its history (snapshot reads,
https://www.mongodb.com/docs/manual/reference/read-concern-snapshot/), so that the copy is consistent while writing goes
on. A dump is one BSON file for each collection, in the order of `_id`: what did not change keeps its bytes, and restic
keeps it once. `manifest.json` states count, SHA-256, options and indexes of each.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pymongo
from bson import json_util
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import PyMongoError
from quern_repository import Repository, RepositoryError, credential, held, say

DATABASE = "quern"
STATE = Path("/var/lib/quern-backup")
#: The metrics of the last good copy, inside STATE: there is one, then.
METRICS = "quern_backup.prom"
#: What the database's content is worth nothing without: loaded as credentials, kept inside the encrypted repository.
KEYS = ("quern_secret_keys", "quern_audit_key")
TLS = ("tls-authority.pem", "tls-authority.key")
_RAW: CodecOptions[RawBSONDocument] = CodecOptions(document_class=RawBSONDocument)
_BATCH_BYTES = 8 << 20
#: How long a copy waits for the ETL to end its run.
_STILL_SECONDS = 1800


def client() -> pymongo.MongoClient[dict[str, Any]]:
    """A connection with this unit's account."""
    return pymongo.MongoClient(credential("quern_mongodb_uri"), tz_aware=True)


def dump(folder: Path) -> dict[str, Any]:
    """Write every collection as of one moment into `folder`, which must be empty; the manifest."""
    collections: dict[str, Any] = {}
    with client() as mongo, mongo.start_session(snapshot=True) as session:
        db = mongo[DATABASE]
        for description in sorted(db.list_collections(filter={"type": "collection"}), key=lambda item: item["name"]):
            name = description["name"]
            if name.startswith("system."):
                continue
            collection = db[name]
            digest, count = hashlib.sha256(), 0
            with (folder / f"{name}.bson").open("wb") as file:
                for batch in collection.find_raw_batches(sort=[("_id", 1)], session=session):
                    file.write(batch)
                    digest.update(batch)
                    count += sum(1 for _ in _split(batch))
            indexes = [dict(index) for index in collection.list_indexes() if index["name"] != "_id_"]
            collections[name] = {
                "count": count,
                "sha256": digest.hexdigest(),
                "options": description.get("options", {}),
                "indexes": indexes,
            }
    manifest = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "collections": collections,
    }
    (folder / "manifest.json").write_text(json_util.dumps(manifest, indent=1))
    return manifest


def _split(content: bytes) -> Iterator[bytes]:
    """The documents of BSON written one after the other."""
    start = 0
    while start < len(content):
        size = int.from_bytes(content[start : start + 4], "little")
        yield content[start : start + size]
        start += size


def documents(path: Path) -> Iterator[bytes]:
    """The documents of a dumped collection, without holding them all."""
    with path.open("rb") as file:
        while head := file.read(4):
            yield head + file.read(int.from_bytes(head, "little") - 4)


def load(folder: Path) -> dict[str, int]:
    """Put a dump in the place of everything that the database holds; documents by collection.

    Raises ValueError when a file, or what the database holds afterwards, is not what the manifest says.
    """
    manifest = json_util.loads((folder / "manifest.json").read_text())["collections"]
    for name, wanted in manifest.items():
        with (folder / f"{name}.bson").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted["sha256"]:
            raise ValueError(f"{name}.bson: expected SHA-256 {wanted['sha256']}, found {found}; nothing was changed")
    with client() as mongo:
        db = mongo[DATABASE]
        for name in db.list_collection_names(filter={"type": "collection"}):
            if not name.startswith("system."):
                db.drop_collection(name)
        for name, wanted in manifest.items():
            _fill(db, name, wanted, folder / f"{name}.bson")
            found = _digest_of(db[name])
            if found != wanted["sha256"]:
                raise ValueError(
                    f"{name}: expected SHA-256 {wanted['sha256']} in the database, found {found}; run again"
                )
    return {name: wanted["count"] for name, wanted in manifest.items()}


def _fill(db: Database[dict[str, Any]], name: str, wanted: dict[str, Any], path: Path) -> None:
    db.create_collection(name, **wanted["options"])
    collection = db.get_collection(name, codec_options=_RAW)
    batch: list[RawBSONDocument] = []
    size = 0
    for content in documents(path):
        batch.append(RawBSONDocument(content))
        size += len(content)
        if size > _BATCH_BYTES:
            collection.insert_many(batch)
            batch, size = [], 0
    if batch:
        collection.insert_many(batch)
    for index in wanted["indexes"]:
        keys = list(index.pop("key").items())
        db[name].create_index(keys, **{key: value for key, value in index.items() if key not in ("v", "ns")})


def _digest_of(collection: Collection[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in collection.find_raw_batches(sort=[("_id", 1)]):
        digest.update(batch)
    return digest.hexdigest()


@contextmanager
def still(folder: Path) -> Iterator[None]:
    """Nothing is published into a warehouse meanwhile, and nothing deleted: the lock is the one that the ETL takes.

    A run that takes very long is not waited for: its files are whole, and the next copy has its publication.
    """
    if not (folder / ".lock").exists():
        yield
        return
    with (folder / ".lock").open("rb") as lock:
        deadline = time.monotonic() + _STILL_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    say(f"{folder}: still being written after {_STILL_SECONDS} s; copied as it is")
                    break
                time.sleep(1)
        yield


def backup(place: str, state: Path, folders: list[str], keep: list[str]) -> None:
    """One copy, then the retention, then the check of the repository's structure, then the metric."""
    started = time.time()
    with held(place, state) as repository:
        manifest = _copy(repository, state / "staging", folders, keep)
    counted = {name: item["count"] for name, item in manifest["collections"].items()}
    _write_metrics(state / METRICS, time.time() - started, sum(counted.values()))
    say(f"{sum(counted.values())} documents of {len(counted)} collections, as of {manifest['taken']}")


def _copy(repository: Repository, staging: Path, folders: list[str], keep: list[str]) -> dict[str, Any]:
    if staging.exists():
        shutil.rmtree(staging)
    for part in ("database", "keys", "settings"):
        (staging / part).mkdir(mode=0o700, parents=True)
    try:
        manifest = dump(staging / "database")
        for name in (*KEYS, *TLS):
            source = Path(os.environ["CREDENTIALS_DIRECTORY"]) / name
            if source.exists():
                (staging / "keys" / name).write_bytes(source.read_bytes())
        shutil.copy("/etc/quern/quern.env", staging / "settings/quern.env")
        present = [folder for folder in folders if Path(folder).is_dir()]
        with ExitStack() as standing:
            for folder in present:
                standing.enter_context(still(Path(folder)))
            repository.save([str(staging), *present])
        repository.tidy(keep)
    finally:
        shutil.rmtree(staging)
    return manifest


def _write_metrics(path: Path, seconds: float, count: int) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(
        "# HELP quern_backup_last_success_timestamp_seconds When the last good backup ended.\n"
        "# TYPE quern_backup_last_success_timestamp_seconds gauge\n"
        f"quern_backup_last_success_timestamp_seconds {time.time():.0f}\n"
        "# HELP quern_backup_duration_seconds How long it took.\n"
        "# TYPE quern_backup_duration_seconds gauge\n"
        f"quern_backup_duration_seconds {seconds:.1f}\n"
        "# HELP quern_backup_documents How many documents it holds.\n"
        "# TYPE quern_backup_documents gauge\n"
        f"quern_backup_documents {count}\n"
    )
    partial.replace(path)


def fetch(place: str, state: Path, snapshot: str, target: Path, given: bool) -> None:
    """Unpack a copy into `target`; of a repository that was given from elsewhere only when it is whole."""
    with held(place, state) as repository:
        repository.require()
        if given:
            repository.check()
        repository.fetch(snapshot, target)


def seal(keys: Path, credentials: Path, tls: Path) -> None:
    """As root: make the copy's keys this host's own, sealed by this host's key."""
    for name in KEYS:
        sealed = credentials / f"quern.{name}"
        partial = credentials / f".{sealed.name}.partial"
        partial.unlink(missing_ok=True)
        command = ["systemd-creds", "encrypt", f"--name={name}", "-", str(partial)]
        subprocess.run(command, input=(keys / name).read_bytes(), check=True)
        partial.chmod(0o600)
        partial.replace(sealed)
    for name in TLS:
        if (keys / name).exists():
            path = tls / name.removeprefix("tls-")
            path.write_bytes((keys / name).read_bytes())
            path.chmod(0o600 if path.suffix == ".key" else 0o644)
            # The next run of roles/nginx issues a certificate from this authority.
            (tls / "names").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="make a copy")
    run.add_argument("--repository", required=True)
    run.add_argument("--state", type=Path, default=STATE)
    run.add_argument("--folder", action="append", default=[])
    run.add_argument("--keep", action="append", default=[], metavar="PERIOD=NUMBER")
    unpack = verbs.add_parser("fetch", help="unpack a copy into a folder")
    unpack.add_argument("--repository", required=True)
    unpack.add_argument("--snapshot", default="latest")
    unpack.add_argument("--state", type=Path, default=STATE)
    unpack.add_argument("--given", action="store_true", help="it came from elsewhere: check it first")
    unpack.add_argument("target", type=Path)
    rekeying = verbs.add_parser("rekey", help="after a rotation of the password")
    rekeying.add_argument("--repository", required=True)
    rekeying.add_argument("--state", type=Path, default=STATE)
    listing = verbs.add_parser("list", help="show the copies")
    listing.add_argument("--repository", required=True)
    listing.add_argument("--json", action="store_true")
    for name, text in (("load", "put a dump in the place of the database"), ("dump", "write one")):
        verbs.add_parser(name, help=text).add_argument("folder", type=Path)
    sealing = verbs.add_parser("seal", help="as root: make a copy's keys this host's own")
    sealing.add_argument("keys", type=Path)
    sealing.add_argument("--credentials", type=Path, default=Path("/etc/credstore.encrypted"))
    sealing.add_argument("--tls", type=Path, default=Path("/etc/quern/tls"))
    given = parser.parse_args()
    # restic sends a lock's process a SIGHUP to see whether it lives, and the number may be this one's by now.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    match given.verb:
        case "run":
            backup(given.repository, given.state, given.folder, [f"--keep-{period}" for period in given.keep])
        case "fetch":
            fetch(given.repository, given.state, given.snapshot, given.target, given.given)
        case "load":
            counted = load(given.folder)
            say(f"{sum(counted.values())} documents of {len(counted)} collections are back, all alike")
        case "dump":
            given.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            dump(given.folder)
        case "rekey":
            with held(given.repository, given.state) as repository:
                repository.rekey(copied=(given.state / METRICS).exists())
        case "list":
            listed = Repository(given.repository)
            listed.open()
            listed.restic("snapshots", "--no-lock", "--tag", "quern", *(["--json"] if given.json else []))
        case "seal":
            seal(given.keys, given.credentials, given.tls)


if __name__ == "__main__":
    try:
        main()
    except (subprocess.CalledProcessError, RepositoryError, ValueError, OSError, PyMongoError) as error:
        # PyMongo's texts can quote hosts, never the connection string's password.
        sys.exit(f"quern-backup: {type(error).__name__}: {error}")
