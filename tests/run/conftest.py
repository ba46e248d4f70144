"""The order of the files of runs: those that take longest come first, so that two processes end together."""

LONGEST = (
    "test_demo", "test_engines", "test_kernel_aot", "test_faults", "test_fake_gpu", "test_backbone_types",
    "test_engine_faults", "test_folds_at_once", "test_training", "test_strategies", "test_sweep", "test_two_processes",
    "test_stopped_runs", "test_damaged_run", "test_predict", "test_release_folders",
)  # fmt: skip
"""Files of more than a minute or so, the longest first. A file that is missing here costs time, and nothing else."""


def pytest_collection_modifyitems(items: list) -> None:
    """Sort the items by file, the longest files first and the others in the order in which they were found."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
