"""A pytest plugin: a test that breaks a contract of `graph_capture.testing` shows the receipts in a section of its own.

It lies outside the package, so that pytest does not import torch for tests that have nothing to do with it.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Add what rules have refused, and why."""
    outcome = yield
    error = call.excinfo.value if call.excinfo is not None else None
    receipts = getattr(error, "graph_capture_receipts", "")
    if receipts:
        outcome.get_result().sections.append(("graph_capture: near misses", receipts))
