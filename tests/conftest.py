"""No test is skipped in silence: every skip is printed with its reason, and in CI only listed ones pass."""

import os
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


class SkipPolicy:
    """Collects skips and expected failures; with CI set, one that `allowed_skips.txt` does not list fails the run."""

    def __init__(self) -> None:
        self.skips: list[tuple[str, str]] = []

    def unlisted(self) -> list[str]:
        """The skipped tests that the list does not allow."""
        allowed = {line.strip() for line in ALLOWED_SKIPS.read_text().splitlines() if not line.startswith("#")}
        return [test for test, _ in self.skips if test not in allowed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test that was skipped, or that failed as expected."""
        if report.skipped:
            self.skips.append((report.nodeid, _reason(report)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file or class that was skipped whole."""
        if report.skipped:
            self.skips.append((report.nodeid, _reason(report)))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a CI run that skipped what it may not."""
        if os.environ.get("CI") and self.unlisted() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print every skip with its reason."""
        if not self.skips:
            return
        terminalreporter.section("skipped")
        for test, reason in self.skips:
            terminalreporter.line(f"{test}: {reason}")
        if os.environ.get("CI") and (unlisted := self.unlisted()):
            terminalreporter.line(f"CI is set, and {ALLOWED_SKIPS} does not list: {', '.join(unlisted)}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Register the policy."""
    config.pluginmanager.register(SkipPolicy(), "skip-policy")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if (expected := getattr(report, "wasxfail", None)) is not None:
        return f"expected to fail: {expected or 'no reason given'}"
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
