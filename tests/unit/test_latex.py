"""Tables in LaTeX: AUs are columns, as in papers of the field, and the numbers are those of the other formats."""

import re

import pytest
from test_evaluate import make_run

from aullm_dist.cli import main
from aullm_dist.evaluation.blocks import Block, render_blocks
from aullm_dist.evaluation.evaluate import evaluate_run
from aullm_dist.evaluation.tables import metric_blocks, render

PER_AU = Block(
    title=("Scores & more, 100% held out",),
    header=("AU", "n", "f1_macro", "floor", "auc", "floor", "step", "95% CI"),
    rows=(
        ("AU1 Inner Brow Raiser", "12", "90.2", "45.0", "99.1", "50.0", "+0.7", "83.3-97.5"),
        ("AU45 Blink", "0", "-", "44.9", "-", "50.0", "-0.2", "-1.0..+0.4"),
        ("mean of 2 AUs", "", "70.0", "44.9", "99.1", "50.0", "+0.3", ""),
    ),
    notes=("A note.",),
)


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of each tabular, as a reader of LaTeX finds them."""
    found = []
    for body in re.findall(r"\\begin\{tabular\}\{l(r*)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in body[1].splitlines() if line != r"\hline"]
        assert all(line.endswith(r" \\") for line in lines)
        cells = [re.split(r" & ", line.removesuffix(r" \\")) for line in lines]
        assert {len(row) for row in cells} == {1 + len(body[0])}
        found.append(cells)
    return found


def test_aus_are_columns_and_scores_are_rows():
    text = render_blocks([PER_AU], "latex")
    assert tables(text) == [
        [
            ["", "AU1", "AU45", "Avg."],
            ["n", "12", "0", ""],
            [r"f1\_macro", "90.2", "--", "70.0"],
            [r"f1\_macro floor", "45.0", "44.9", "44.9"],
            ["auc", "99.1", "--", "99.1"],
            ["auc floor", "50.0", "50.0", "50.0"],
            ["step", "$+0.7$", "$-0.2$", "$+0.3$"],
            [r"95\% CI", "83.3--97.5", "[$-1.0$, $+0.4$]", ""],
        ]
    ]
    assert text.startswith("% Scores & more, 100% held out\n")
    assert text.endswith("% A note.\n")


def test_other_tables_keep_their_rows():
    block = Block(("t",), ("stage", "f1_binary"), (("evidence", "91.5"), ("+ structure & more", "92.6")), ())
    assert tables(render_blocks([block], "latex")) == [
        [["stage", r"f1\_binary"], ["evidence", "91.5"], [r"+ structure \& more", "92.6"]]
    ]


@pytest.mark.parametrize("character", list("%_&#{}$\\~^"))
def test_no_character_of_latex_is_left_bare(character):
    (cell,) = tables(render_blocks([Block(("t",), (f"a{character}b",), (), ())], "latex"))[0][0]
    assert cell.startswith("a\\")
    assert cell.endswith("b")


def test_every_table_of_a_run_is_there(tmp_path):
    make_run(tmp_path)
    metrics = evaluate_run(tmp_path, bootstrap=20, leaky=True)
    found = tables(render(metrics, "latex"))
    assert len(found) == len(metric_blocks(metrics)) >= 4
    assert found[0][0] == ["", "AU1", "AU4", "AU12", "AU45", "Avg.", r"95\% CI"]
    assert [row[0] for row in found[0]][1:] == [
        "support", r"f1\_binary", r"f1\_binary floor", r"f1\_macro", r"f1\_macro floor", "auc", r"f1\_macro CI",
    ]  # fmt: skip
    assert found[0][2][-2] == f"{100 * metrics['mean']['f1_binary']:.1f}"


def test_the_commands_print_it(tmp_path, capsys):
    for name in ("one", "two"):
        make_run(tmp_path / name, seed=len(name))
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    for words in (["evaluate", runs[0]], ["evaluate", *runs], ["compare", *runs, "--bootstrap", "20"]):
        assert main([*words, "--format", "latex"]) == 0
        assert tables(capsys.readouterr().out)[0][0][:2] == ["", "AU1"]
