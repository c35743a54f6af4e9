"""Settings: typed, from three places, explained when wrong without showing a value, and read again when they change."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from quern.config import LiveSettings, Secret, SettingsError, load

SECRET = "hunter2-canary"
GOOD = {
    "QUERN_MONGODB_URI": "mongodb://%2Frun%2Fmongod.sock/?directConnection=true",
    "QUERN_REDIS_QUEUE_URL": "unix:///run/redis.sock",
    "QUERN_SECRET_KEYS": Fernet.generate_key().decode(),
    "QUERN_AUDIT_KEY": "a" * 40,
}
SECRETS: dict[str, Secret] = {"QUERN_AUDIT_KEY": "audit_key", "QUERN_SECRET_KEYS": "secret_keys"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("QUERN_") or name == "CREDENTIALS_DIRECTORY":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    yield


def _complaint() -> str:
    with pytest.raises(SettingsError) as caught:
        load()
    return str(caught.value)


def test_what_is_needed_is_enough() -> None:
    assert load().requests_per_minute == 100


def test_a_secret_is_asked_of_the_processes_that_need_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name)
    settings = load()
    for name, secret in SECRETS.items():
        with pytest.raises(SettingsError, match=f"^{name}: it is not set. Example: {name}="):
            settings.required(secret)


def test_several_audit_keys_are_each_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERN_AUDIT_KEY", f"{'n' * 32}, {'o' * 32}")
    assert load().required("audit_key") == ["n" * 32, "o" * 32]
    monkeypatch.setenv("QUERN_AUDIT_KEY", f"{'n' * 32},")
    assert "QUERN_AUDIT_KEY: each key must have at least 32 characters" in _complaint()


@pytest.mark.parametrize("name", sorted(set(GOOD) - {*SECRETS}))
def test_a_missing_setting_is_named_with_an_example(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name)
    assert _complaint().startswith(f"{name}: it is not set. Example: {name}=")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("QUERN_MONGODB_URI", SECRET, "mongodb://"),
        ("QUERN_MONGODB_URI", f"http://{SECRET}", "mongodb://"),
        ("QUERN_REDIS_QUEUE_URL", f"http://:{SECRET}@x", "redis://"),
        ("QUERN_SECRET_KEYS", SECRET, "quern secret-key"),
        ("QUERN_SECRET_KEYS", f"{Fernet.generate_key().decode()},{SECRET}", "quern secret-key"),
        ("QUERN_AUDIT_KEY", SECRET, "32 characters"),
        ("QUERN_API_BIND", SECRET, "unix:/path"),
        ("QUERN_API_THREADS", SECRET, "integer"),
        ("QUERN_API_WORKERS", "0", "greater than or equal to 1"),
        ("QUERN_LOG_LEVEL", SECRET, "'info'"),
        ("QUERN_PUBLIC_URL", f"https://x/{SECRET}", "without a path"),
        ("QUERN_JOB__LEASE", SECRET, "number"),
        ("QUERN_MAX_BODY_BYTES", "1", "1024"),
        ("QUERN_OTLP_ENDPOINT", SECRET, "http"),
        ("QUERN_WEBHOOK__ALLOW_NETWORKS", f'["{SECRET}"]', "network"),
        ("QUERN_WEBHOOK__ALLOW_HOSTS", f'["{SECRET}/x"]', "host name"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_its_name_and_what_is_wrong_but_no_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    complaint = _complaint()
    assert complaint.startswith(f"{name}: ")
    assert expected in complaint
    assert f"Example: {name}=" in complaint
    assert SECRET not in complaint


@pytest.mark.parametrize("name", ["QUERN_WEBHOOK", "QUERN_WEBHOOK__ALLOW_NETWORKS", "QUERN_JOB"])
def test_what_is_not_json_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, f"[{SECRET}")
    complaint = _complaint()
    assert "QUERN_" in complaint
    assert "JSON" in complaint
    assert SECRET not in complaint


def test_all_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERN_API_THREADS", "x")
    monkeypatch.setenv("QUERN_AUDIT_KEY", "short")
    monkeypatch.delenv("QUERN_MONGODB_URI")
    assert {line.split(":")[0] for line in _complaint().splitlines()} == {
        "QUERN_API_THREADS",
        "QUERN_AUDIT_KEY",
        "QUERN_MONGODB_URI",
    }


def test_the_environment_wins_over_a_credential_and_that_over_an_env_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    (tmp_path / ".env").write_text("QUERN_API_THREADS=3\nQUERN_API_WORKERS=3\nQUERN_ENGINE_PARALLEL=3\n")
    (credentials / "quern_api_workers").write_text("4\n")
    (credentials / "quern_engine_parallel").write_text("4\n")
    monkeypatch.setenv("QUERN_ENGINE_PARALLEL", "5")
    found = load()
    assert (found.api_threads, found.api_workers, found.engine_parallel) == (3, 4, 5)


def test_an_unreadable_env_file_is_named_not_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "odd.env").write_bytes(b"QUERN_API_THREADS=\xff\xfe" + SECRET.encode())
    monkeypatch.setenv("QUERN_ENV_FILE", str(tmp_path / "odd.env"))
    complaint = _complaint()
    assert "UTF-8" in complaint
    assert SECRET not in complaint


def test_a_secret_is_in_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERN_MONGODB_URI", f"mongodb://u:{SECRET}@h/")
    monkeypatch.setenv("QUERN_MAIL", '{"host": "h", "from_address": "a@example.org", "username": "u"}')
    monkeypatch.setenv("QUERN_MAIL_PASSWORD", SECRET)
    found = load()
    assert found.mail is not None
    assert found.mail.password is not None
    assert found.mail.password.get_secret_value() == SECRET
    assert SECRET not in repr(found)
    assert SECRET not in found.model_dump_json()


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


def test_a_changed_credential_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUERN_AUDIT_KEY")
    directory = tmp_path / "credentials"
    directory.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    credential = directory / "quern_audit_key"
    credential.write_text("b" * 40 + "\n")
    live = LiveSettings()
    assert live.get().required("audit_key") == ["b" * 40]
    _replace(credential, "c" * 40)
    limit = time.monotonic() + 30
    while live.get().required("audit_key") != ["c" * 40]:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_broken_new_credential_keeps_the_last_good_one_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("QUERN_AUDIT_KEY")
    directory = tmp_path / "credentials"
    directory.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    (directory / "quern_audit_key").write_text("b" * 40)
    live = LiveSettings()
    _replace(directory / "quern_audit_key", SECRET)
    limit = time.monotonic() + 30
    while not caplog.records:
        assert live.get().required("audit_key") == ["b" * 40]
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert "QUERN_AUDIT_KEY" in caplog.text
    assert SECRET not in caplog.text
