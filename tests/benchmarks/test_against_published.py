"""Bytes that autograd saves, against the published implementations': exact on any machine."""

import pytest

from benchmarks.against_published import PUBLISHED, saved_mb


@pytest.mark.parametrize(
    ("name", "share"), [("hrvit_b1", 0.71), ("hrvit_b2", 0.70), ("hrformer_tiny", 0.60), ("hivit_tiny", 0.65)]
)
def test_saved_bytes(name, share):
    assert saved_mb(name, 224) <= share * PUBLISHED[name].saved_mb[224]
