"""Ad-hoc SQL reads its tenant's rows, and nothing else on the machine; it writes nowhere."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from quern.analytics import sandbox
from quern.analytics.confine import CONFINED
from quern.analytics.manifest import Manifest
from quern.analytics.sandbox import Limits, SandboxError, SqlError
from quern.analytics.sandbox_child import open_database
from tests.app.analytics.world import FORMS, TENANTS, World, publish, world

MINE, OTHERS = TENANTS


@pytest.fixture(scope="module")
def house() -> World:
    return world(1)


@pytest.fixture(scope="module")
def warehouse(house: World, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return publish(house, tmp_path_factory.mktemp("warehouse"))


@pytest.fixture
def untouched(warehouse: Manifest, tmp_path: Path) -> Iterator[Path]:
    """A folder that stays empty, and a warehouse that stays as it is."""

    def prints() -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(warehouse.root.rglob("*"))
            if path.is_file()
        }

    before = prints()
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    assert prints() == before


def test_a_statement_sees_every_row_of_its_tenant_and_none_of_another(house: World, warehouse: Manifest) -> None:
    found = sandbox.run("SELECT tenant, count(*) AS n FROM fact_response GROUP BY 1", warehouse, [MINE])
    assert found.rows == [[MINE, sum(item["tenant"] == MINE for item in house.responses)]]


def test_a_forms_columns_are_its_own_tenants(house: World, warehouse: Manifest) -> None:
    answered = [item for item in house.responses if item["status"] != "erased"]
    count = {form: sum((item["form"], item["version"]) == (form, 1) for item in answered) for form in FORMS}
    for form in FORMS:
        mine, sql = house.owner(form) == MINE, f"SELECT count(*) FROM wide_{form}_1"  # noqa: S608
        assert sandbox.run(sql, warehouse, TENANTS).rows == [[count[form]]]
        assert sandbox.run(sql, warehouse, [MINE if mine else OTHERS]).rows == [[count[form]]]
        for check in (True, False):
            with pytest.raises(SqlError, match=f"wide_{form}_1 does not exist"):
                sandbox.run(sql, warehouse, [OTHERS if mine else MINE], check=check)


def test_the_operator_sees_all_tenants(house: World, warehouse: Manifest) -> None:
    found = sandbox.run("SELECT count(*) FROM fact_response", warehouse, TENANTS)
    assert found.rows == [[len(house.responses)]]


def test_values_that_json_lacks_come_as_text(warehouse: Manifest) -> None:
    found = sandbox.run(
        "SELECT DATE '2024-02-29' AS day, 1.50::DECIMAL(4, 2) AS part, [1, 2] AS list, 'x' AS text, "
        "1.0::DOUBLE AS one, 'NaN'::DOUBLE AS undefined, '-inf'::FLOAT AS endless, "
        "170141183460469231731687303715884105727::HUGEINT AS huge",
        warehouse,
        [MINE],
    )
    assert found.columns == ["day", "part", "list", "text", "one", "undefined", "endless", "huge"]
    whole = "170141183460469231731687303715884105727"
    assert found.rows == [["2024-02-29", "1.50", "[1, 2]", "x", 1.0, "nan", "-inf", whole]]


def test_a_name_that_no_table_has_is_answered_with_those_that_there_are(warehouse: Manifest) -> None:
    with pytest.raises(SqlError, match=r"The tables are dim_field, .*fact_response"):
        sandbox.run("SELECT * FROM responses", warehouse, [MINE])


def test_rows_beyond_the_limit_are_left_out_and_that_is_said(warehouse: Manifest) -> None:
    found = sandbox.run("SELECT * FROM range(100)", warehouse, [MINE], Limits(rows=7))
    assert (len(found.rows), found.more) == (7, True)


WRITES = [
    "COPY (SELECT 1) TO '{empty}/out.csv'",
    "COPY fact_response TO '{empty}/out.parquet' (FORMAT parquet)",
    "COPY (SELECT 1 AS x) TO '{own}' (FORMAT parquet)",
    "EXPORT DATABASE '{empty}/all'",
    "ATTACH '{empty}/new.db'",
    "ATTACH '{loot}/a.db' AS loot",
    "IMPORT DATABASE '{loot}/exported'",
    "SET log_query_path = '{empty}/log'",
    "INSTALL '{loot}/evil.duckdb_extension'",
    "LOAD '{loot}/evil.duckdb_extension'",
    "CALL enable_logging(storage = 'file', storage_path = '{empty}/log')",
    "EXPLAIN ANALYZE SELECT * FROM enable_logging(storage = 'file', storage_path = '{empty}/log')",
    "CALL enable_profiling(format = 'json', save_location = '{empty}/profile.json')",
    "EXPLAIN ANALYZE SELECT * FROM enable_profiling(format = 'json', save_location = '{empty}/profile.json')",
    "CREATE TABLE t AS SELECT * FROM read_parquet('{other}')",
    "CREATE PERSISTENT SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')",
]
READS = [
    "SELECT * FROM read_parquet('{other}')",
    "SELECT * FROM read_parquet(['{own}', '{other}'])",
    "SELECT * FROM '{other}'",
    "SELECT * FROM parquet_metadata('{other}')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM read_csv('/etc/passwd', columns = {{'line': 'VARCHAR'}}, delim = '|')",
    "SELECT * FROM read_json('{root}/manifest.json')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "SELECT content FROM read_text('{root}/mani' || 'fest.json')",
    "SELECT * FROM '{loot}/link.parquet'",
    "SELECT * FROM '{beside}/../../../tenants/{others}'",
    "SELECT * FROM parquet_file_metadata('{other}')",
    "SELECT * FROM read_duckdb('{loot}/a.db', table_name => 't')",
    "SELECT * FROM read_text('/proc/self/maps')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''/etc/passwd'')'))",
]
#: These need the internet, or what the tests themselves are given, to succeed anywhere.
WITHOUT_CONTROL = ("http://", "SECRET ", "/dev/stdin")
#: What the kernel lets through, and DuckDB alone refuses: that a file is there, its size and its time; the own pipes.
HELD_BY_DUCKDB = [
    "SELECT * FROM glob('/etc/passwd')",
    "SELECT size, last_modified FROM read_blob('/etc/passwd')",
    "SELECT size FROM read_blob('{other}')",
    "SELECT * FROM read_text('/dev/stdin')",
]


@dataclass(frozen=True)
class Machine:
    """The paths that statements are filled with."""

    own: Path
    other: Path
    root: Path
    loot: Path
    empty: Path

    def fill(self, statement: str) -> str:
        others = self.other.relative_to(self.root / "tenants")
        return statement.format(**vars(self), beside=self.own.parent, others=others)


@pytest.fixture(scope="module")
def loot(warehouse: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies elsewhere: a database, an exported one, an extension, and a link to another tenant's file."""
    folder = tmp_path_factory.mktemp("loot")
    _extension(folder / "evil.duckdb_extension")
    with duckdb.connect(folder / "a.db") as database:
        database.execute("CREATE TABLE t AS SELECT 1 AS x")
        database.execute(f"EXPORT DATABASE '{folder}/exported'")
    (folder / "link.parquet").symlink_to(warehouse.files("fact_response", OTHERS)[0])
    return folder


