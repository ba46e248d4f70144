"""What runs look like: a page of tables and figures for a run, and the table of an ablation over many."""
