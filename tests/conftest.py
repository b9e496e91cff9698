"""`--without-extension`: the tests run where the compiled player was not built."""

import sys
from types import ModuleType
from typing import cast

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-extension", action="store_true", help="as where ringred.native._player was not built")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-extension"):
        assert "ringred.native" not in sys.modules, "before anything imports it"
        sys.modules["ringred.native._player"] = cast(ModuleType, None)  # an import of it fails then
