"""What the tests of several benchmarks share."""

from collections.abc import Callable

import pytest


@pytest.fixture
def complaint_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return what a benchmark's main says of arguments that it refuses: outside of torchrun, or as this RANK of it."""

    def complaint(main: Callable[[list[str]], int], arguments: list[str], rank: str | None = None) -> str:
        if rank is None:
            monkeypatch.delenv("RANK", raising=False)
        else:
            monkeypatch.setenv("RANK", rank)
        try:
            status: object = main(arguments)
        except SystemExit as refused:  # argparse
            status = refused.code
        assert status == 2
        return capsys.readouterr().err

    return complaint
