"""kill -9, SIGTERM and Ctrl-C, in processes of their own.

What is left on the disk, what is printed, and that the run can be resumed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import tiny_runs
tiny_runs.import_everything()
import json, os, random, select, shutil, signal, sys, time
from pathlib import Path
import torch, minilora
from minilora.files.tensors import read_tensors
from minilora.training import FinetuneConfig, checkpoint_manager, finetune, loop
from minilora.training.callbacks import to_jsonl
from minilora.training.checkpoints import list_checkpoints, newest_checkpoint, save_checkpoint
from minilora.training.loop import Step
from minilora.training.restoring import restore_checkpoint
from minilora.training.run_state import RunState, read_run


# The parent never loads a model: a process with a pool of threads must not be forked.
def forked(work):
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            work()
        except SystemExit as left:
            code = left.code or 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 99
        sys.stderr.flush()
        os._exit(code)
    return pid


def adapter_hash(folder):
    return read_tensors(folder / "adapter_model.safetensors")[1]["contents_sha256"]


# The exit code, or minus the number of the signal that ended it.
def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

# A child dies at its n-th call of the file system, for every n, while it saves the checkpoint of
# step 3 and removes that of step 1.
EVERY_CALL = """
from torch import nn

folder, calls, die_at = Path(sys.argv[1]), 0, None
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fsync"}


def count(event, arguments):
    global calls
    if die_at is not None and event in EVENTS:
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(count)
# The only one of the calls that has no audit event.
fsync = os.fsync
os.fsync = lambda handle: (count("fsync", ()), fsync(handle))[1]


def fresh():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    minilora.inject(model, r=8, dropout=0.5)
    return model, torch.optim.AdamW(minilora.adapter_parameters(model), lr=1e-2)


