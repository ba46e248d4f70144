"""Reports runs: a page of tables and figures for a run, and the table of an ablation over many."""

from aullm_dist.quiet import hide_matplotlib_cache

hide_matplotlib_cache()
