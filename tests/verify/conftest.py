"""Say how much of the agreement matrix was run."""

from __future__ import annotations

import pytest

from meshwright.verify.matrix import all_cases, all_long_cases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line below the results, where agreement cases ran."""
    ran = [r for r in terminalreporter.stats.get("passed", []) if "test_formula_rehearsal_and_run_agree" in r.nodeid]
    if ran:
        total = len(all_cases()) + len(all_long_cases())
        terminalreporter.write_line(f"agreement: {len(ran)} of {total} cases agree in formula, rehearsal and run")
