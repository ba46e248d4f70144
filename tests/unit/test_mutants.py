"""Mutation testing's own choice: what is changed, what is left alone, and that a change is where it is said to be."""

from collections import Counter

from mutation.mutants import choose, is_another_program, mutants_of

SOURCE = '''"""A module of 3 lines."""

import math

LIMIT: int = 2


def share(count: int, total: float = 1.0, *, strict: bool = False) -> float:
    """Return 1 of 2."""
    assert total >= 0
    if count < LIMIT and not strict:
        raise ValueError(f"{count + 1} is less than 2")
    parts[count] = math.pow(count, total)
    return min(values[1:], key=abs) + count / total
'''


def _found(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    return mutants_of(tmp_path, "module.py")


def test_every_kind_of_change_is_found_where_it_is(tmp_path):
    found = {(mutant.line, mutant.kind, mutant.after) for mutant in _found(tmp_path)}
    assert found == {
        (5, "constant", "(3)"), (5, "constant", "(1)"), (8, "constant", "(2.0)"), (8, "constant", "(True)"),
        (11, "and/or", "(count < LIMIT or not strict)"), (11, "negation", "(not (count < LIMIT and (not strict)))"),
        (11, "comparison", "(count <= LIMIT)"), (11, "comparison", "(count >= LIMIT)"), (11, "negation", "(strict)"),
        (12, "statement dropped", "pass"), (13, "statement dropped", "pass"),
        (13, "arguments swapped", "(math.pow(total, count))"), (14, "return value", "return None"),
        (14, "arithmetic", "(min(values[1:], key=abs) - count / total)"), (14, "arithmetic", "(count * total)"),
        (14, "other function", "(max(values[1:], key=abs))"), (14, "keyword key dropped", "(min(values[1:]))"),
        (14, "slice", "(values[:])"), (14, "constant", "(2)"), (14, "constant", "(0)"),
    }  # fmt: skip


def test_a_change_is_one_place_of_a_program_that_compiles(tmp_path):
    for mutant in _found(tmp_path):
        changed = mutant.apply(SOURCE)
        assert is_another_program(tmp_path, mutant)
        assert changed.replace(mutant.after, "", 1) != SOURCE
        assert changed.splitlines()[: mutant.line - 1] == SOURCE.splitlines()[: mutant.line - 1]
        assert changed.splitlines()[mutant.line :] == SOURCE.splitlines()[mutant.line :]


def test_defaults_and_constants_run_at_import(tmp_path):
    assert Counter(mutant.line for mutant in _found(tmp_path) if not mutant.in_function) == {5: 2, 8: 2}


def test_the_draw_is_the_seeds_and_takes_each_line_once(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    drawn = [choose(tmp_path, ["module.py"], 5, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({mutant.line for mutant in drawn[0]}) == 5
    assert len(choose(tmp_path, ["module.py"], 100, 1)) == 6
