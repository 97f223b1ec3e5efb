"""Training on a CPU without what only POSIX or Linux has.

Windows and macOS themselves are not tested: here the modules that they lack cannot be imported.
"""

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import signal, sys, warnings
# Other libraries know by the name of the system what they can import.
import transformers.models.llama.modeling_llama, accelerate, torch._dynamo, tqdm
for name in ("fcntl", "resource", "triton", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGKILL", "SIGHUP", "SIGXFSZ", "SIGALRM"):
    delattr(signal, name)

from minilora.training import FinetuneConfig, finetune, lock, progress
from minilora.training.callbacks import run_with, show_progress

assert lock.fcntl is None and progress.peak_memory() == 0
model, data, out = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    settings = dict(steps=2, batch_size=2, max_length=80, eval_fraction=0.0, device="cpu")
    result = finetune(FinetuneConfig(model, data, out, save_every=1, **settings))
assert len(result.history) == 2
# Neither fcntl nor msvcrt: on Windows there is the second.
assert any("cannot be locked" in str(w.message) for w in caught)
"""


def test_a_run_works_without_what_only_posix_has(folder: Path, data: Path, tmp_path: Path) -> None:
    arguments = [str(folder), str(data), str(tmp_path / "run")]
    command = [sys.executable, "-c", WITHOUT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