def _extension(path: Path) -> None:
    """A library that DuckDB loads where it may: its last 512 bytes say for which DuckDB it is; it is not signed."""
    source, library = path.with_name("evil.c"), path.with_name("evil.so")
    source.write_text("int evil_init_c_api(void *info, void *access) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=120)
    with duckdb.connect() as database:
        ((platform,),) = database.execute("PRAGMA platform").fetchall()
    said = ["", "", "", "C_STRUCT", "0.1", "v1.2.0", platform, "4"]
    path.write_bytes(library.read_bytes() + b"".join(text.encode().ljust(32, b"\0") for text in said) + bytes(256))


@pytest.fixture
def machine(warehouse: Manifest, loot: Path, untouched: Path) -> Machine:
    own, other = (warehouse.files("fact_response", tenant)[0] for tenant in (MINE, OTHERS))
    return Machine(own, other, warehouse.root, loot, untouched)


@pytest.mark.parametrize("statement", [*READS, *HELD_BY_DUCKDB])
def test_no_statement_reads_another_file(warehouse: Manifest, machine: Machine, statement: str) -> None:
    with pytest.raises(SqlError):
        sandbox.run(machine.fill(statement), warehouse, [MINE])


@pytest.mark.parametrize("statement", [*WRITES, *READS])
def test_the_kernel_alone_holds_every_statement(warehouse: Manifest, machine: Machine, statement: str) -> None:
    # DuckDB's own walls are left out: any statement may run, and no setting forbids it a file.
    with pytest.raises(SqlError):
        sandbox.run(machine.fill(statement), warehouse, [MINE], check=False)


@pytest.mark.parametrize(
    "statement",
    [
        statement
        for statement in [*WRITES, *READS, *HELD_BY_DUCKDB]
        if not any(part in statement for part in WITHOUT_CONTROL)
    ],
)
@pytest.mark.filterwarnings("ignore:Arrow output")
def test_the_same_statement_does_its_work_where_nothing_holds_it(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory, statement: str
) -> None:
    # Else the tests above would hold of a statement that fails anywhere.
    free = replace(machine, root=tmp_path_factory.mktemp("free"), empty=tmp_path_factory.mktemp("empty"))
    shutil.copytree(machine.root, free.root, dirs_exist_ok=True)
    own, other = (free.root / path.relative_to(machine.root) for path in (machine.own, machine.other))
    extensions = str(tmp_path_factory.mktemp("extensions"))
    with duckdb.connect(config={"allow_unsigned_extensions": "true", "extension_directory": extensions}) as database:
        database.execute(f"CREATE VIEW fact_response AS FROM read_parquet('{own}')")
        database.execute(replace(free, own=own, other=other).fill(statement)).to_arrow_table()
        # What is logged and measured is of the statements to come.
        database.execute("SELECT 1").fetchall()
    assert "{empty}" not in statement or any(free.empty.iterdir())


@pytest.mark.parametrize("check", [True, False], ids=["as it runs", "without DuckDB's walls"])
def test_no_folder_can_be_listed(warehouse: Manifest, check: bool) -> None:
    try:
        every = "SELECT * FROM glob('{root}/**')".replace("{root}", str(warehouse.root))
        found = sandbox.run(every, warehouse, [MINE], check=check).rows
    except SqlError:
        found = []
    assert found == []


@pytest.mark.parametrize(
    "statement",
    [
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "COPY (SELECT 1) TO '/tmp/out.csv'",
        "SELECT 1; SET memory_limit = '100GB'",
        # These run what they explain.
        "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
        "EXPLAIN ANALYZE DROP VIEW fact_response",
        "EXPLAIN ANALYZE LOAD json",
        "EXPLAIN ANALYZE PREPARE x AS SELECT 1",
        "EXPLAIN (ANALYZE, FORMAT json) CREATE TABLE t AS SELECT 1",
        "EXPLAIN/**/ANALYZE/**/CREATE TABLE t AS SELECT 1",
        "EXPLAIN (FORMAT ')SELECT 1 --', ANALYZE) DROP VIEW fact_response",
        "EXPLAIN COPY (SELECT 1) TO '/tmp/out.csv'",
        "PREPARE x AS SELECT 1",
        "PRAGMA database_list",
        "PRAGMA enable_profiling = 'json'",
        "CALL enable_logging()",
        "CALL pragma_version()",
        "USE memory",
        "RESET memory_limit",
        "LOAD json",
        "BEGIN",
        "PIVOT fact_response ON status USING count(*)",
    ],
)
def test_nothing_can_be_set_or_changed(warehouse: Manifest, statement: str) -> None:
    with pytest.raises(SqlError, match="expected"):
        sandbox.run(statement, warehouse, [MINE])


@pytest.mark.parametrize(
    "statement",
    [
        "EXPLAIN SELECT * FROM fact_response",
        "EXPLAIN ANALYZE SELECT count(*) FROM fact_response",
        "-- how?\nexplain (analyze, format json) FROM fact_response",
        "PIVOT fact_response ON status IN ('processed') USING count(*)",
        "SUMMARIZE fact_response",
        "DESCRIBE fact_response",
        "SHOW TABLES",
    ],
)
def test_what_only_looks_may_be_run(warehouse: Manifest, statement: str) -> None:
    assert sandbox.run(statement, warehouse, [MINE]).rows


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM enable_logging()",
        "SELECT * FROM enable_logging(storage = 'stdout', level = 'trace')",
        "SELECT * FROM enable_logging(storage = 'file', storage_path = '{empty}/log')",
        "EXPLAIN ANALYZE SELECT * FROM enable_logging(storage = 'file', storage_path = '{empty}/log')",
        "SELECT * FROM disable_logging()",
        "SELECT * FROM enable_profiling()",
        "SELECT * FROM enable_profiling(format = 'json', save_location = '{empty}/profile.json')",
        "EXPLAIN ANALYZE SELECT * FROM enable_profiling(format = 'json', save_location = '{empty}/profile.json')",
        "SELECT * FROM disable_profiling()",
    ],
)
def test_a_select_that_sets_something_finds_the_settings_locked(
    warehouse: Manifest, machine: Machine, statement: str
) -> None:
    with pytest.raises(SqlError, match="the configuration has been locked"):
        sandbox.run(machine.fill(statement), warehouse, [MINE])
    # Where it is not, nothing else refuses it, but the kernel what comes of it.
    with duckdb.connect() as database:
        database.execute(statement.format(empty=machine.loot)).fetchall()


