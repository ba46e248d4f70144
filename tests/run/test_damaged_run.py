"""A finished run whose files are damaged, missing or refused by the system: every command works or says which, once."""

import builtins
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from training_runs import overrides, train_here

from aullm_dist.cli import main
from aullm_dist.config import load_recorded
from aullm_dist.errors import UserError
from aullm_dist.evaluation.evaluate import score_run
from aullm_dist.evaluation.summary import print_summary, zeroed_scores

pytestmark = pytest.mark.launch

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "object": lambda _: b"{}\n",
    "null": lambda _: b"null\n",
    "binary": lambda _: b"\xff\xfe\x00",
}
TEXTS = (".json", ".jsonl", ".yaml")
COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "evaluate": lambda run, _: ["evaluate", run, "--bootstrap", "5"],
    "leaky": lambda run, _: ["evaluate", run, "--leaky", "--bootstrap", "5"],
    "seeds": lambda run, _: ["evaluate", run, run],
    "compare": lambda run, _: ["compare", run / "baselines" / "led_cnn", run, "--bootstrap", "5"],
    "ablation": lambda run, _: ["report", "ablation", run, run / "baselines" / "led_cnn", "--bootstrap", "5"],
    "verify": lambda run, _: ["checkpoint", "verify", run],
    "config": lambda run, _: ["config", run / "config.yaml"],
    "merge": lambda run, out: ["merge", run / "fold-00", "--format", "llm", "--out", out],
}


@pytest.fixture(scope="module")
def settings(small_dataset, tiny_llm, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    return overrides(small_dataset, tiny_llm, folder, training__max_steps=2, training__baseline=True)


@pytest.fixture(scope="module")
def finished(settings) -> Path:
    assert train_here(*settings) == 0
    return next(Path(text.partition("=")[2]) for text in settings if text.startswith("training.output="))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@contextmanager
def opened(below: Path, refused: tuple[str, str] | None = None, code: int = errno.EACCES) -> Iterator[list]:
    """Note what is opened, made and renamed below a folder, and how; refuse one path to be used in one way."""
    seen: list[tuple[str, str]] = []

    def watched(original, name):
        def call(path, *args, **options):
            if isinstance(path, str | os.PathLike) and Path(os.path.abspath(path)).is_relative_to(below):
                way = str(args[0] if args else options.get("mode", "r")) if name == "open" else name
                seen.append((os.path.abspath(path), way))
                if refused == seen[-1]:
                    raise OSError(code, os.strerror(code), os.fspath(path))
            return original(path, *args, **options)

        return call

    places = [(builtins, "open"), (io, "open"), *((os, name) for name in ("open", "mkdir", "rename", "replace"))]
    originals = [getattr(module, name) for module, name in places]
    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, watched(original, name))
    try:
        yield seen
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def told(command: str, run: Path, out: Path, capsys) -> tuple[int, str]:
    """Run a command and return its exit code and what it printed; any exception fails the test."""
    if out.exists():
        shutil.rmtree(out)
    shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
    code = main([*map(str, COMMANDS[command](run, out))])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if "error:" in line]
    assert code in (0, 1, 2), said
    assert len(errors) == (code == 2), said.err
    assert "Traceback" not in said.err
    return code, said.err + said.out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_half_written_file_is_named_by_every_command_that_reads_it(command, run, tmp_path, capsys):
    out = tmp_path / "out"
    with opened(run) as seen:
        told(command, run, out, capsys)
    texts = [path for path in dict.fromkeys(Path(path) for path, _ in seen) if path.suffix in TEXTS and path.is_file()]
    texts = [path for path in texts if path.name != "metrics.json"]  # it is written
    assert texts
    for path in texts:
        whole = path.read_bytes()
        for kind, damage in DAMAGE.items():
            path.write_bytes(damage(whole))
            code, said = told(command, run, out, capsys)
            # A run file of the user's own may be empty, and then holds the defaults.
            is_users = command == "config" and kind in ("empty", "object", "null")
            assert path.name in said or is_users, f"{path}, {kind}: exit code {code}, and nothing said of it: {said}"
        path.unlink()
        path.mkdir()
        assert path.name in told(command, run, out, capsys)[1], f"{path}: a folder in its place"
        path.rmdir()
        path.write_bytes(whole)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_system_refuses_is_one_line_and_nothing_is_lost(command, run, tmp_path, capsys):
    out = tmp_path / "out"
    with opened(tmp_path) as seen:
        told(command, run, out, capsys)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for path, way in dict.fromkeys(seen):
        code = errno.ENOSPC if set(way) & set("wxa") else errno.EACCES
        with opened(tmp_path, (path, way), code) as _:
            exit_code, said = told(command, run, out, capsys)
        if exit_code:
            assert os.strerror(code) in said, f"{path} ({way}): {said}"
        assert {path: path.read_bytes() for path in before if path.is_file()} == before


