"""write_agreement_png(): a picture of shares of equal ids, or what is wrong with them."""

import pytest

from tritonmoe.tools.report.png import write_agreement_png


def test_agreements_are_drawn(tmp_path):
    path = tmp_path / "agreement.png"
    write_agreement_png(path, {"bf16": {"a": 0.9, "b": 0.8}, "replayed": {"a": 1.0, "b": 1.0}})
    assert path.read_bytes()[:4] == b"\x89PNG"
    for nothing in ({}, {"bf16": {}}, {"bf16": {"a": 1.0}, "replayed": {"b": 1.0}}):
        with pytest.raises(ValueError, match="nothing to draw"):
            write_agreement_png(path, nothing)
