"""The main job, of which one process is signalled, or finds a fault, in the n-th call of a function.

Started by test_folds_at_once. PROBE is `rank:what:call`, where `what` is one of WHERE or `fault`. Each process writes
what it knows of its passes into PROBE_FOLDER, where that is set.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "aullm_dist" / "train.py"


def main() -> None:
    from aullm_dist.distributed.rounds import Rounds
    from aullm_dist.errors import UserError
    from aullm_dist.training import heldout, step

    where = {
        "forward": (step.TrainStep, "forward"),
        "evaluation": (heldout, "evaluation_batches"),
        "idle": (Rounds, "finish"),
        "fault": (step.TrainStep, "fetch"),
    }
    rank, what, call = os.environ.get("PROBE", "-1:forward:0").split(":")
    place, name = where[what]
    original, calls = getattr(place, name), []

    def watched(*args, **kwargs):
        calls.append(name)
        if (os.environ["RANK"], str(len(calls))) == (rank, call):
            if what == "fault":
                raise UserError("a clip cannot be read")
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **kwargs)

    setattr(place, name, watched)
    close = Rounds.close

    def write_and_close(rounds: Rounds) -> None:
        folder = os.environ.get("PROBE_FOLDER")
        if folder:
            held = [p for p in rounds._model.reasoner.llm.parameters() if hasattr(p, "ds_id")]
            facts = {"passes": rounds.passes, "empty": rounds.empty}
            facts["whole"] = sum(p.numel() for p in held if not p.ds_persist)
            facts["divided"] = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in held)
            facts["in_all"] = sum(p.ds_numel * p.element_size() for p in held)
            Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(facts))
        close(rounds)

    Rounds.close = write_and_close
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")


main()