def step(model, optimizer):
    model(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(model, optimizer, steps):
    history = [Step(**dict.fromkeys(Step.__dataclass_fields__, i + 1)) for i in range(steps)]
    (folder / "metrics.jsonl").write_text(to_jsonl(history))
    best = [p.detach().clone() for p in minilora.adapter_parameters(model)]
    save_checkpoint(folder, RunState({}, history=history), model, optimizer, keep=2, best=best)


def bits(model, optimizer):
    state = optimizer.state_dict()["state"]
    moments = [s[name] for s in state.values() for name in sorted(s)]
    everything = [*model.state_dict().values(), *moments, torch.get_rng_state()]
    return [t.clone() for t in everything]


folder.mkdir()
model, optimizer = fresh()
expected = []
for steps in (1, 2, 3):
    step(model, optimizer)
    expected.append(bits(model, optimizer))
    if steps < 3:
        save(model, optimizer, steps)
step(model, optimizer)
after = bits(model, optimizer)
start = shutil.copytree(folder, str(folder) + "-start")


def third():
    model, optimizer = fresh()
    path = folder / "checkpoints" / "step-00000002"
    restore_checkpoint(path, read_run(path, folder), model, optimizer)
    step(model, optimizer)
    globals()["die_at"] = n
    save(model, optimizer, 3)


killed, n = [], 0
while True:
    n += 1
    shutil.rmtree(folder)
    shutil.copytree(start, folder)
    code = status(forked(third))
    # A warning would be an error: no checkpoint that is there is damaged.
    path = newest_checkpoint(folder)
    run = read_run(path, folder)
    reached = len(run.history)
    model, optimizer = fresh()
    restore_checkpoint(path, run, model, optimizer)
    assert all(map(torch.equal, bits(model, optimizer), expected[reached - 1]))
    while reached < 4:
        step(model, optimizer)
        reached += 1
        if reached == 3:
            # Over what the kill left.
            save(model, optimizer, 3)
    assert all(map(torch.equal, bits(model, optimizer), after))
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    if code == 0:
        assert left == ["step-00000002", "step-00000003"], left
        break
    assert code == -signal.SIGKILL, code
    killed.append(path.name)
print(json.dumps(killed))
"""

# A whole run in a child, killed at a random time within a random save; then another child resumes
# it to its end.
RANDOM = """
model, data, base, kills = *sys.argv[1:3], Path(sys.argv[3]), int(sys.argv[4])
random, STEPS = random.Random(0), 6


def config(out, resuming):
    settings = dict(lr=1e-2, steps=STEPS, batch_size=2, dropout=0.1, r=4, max_length=80)
    settings |= dict(quantize=False, save_every=1, resume=resuming)
    return FinetuneConfig(model, data, str(base / out), **settings)


def train(out, tell=None, resuming=False):
    save, fsync = checkpoint_manager.save_checkpoint, os.fsync

    # A slow disk, so that kills hit every part of a save.
    def slow(handle):
        time.sleep(0.002)
        fsync(handle)

    def told(*arguments):
        os.write(tell, b"(")
        path = save(*arguments)
        os.write(tell, b")")
        return path

    def work():
        if tell is not None:
            os.fsync, checkpoint_manager.save_checkpoint = slow, told
        finetune(config(out, resuming))

    return work


def result(out):
    lines = [json.loads(line) for line in (base / out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), lines
    return [line["loss"] for line in lines], adapter_hash(base / out)


def killed_in(which, after, out):
    # Kills a run this many seconds into a save; returns what it told: "(" for each save that was
    # begun, ")" for each that was finished.
    ready, tell = os.pipe()
    pid = forked(train(out, tell))
    os.close(tell)
    told = b""
    while told.count(b"(") < which:
        told += os.read(ready, 1)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    assert status(pid) == -signal.SIGKILL
    told += os.read(ready, 100)
    os.close(ready)
    return told


assert status(forked(train("whole"))) == 0
expected = result("whole")
hits, tries = 0, 0
while hits < kills:
    tries += 1
    assert tries < 10 * kills, "the kills miss the saves"
    told = killed_in(which := random.randint(2, STEPS), random.uniform(0, 0.04), "run")
    hits += told.endswith(b"(")
    assert newest_checkpoint(base / "run").name in (f"step-{which - 1:08}", f"step-{which:08}")
    assert status(forked(train("run", resuming=True))) == 0
    assert result("run") == expected, "not the same bits"
    shutil.rmtree(base / "run")
print(json.dumps({"hits": hits, "tries": tries}))
"""

# The command line in a child, which tells when it is in its third step and waits there for the
# signal.
SIGNALS = """
from minilora.cli import main

model, data, base = sys.argv[1:4]


def command(out, *more, tell=None, go=None):
    def work():
        original, calls = loop.token_losses, [0]

        def token_losses(model, batch):
            calls[0] += model.training
            if model.training and calls[0] == 3 and tell is not None:
                os.write(tell, b".")
                select.select([go], [], [], 60)
            return original(model, batch)

        loop.token_losses = token_losses
        sys.stderr = open(f"{base}/{out}.err", "a")
        paths = ["--model", model, "--data", data, "--out", f"{base}/{out}"]
        sys.argv = ["minilora", "finetune", *paths, *more, "--no-quantize"]
        sys.argv += "--steps 5 --lr 0.01 --batch-size 2 --max-length 80 --dropout 0.1".split()
        main()

    return forked(work)


def result(out):
    lines = [json.loads(line) for line in Path(base, out, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    return [line["loss"] for line in lines], adapter_hash(Path(base, out))


def stopped(out, *signals):
    (ready, tell), (go, release) = os.pipe(), os.pipe()
    pid = command(out, "--save-every", "2", tell=tell, go=go)
    assert os.read(ready, 1) == b"."
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.2)
    os.write(release, b".")
    return status(pid)


assert status(command("whole")) == 0
found = {}
cases = {"term": [signal.SIGTERM], "int": [signal.SIGINT], "twice": 2 * [signal.SIGINT]}
for name, signals in cases.items():
    code = stopped(name, *signals)
    left = [p.name for p in list_checkpoints(Path(base, name))]
    assert status(command(name, "--resume")) == 0
    assert result(name) == result("whole"), "not the same bits"
    found[name] = [code, left]
print(json.dumps(found))
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:minilora", "-c", START + code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_kill_at_any_call_of_the_file_system_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    killed = json.loads(python(EVERY_CALL, str(tmp_path / "run")))

    # The rename: the checkpoint before stands until then, and the new one from then on.
    switch = killed.index("step-00000003")
    assert 20 < switch < len(killed) - 8
    assert set(killed[:switch]) == {"step-00000002"} and set(killed[switch:]) == {"step-00000003"}


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.soak)])
def test_a_kill_while_saving_leaves_a_whole_checkpoint_and_the_resumed_run_is_the_same(
    kills: int, folder: Path, data: Path, tmp_path: Path
) -> None:
    found = json.loads(python(RANDOM, str(folder), str(data), str(tmp_path), str(kills)))
    assert found["hits"] == kills


def test_a_signal_stops_the_command_with_its_exit_code_and_the_way_to_go_on(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    found = json.loads(python(SIGNALS, str(folder), str(data), str(tmp_path)))
    both = ["step-00000002", "step-00000003"]
    assert found == {"term": [143, both], "int": [130, both], "twice": [130, ["step-00000002"]]}
    for name, number in (("term", "SIGTERM"), ("int", "SIGINT")):
        said = (tmp_path / f"{name}.err").read_text()
        checkpoint = tmp_path / name / "checkpoints" / "step-00000003"
        assert f"minilora: stopped by {number} after step 3; the checkpoint is {checkpoint}" in said
        assert "--resume" in said and "Traceback" not in said