#: Were they ever let through by their type.
OTHER_SETTERS = [
    "SET memory_limit = '100GB'",
    "SET lock_configuration = false",
    "SET allowed_paths = ['/etc/passwd']",
    "SET temp_directory = '/tmp'",
    "SET log_query_path = '{empty}/log'",
    "SET extension_directory = '/tmp'",
    "SET autoinstall_known_extensions = true",
    "RESET threads",
    "PRAGMA threads = 4",
    "PRAGMA enable_profiling = 'json'",
    "PRAGMA disable_optimizer",
    "CALL enable_logging()",
    "CALL enable_profiling()",
]


@contextmanager
def _opened(machine: Machine, check: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """The database of a statement's process, in this one: neither statements' types nor the kernel hold anything."""
    order = {"files": [str(machine.own)], "views": [], "memory_megabytes": 100, "check": check}
    with open_database(order) as database:
        yield database


@pytest.mark.parametrize("statement", OTHER_SETTERS)
def test_the_settings_are_locked_for_statements_of_every_type(machine: Machine, statement: str) -> None:
    with (
        _opened(machine, True) as database,
        pytest.raises(duckdb.InvalidInputException, match="the configuration has been locked"),
    ):
        database.execute(machine.fill(statement))
    with _opened(machine, False) as database:
        database.execute(statement.format(empty=machine.loot))


def test_an_extension_meets_a_wall_of_duckdb_and_one_of_the_kernel(warehouse: Manifest, machine: Machine) -> None:
    load = machine.fill("LOAD '{loot}/evil.duckdb_extension'")
    with (
        _opened(machine, True) as database,
        pytest.raises(duckdb.PermissionException, match="Loading external extensions is disabled"),
    ):
        database.execute(load)
    with pytest.raises(SqlError, match=r"Cannot open file .*evil\.duckdb_extension.*Permission denied"):
        sandbox.run(load, warehouse, [MINE], check=False)


@pytest.mark.parametrize("check", [True, False], ids=["as it runs", "without DuckDB's walls"])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM checkpoint()",
        "SELECT * FROM truncate_duckdb_logs()",
        "SELECT write_log('quern', level := 'fatal')",
    ],
)
def test_what_writes_nothing_by_itself_has_nothing_to_write_to(
    warehouse: Manifest, untouched: Path, statement: str, check: bool
) -> None:
    # A process lives for one statement, and `untouched` sees what outlives it.
    assert len(sandbox.run(statement, warehouse, [MINE], check=check).rows) <= 1


