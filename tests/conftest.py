"""Fixtures that all tests share."""

from pathlib import Path

import pytest
from tests_support import CommandLine


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)
