"""Generates synthetic corpora in the disk layouts of the corpora, for tests and demos.

No claim about real faces is made from it: the faces are drawn, the movements are Gaussian pushes, and results on them
say whether the software works, never how well anything recognises a real micro-expression.

`write_corpus(SyntheticSpec(corpus="casme2"), root)` writes frames and annotation workbook as the ordinary
loaders read them.
"""

from aullm_dist.data.corpora.drawn import ClipPlan, Movement
from aullm_dist.data.records import SPEC_FILE
from aullm_dist.data.synthetic.labels import plan_clips
from aullm_dist.data.synthetic.layouts import write_corpus
from aullm_dist.data.synthetic.spec import DAMAGES, SHIFTS, SyntheticSpec

__all__ = [
    "DAMAGES",
    "SHIFTS",
    "SPEC_FILE",
    "ClipPlan",
    "Movement",
    "SyntheticSpec",
    "plan_clips",
    "write_corpus",
]