def test_the_same_writes_where_there_is_a_file_and_a_log(tmp_path: Path) -> None:
    ahead = tmp_path / "a.db.wal"
    with duckdb.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE t AS SELECT 1 AS x")
        assert ahead.stat().st_size > 0
        database.execute("SELECT * FROM checkpoint()").fetchall()
        assert not ahead.exists() or ahead.stat().st_size == 0
        database.execute("CALL enable_logging(level = 'fatal')")
        for statement, kept in (
            ("SELECT write_log('quern', level := 'fatal')", 1),
            ("SELECT * FROM truncate_duckdb_logs()", 0),
        ):
            database.execute(statement).fetchall()
            assert database.execute("SELECT count(*) FROM duckdb_logs").fetchall() == [(kept,)]


def test_a_statement_that_takes_too_much_memory_ends(warehouse: Manifest) -> None:
    with pytest.raises(SqlError, match="emory"):
        sandbox.run("SELECT list(i) FROM range(500000000) t(i)", warehouse, [MINE], Limits(memory_megabytes=100))


@pytest.mark.parametrize(
    "endless",
    [
        "SELECT count(*) FROM range(1000000000000000) t(i) WHERE i % 7 = 3",
        # These take no processor time, and would come to an end.
        "SELECT pg_sleep(15)",
        "SELECT sleep_ms(15000)",
    ],
)
def test_a_statement_that_takes_too_long_ends(warehouse: Manifest, endless: str) -> None:
    with pytest.raises(SqlError, match="within 1 s"):
        sandbox.run(endless, warehouse, [MINE], Limits(seconds=1))


