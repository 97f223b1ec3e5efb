"""A long run with many checkpoints: the memory stays, and what is written grows with the steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LONG = """
import json, os, sys
from pathlib import Path
from minilora.training import FinetuneConfig, checkpoint_manager, finetune

model, data, out, steps = *sys.argv[1:4], int(sys.argv[4])
held, sizes = [], []
save = checkpoint_manager.save_checkpoint


def measured(*arguments):
    path = save(*arguments)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held.append(pages * os.sysconf("SC_PAGE_SIZE"))
    sizes.append(sum(file.stat().st_size for file in path.iterdir()))
    return path


checkpoint_manager.save_checkpoint = measured
settings = dict(steps=steps, batch_size=2, max_length=80, eval_fraction=0.0, quantize=False, r=2)
finetune(FinetuneConfig(model, data, out, save_every=10, **settings))
lines = Path(out, "metrics.jsonl").read_bytes().splitlines()
print(json.dumps({"held": held, "sizes": sizes, "lines": [len(line) for line in lines]}))
"""


@pytest.mark.soak
def test_two_thousand_steps_take_no_more_memory_than_five_hundred(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [str(folder), str(data), str(tmp_path / "run"), "2000"]
    command = [sys.executable, "-c", LONG, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    # One checkpoint in ten steps.
    after_500, last = found["held"][50], found["held"][-1]
    assert last < 1.01 * after_500, (after_500, last)
    # The digits of the number of steps and of numbers that Python writes as short as it can.
    assert max(found["sizes"]) - min(found["sizes"]) < 200
    assert len(found["lines"]) == 2000 and max(found["lines"]) < 250
