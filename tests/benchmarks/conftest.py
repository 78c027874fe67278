"""What the tests of several benchmarks share."""

from collections.abc import Callable

import pytest


@pytest.fixture
def complaint_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[list[str]], int], list[str]], str]:
    """Give what a benchmark's main says of arguments that it refuses, outside of torchrun."""

    def complaint(main: Callable[[list[str]], int], arguments: list[str]) -> str:
        monkeypatch.delenv("RANK", raising=False)
        try:
            status: object = main(arguments)
        except SystemExit as refused:  # argparse
            status = refused.code
        assert status == 2
        return capsys.readouterr().err

    return complaint
