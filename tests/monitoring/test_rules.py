"""The rules of the alerts, judged by Prometheus's own promtool: each fires when it must, and only then."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.waf.debian import unpacked

HERE = Path(__file__).parent
RULES = HERE.parents[1] / "roles/monitoring/files/etc/prometheus/rules/quern.yml"

#: Cases of minutes, and cases of hours and days, which are evaluated less often.
CASES = sorted(HERE.glob("*.test.yml"))


@pytest.fixture(scope="session")
def promtool() -> Path:
    return unpacked("prometheus", ["prometheus"]) / "usr/bin/promtool"


@pytest.fixture(scope="session")
def alerts() -> list[dict[str, Any]]:
    loaded = yaml.safe_load(RULES.read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def test_the_rules_are_sound(promtool: Path) -> None:
    checked = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_when_it_must_and_only_then(promtool: Path) -> None:
    checked = subprocess.run(
        [promtool, "test", "rules", *(path.name for path in CASES)],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_no_alert_is_untested(alerts: list[dict[str, Any]]) -> None:
    cases = [test for path in CASES for test in yaml.safe_load(path.read_text())["tests"]]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case["exp_alerts"]}
    silent = {case["alertname"] for test in cases for case in test["alert_rule_test"] if not case["exp_alerts"]}
    names = {alert["alert"] for alert in alerts}
    assert (names - fired, names - silent) == (set(), set())


def test_each_alert_says_what_to_run(alerts: list[dict[str, Any]]) -> None:
    lacking = [alert["alert"] for alert in alerts if set(alert["annotations"]) != {"summary", "run"}]
    assert lacking == []