def test_to_start_has_a_limit_of_its_own(warehouse: Manifest) -> None:
    with pytest.raises(SandboxError, match=r"a confined process within 0\.01 s"):
        sandbox.run("SELECT 1", warehouse, [MINE], Limits(start_seconds=0.01))


def test_what_a_statement_says_comes_after_the_word_that_it_is_confined() -> None:
    # Else a statement could reset its clock, or the child's failure to be confined be taken for an answer.
    order = {"files": ["/nonexistent"], "views": [], "tables": [], "memory_megabytes": 100, "rows": 1}
    order |= {"cpu_seconds": 9, "open_files": 64, "check": True}
    command = [sys.executable, "-P", "-s", "-m", "quern.analytics.sandbox_child"]
    done = subprocess.run(
        command, input=json.dumps(order).encode() + b"\nSELECT 1", capture_output=True, timeout=120, check=True
    )
    assert json.loads(done.stdout)["kind"] == "confinement"
    assert not done.stdout.startswith(CONFINED)


def children() -> set[int]:
    """The processes of statements that this process runs."""
    found = (task.read_text().split() for task in Path("/proc/self/task").glob("*/children"))
    made = set()
    for pid in (int(text) for listed in found for text in listed):
        with suppress(OSError):
            if b"sandbox_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                made.add(pid)
    return made


def test_where_memory_ends_a_statement_goes_first(warehouse: Manifest) -> None:
    ended = threading.Event()

    def wait() -> None:
        with suppress(SqlError):
            sandbox.run("SELECT pg_sleep(3600)", warehouse, [MINE], Limits(seconds=60, start_seconds=120))
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    deadline = time.monotonic() + 180
    willing = ""
    while willing != "1000":
        assert time.monotonic() < deadline, willing
        with suppress(OSError):
            for pid in children():
                willing = Path(f"/proc/{pid}/oom_score_adj").read_text().strip()
        time.sleep(0.02)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    assert ended.wait(60)


