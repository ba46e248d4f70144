"""What a shell completes: asked of a real bash, which is told the words of a line and answers what it would offer."""

import shlex
import shutil
import subprocess

import pytest

from aullm_dist.cli import COMMANDS, main
from aullm_dist.commands.completion import SHELLS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch:
        for shell in SHELLS:
            with (folder / shell).open("w", encoding="utf-8") as stream:
                patch.setattr("sys.stdout", stream)
                assert main(["completion", shell]) == 0
    return folder


@pytest.fixture
def offered(scripts, tmp_path):
    def offered(*words: str) -> list[str]:
        (tmp_path / "my_run.yaml").touch()
        line = " ".join(map(shlex.quote, ("aullm-dist", *words)))
        asked = f"""
            compopt() {{ echo "compopt $*" >&2; }}
            source {scripts / "bash"}
            COMP_WORDS=({line}) COMP_CWORD={len(words)}
            _aullm_dist aullm-dist
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        found = subprocess.run(
            ["bash", "--norc", "-c", asked], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        offered.options = found.stderr
        return found.stdout.split()

    return offered


def test_every_command_is_offered(offered):
    assert set(offered("")) == set(COMMANDS)
    assert offered("eva") == ["evaluate"]
    assert offered("release", "") == ["verify", "split"]


def test_options_and_their_choices(offered):
    assert "--bootstrap" in offered("evaluate", "--")
    assert offered("evaluate", "--format", "l") == ["latex"]


@pytest.mark.parametrize("before", [["train"], ["train", "casme2_loso"], ["config"], ["plan", "casme2_loso"]])
def test_settings_are_offered_and_want_a_value(offered, before):
    assert offered(*before, "training.epo") == ["training.epochs="]
    assert "nospace" in offered.options


@pytest.mark.parametrize("command", ["train", "config", "plan", "requeue"])
def test_run_files_are_offered_shipped_ones_too(offered, command):
    assert offered(command, "casme2_l") == ["casme2_loso"]
    assert offered(command, "my_") == ["my_run.yaml"]


@pytest.mark.parametrize("words", [["evaluate"], ["report"], ["predict"], ["predict", "x"], ["merge", "--out"]])
def test_paths_are_offered(offered, words):
    assert offered(*words, "my_") == ["my_run.yaml"]


def test_zsh_reads_its_script(scripts):
    text = (scripts / "zsh").read_text()
    assert text.startswith("#compdef aullm-dist\n")
    assert "training.epochs=" in text
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n", str(scripts / "zsh")], check=True)
