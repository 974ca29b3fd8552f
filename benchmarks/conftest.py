import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", help="write the measurements to this JSON file")