_ATTEMPTS = """
import ctypes, errno, json, os, resource, shutil, socket, struct, sys, threading
from quern.analytics.confine import confine

own, other, empty, mode = sys.argv[1:]
above = os.getppid() if mode == "confined" else os.getpid()
libc = ctypes.CDLL(None, use_errno=True)

def native(number, *arguments):
    wide = [ctypes.c_long(part) if isinstance(part, int) else part for part in arguments]
    if libc.syscall(ctypes.c_long(number), *wide) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))

def vector(buffer):
    return struct.pack("=QQ", ctypes.addressof(buffer), len(buffer))

looked, taken = ctypes.create_string_buffer(b"quern"), ctypes.create_string_buffer(6)
place, shared = empty.encode(), f"/dev/shm/quern-{above}"
attempts = {
    "read another file": lambda: open(other, "rb").read(1),
    "read /etc/passwd": lambda: open("/etc/passwd"),
    "read its own memory": lambda: open("/proc/self/mem", "rb"),
    "list a folder": lambda: os.listdir("/"),
    "write its file": lambda: open(own, "r+b"),
    "truncate its file": lambda: os.truncate(own, 0),
    "create a file": lambda: open(f"{empty}/new", "w"),
    "create a file in memory's folder": lambda: (open(shared, "w"), os.unlink(shared)),
    "create a folder": lambda: os.mkdir(f"{empty}/new"),
    "link": lambda: os.link(own, f"{empty}/new"),
    "link by name": lambda: os.symlink(own, f"{empty}/new"),
    "rename": lambda: os.rename(own, f"{empty}/new"),
    "remove": lambda: os.unlink(own),
    "change rights": lambda: os.chmod(own, 0o777),
    "change times": lambda: os.utime(own),
    "survive where memory ends": lambda: open("/proc/self/oom_score_adj", "w").write("1000"),
    "a socket": lambda: socket.socket(),
    "a UNIX socket": lambda: socket.socket(socket.AF_UNIX),
    "a pair of sockets": lambda: socket.socketpair(),
    "fork": lambda: os.fork() or os._exit(0),
    "another program": lambda: os.execv("/bin/true", ["true"]),
    "a thread": lambda: threading.Thread(target=int).start(),
    "a session": lambda: os.setsid(),
    "a signal": lambda: os.kill(above, 0),
    "trace": lambda: native(101, 0x4206, above, 0, 0),
    "read another's memory": lambda: native(310, above, vector(taken), 1, vector(looked), 1, 0),
    "io_uring": lambda: native(425, 1, ctypes.create_string_buffer(120)),
    "a namespace": lambda: native(272, 0x10000000),
    "mount": lambda: (native(165, b"quern", place, b"tmpfs", 0, None), native(166, place, 0)),
    "another root": lambda: os.chroot(empty),
    "a file in memory": lambda: os.memfd_create("x"),
    "bpf": lambda: native(321, 0, struct.pack("=5I", 2, 4, 4, 1, 0), 20),
    "measure others": lambda: native(298, struct.pack("=II112x", 1, 120), 0, -1, -1, 0),
    "faults of memory": lambda: native(323, 0),
    "watch a folder": lambda: native(294, 0),
    "a key ring": lambda: native(250, 0, -3, 1),
    "make a handle": lambda: native(303, -100, own.encode(), struct.pack("=Ii128x", 128, 0), struct.pack("i", 0), 0),
    "open a handle": lambda: native(304, -100, 0, 0),
    "drop a right": lambda: native(157, 24, 1, 0, 0, 0),
    "much memory": lambda: bytearray(1 << 30),
    "more descriptors": lambda: resource.setrlimit(7, (2048, 2048)),
    "the user": lambda: os.setuid(65534),
}

def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return "refused" if error.errno in (errno.EPERM, errno.EACCES, errno.ENOMEM) else error.strerror
    except (MemoryError, RuntimeError, ImportError, ValueError):
        return "refused"
    return "came through"

def apart(attempt):
    # In a process of its own, with a folder and a file as they were.
    shutil.rmtree(empty)
    os.mkdir(empty)
    if not os.path.exists(own):
        shutil.copy(other, own)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, outcome(attempt).encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 100).decode()
    os.close(reader)
    # What became another program says nothing any more.
    return said if os.wait()[1] or said else "came through"

if mode == "confined":
    confine([own], memory_bytes=100 << 20, cpu_seconds=20)
    found = {name: outcome(attempt) for name, attempt in attempts.items()}
    found["read its file"] = len(open(own, "rb").read())
else:
    found = {name: apart(attempt) for name, attempt in attempts.items()}
os.write(1, json.dumps(found).encode())
os._exit(0)
"""
#: What only root may do, even where nothing holds it; and what a kernel may lack or an operator have taken from all.
_OF_ROOT = {"mount", "another root", "bpf", "measure others", "faults of memory", "drop a right", "the user", "trace"}
_SWITCHED_OFF = {"io_uring", "a namespace", "bpf", "a key ring", "trace", "measure others", "faults of memory"} | {
    "make a handle"
}


def attempted(own: Path, other: Path, empty: Path, mode: str) -> dict[str, Any]:
    """Attempt to what came of it."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _ATTEMPTS, str(own), str(other), str(empty), mode],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_kernel_refuses_all_but_reading_ones_own_file(machine: Machine) -> None:
    found = attempted(machine.own, machine.other, machine.empty, "confined")
    assert found.pop("read its file") == machine.own.stat().st_size
    assert {name: outcome for name, outcome in found.items() if outcome != "refused"} == {}


def test_nothing_refuses_the_same_attempts_without_confinement(machine: Machine, tmp_path_factory: Any) -> None:
    # Else the test above would hold on a machine on which nothing works.
    free = tmp_path_factory.mktemp("free")
    own = Path(shutil.copy(machine.own, free / "own"))
    (free / "empty").mkdir()
    found = attempted(own, machine.other, free / "empty", "free")
    assert found.pop("open a handle") == "Bad address" or os.geteuid() != 0
    failed = {name: outcome for name, outcome in found.items() if outcome != "came through"}
    assert failed.keys() <= (_SWITCHED_OFF if os.geteuid() == 0 else _SWITCHED_OFF | _OF_ROOT), failed


def test_a_process_of_several_threads_is_not_confined_and_says_so() -> None:
    script = (
        "import threading, time\n"
        "from quern.analytics.confine import CannotConfineError, confine\n"
        "threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "try:\n    confine([], memory_bytes=1 << 30, cpu_seconds=9)\n"
        "except CannotConfineError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "expected a process of one thread, found 2"
