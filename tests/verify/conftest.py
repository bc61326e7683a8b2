"""Say how much of the agreement matrix was run."""

from __future__ import annotations

import pytest

from meshwright.verify.agreement import all_cases, covering_cases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line below the results, where agreement cases ran."""
    ran = [r for r in terminalreporter.stats.get("passed", []) if "test_formula_rehearsal_and_run_agree" in r.nodeid]
    if ran:
        terminalreporter.write_line(
            f"agreement: {len(ran)} of {len(all_cases())} cases agree in formula, rehearsal and run; "
            f"{len(covering_cases())} already hold every pair of option values"
        )
