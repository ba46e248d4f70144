"""Commands that are printed for the user to type: what is inserted into them is quoted for a shell."""

import ast
import re
from pathlib import Path

import pytest
from corpus_fixtures import make_casme2

from aullm_dist.cli import main
from aullm_dist.errors import UserError

PACKAGE = Path(__file__).resolve().parents[2] / "aullm_dist"
COMMAND = re.compile(r"(aullm-dist [a-z]+|tensorboard --logdir|accelerate launch|python) [^\n]*$|data\.[a-z_]+=$")
# Words of ours, which need no quotes.
PLAIN = {"args.corpus", "__version__", "training.processes"}


def unquoted(path: Path) -> list[str]:
    """Return what the f-strings of a file insert into a command as it is."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        before = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                before += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                text = ast.unparse(part.value)
                if COMMAND.search(before) and not text.startswith("quote(") and text not in PLAIN:
                    found.append(f"{path.name}:{node.lineno} {text}")
                before += "X"
    return found


def test_what_is_inserted_into_a_command_is_quoted():
    # `quote(f'data.folds_file={path}')` quotes the whole word.
    found = [each for path in sorted(PACKAGE.rglob("*.py")) for each in unquoted(path)]
    assert [each for each in found if not each.startswith("folds.py")] == []


def test_the_next_line_of_a_folder_with_blanks_can_be_typed(tmp_path, capsys):
    out = tmp_path / "my corpus"
    assert main(["synthesize", "casme2", "--out", str(out), "--subjects", "1", "--clips", "1"]) == 0
    assert f"Next: aullm-dist prepare casme2 --root '{out}' --out DIR" in capsys.readouterr().out


def test_a_refusal_is_one_line_whatever_a_file_is_called(tmp_path, capsys):
    root = make_casme2(tmp_path / "two\nlines")
    (root / "CASME2-coding-20190701.xlsx").write_bytes(b"")
    assert main(["prepare", "casme2", "--root", str(root), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "two\\nlines" in line
    assert str(UserError("a\nb\rc")) == "a\\nb\\rc"


def test_a_name_that_is_too_long_is_told(tmp_path, capsys):
    assert main(["prepare", "casme2", "--root", "x" * 300, "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["~no_such_user_here/x", "a\0b", ""])
def test_an_argument_that_is_no_path_is_told_as_argparse_tells_it(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as left:
        main(["prepare", "casme2", "--root", name, "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "--root: " in line
