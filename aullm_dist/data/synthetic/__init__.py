"""Synthetic corpora in the disk layouts of all seven corpora: a generator for tests and demos.

No claim about real faces is made from it: the faces are drawn, the movements are Gaussian pushes, and results on them
say whether the software works, never how well anything recognises a real micro-expression.

`write_corpus(SyntheticSpec(corpus="casme2"), root)` writes frames and annotation workbook as the ordinary
loaders read them.
"""

from aullm_dist.data.synthetic.labels import ClipPlan, Movement, plan_clips
from aullm_dist.data.synthetic.layouts import SPEC_FILE, write_corpus
from aullm_dist.data.synthetic.spec import CORPORA, DAMAGES, SHIFTS, SyntheticSpec

__all__ = [
    "CORPORA",
    "DAMAGES",
    "SHIFTS",
    "SPEC_FILE",
    "ClipPlan",
    "Movement",
    "SyntheticSpec",
    "plan_clips",
    "write_corpus",
]
