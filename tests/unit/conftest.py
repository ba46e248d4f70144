"""Shared by the tests of single modules."""

import pytest


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Steps 1 and 2 of one run; read only."""
    from checkpoint_samples import write_two

    return write_two(tmp_path_factory.mktemp("run") / "checkpoints")