@pytest.mark.parametrize("work", ["report", "predict", "resume", "replace"])
def test_work_that_takes_longer_is_refused_in_one_line_too(work, run, settings, small_dataset, tmp_path, capsys):
    """A few of the writes alone: each takes seconds."""
    moved = [text for text in settings if not text.startswith(("training.output=", "training.baseline="))]
    moved += [f"training.output={run}", "training.baseline=false"]
    if work in ("resume", "replace"):
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("baseline: true", "baseline: false"))
        shutil.rmtree(run / "baselines")
    whole = shutil.copytree(run, tmp_path / "whole")

    def attempt() -> int:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if work == "report":
            return main(["report", str(run), "--no-model", "--bootstrap", "0", "--out", str(tmp_path / "out" / "page")])
        if work == "predict":
            return main(
                ["predict", str(run / "fold-00"), str(small_dataset), "--out", str(tmp_path / "out" / "answers")]
            )
        return train_here(*(["--resume", "auto"] if work == "resume" else ["--replace"]), *moved)

    with opened(tmp_path) as seen:
        assert attempt() == 0, capsys.readouterr().err
    writes = [use for use in dict.fromkeys(seen) if not use[1].startswith("r") or use[1] in ("rename", "replace")]
    assert writes
    for use in writes[:: max(1, len(writes) // 4)]:
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        capsys.readouterr()
        with opened(tmp_path, use, errno.ENOSPC) as _:
            code = attempt()
        said = capsys.readouterr().err
        assert "Traceback" not in said, use
        if code:
            (line,) = [line for line in said.splitlines() if "error:" in line]
            assert os.strerror(errno.ENOSPC) in line, use
        if work != "replace":  # which has removed what it replaces
            lost = [path for path in whole.rglob("*.safetensors") if not (run / path.relative_to(whole)).exists()]
            assert not lost, use


def other_aus(whole: bytes) -> bytes:
    """Return predictions of one AU less."""
    header, *rows = [json.loads(line) for line in whole.splitlines()]
    header["aus"] = header["aus"][1:]
    for row in rows:
        row["labels"], row["logits"] = row["labels"][1:], row["logits"][1:]
    return "\n".join(map(json.dumps, (header, *rows))).encode()


def fewer_clips(whole: bytes) -> bytes:
    return b"\n".join(line for number, line in enumerate(whole.splitlines()) if number != 1)


@pytest.mark.parametrize(
    "damage", [*DAMAGE.values(), other_aus, fewer_clips], ids=[*DAMAGE, "other-aus", "fewer-clips"]
)
def test_answers_without_tokens_and_of_stages_are_checked_as_the_final_ones(damage, run):
    readers = {"zeroed": zeroed_scores, "stages": lambda path: score_run(path, bootstrap=0)}
    for folder, read in readers.items():
        files = sorted((run / "fold-00" / folder).iterdir())
        assert len(files) == 2
        for path in files:
            whole = path.read_bytes()
            path.write_bytes(damage(whole))
            with pytest.raises(UserError, match=f"{folder}/{path.name}"):
                read(run)
            path.write_bytes(whole)


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{"), Path.unlink], ids=["half", "missing"])
def test_a_report_names_all_that_is_odd_and_shows_the_rest(damage, run, tmp_path, capsys):
    odd = ["baselines/led_cnn/folds.json", "fold-00/zeroed/content.jsonl"]
    for name in odd[: 1 if damage is Path.unlink else 2]:  # runs of earlier versions have no zeroed answers
        damage(run / name)
    assert main(["report", str(run), "--out", str(tmp_path / "page"), "--bootstrap", "0", "--no-model"]) == 0
    said = capsys.readouterr().err
    assert odd[0] in said
    assert (odd[1] in said) == (damage is not Path.unlink)


def test_a_damaged_baseline_takes_nothing_from_the_summary_of_its_run(run, capsys, caplog):
    (run / "baselines" / "led_cnn" / "folds.json").write_text("{")
    print_summary(run, load_recorded(run / "config.yaml"))
    assert "floor: never predicting an AU" in capsys.readouterr().out
    assert "no-LLM baseline (led_cnn) cannot be scored" in caplog.text


@pytest.mark.parametrize("name", ["environment.json", "folds.json", "config.yaml"])
def test_a_run_is_not_resumed_on_half_written_records(finished, settings, name, capsys):
    path = finished / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        assert train_here("--resume", "auto", *settings) == 2
    finally:
        path.write_bytes(whole)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert name in line


def test_a_run_that_was_moved_finds_its_llm_and_is_resumed(finished, settings, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    moved = [text for text in settings if not text.startswith("training.output=")]
    assert train_here("--resume", "auto", *moved, "training.output=elsewhere") == 0
    assert "resumed from" in capsys.readouterr().err
    config = (tmp_path / "elsewhere" / "config.yaml").read_text()
    assert f"output: {tmp_path / 'elsewhere'}" in config, "records hold full paths"


def test_a_report_with_a_baseline_whose_model_cannot_be_loaded_says_so(run, tmp_path, capsys):
    for file in (run / "fold-00" / "checkpoints").rglob("adapter_config.json"):
        file.write_text("{")
    assert main(["report", str(run), "--out", str(tmp_path / "page"), "--bootstrap", "5", "--clips", "0"]) == 0
    assert "missing: run: " in capsys.readouterr().err
