"""Preparation by several processes."""

import datasets
import pytest
from corpus_fixtures import casme2_row, make_casme2

from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.errors import UserError

pytestmark = pytest.mark.launch


def test_workers_write_what_one_process_writes(tmp_path):
    steps = []
    # One clip per shard, so that there is work for two.
    many = make_casme2(tmp_path / "many", [casme2_row(1, f"EP{clip:02d}_01", 9, 10, 12, 4) for clip in range(17)])
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare(
            "casme2",
            many,
            out,
            PrepareOptions(size=16, num_workers=workers),
            progress=lambda done, total: steps.append(done),
        )
    one, two = (datasets.load_from_disk(str(tmp_path / f"out{workers}")) for workers in (1, 2))
    assert one[:] == two[:]
    assert steps[-1] == 17
    (many / "CASME2_RAW_selected" / "sub01" / "EP16_01" / "img10.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="EP16_01.*img10.jpg"):
        prepare("casme2", many, tmp_path / "out3", PrepareOptions(size=16, num_workers=2))
    assert not list(tmp_path.glob("out3*"))
