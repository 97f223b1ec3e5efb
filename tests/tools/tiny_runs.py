"""Runs of a tiny model for the fuzz suite, in this process or in children that may be killed.

As a script it is a server: it loads the libraries once, forks a child for each task that it reads
from standard input, and answers with what became of it. The server itself never computes, because
a process with threads must not be forked.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 4
WORDS = ("yes", "no", "perhaps", "never")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "max_length": 80,
    "eval_fraction": 0.2,
    "steps": STEPS,
    "batch_size": 2,
    "dropout": 0.1,
    "r": 2,
    "targets": ["q_proj", "up_proj"],
    # Kernels would be compiled again in every child.
    "quantize": False,
    "eval_every": 2,
    "save_every": 1,
}


@functools.cache
def inputs() -> tuple[Path, Path]:
    """A folder with a tiny model, and a file of examples; removed when the process ends."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = Path(tempfile.mkdtemp(prefix="minilora-tiny-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(path, ignore_errors=True))

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "model")

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, **heads, **ids, vocab_size=258, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(path / "model")

    lines = [{"prompt": f"say {word}", "completion": word.upper()} for word in WORDS * 3]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path / "model", path / "data.jsonl"


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run of a few steps, with a checkpoint after each."""
    model, data = inputs()
    paths = {"model": str(model), "data": str(data), "out": str(out)}
    return {**paths, **SETTINGS, **changes}


def result(out: Path) -> Any:
    """What a finished run has left: its metrics without seconds, and its adapter."""
    from minilora.files.tensors import read_tensors

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    tensors, _ = read_tensors(out / "adapter_model.safetensors")
    return steps, {key: tensor.tolist() for key, tensor in sorted(tensors.items())}


class Server:
    """A process that forks a child for each task; see `work` for what a task may be."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        atexit.register(self.process.kill)

    def run(self, *tasks: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """Runs tasks at the same time; returns (exit code or minus the signal, what it said)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(tasks) + "\n")
        self.process.stdin.flush()
        return [(code, said) for code, said in json.loads(self.process.stdout.readline())]


@functools.cache
def server() -> Server:
    return Server()


def import_everything() -> None:
    """What each child would import, and then search for garbage."""
    import accelerate
    import torch._dynamo
    import tqdm
    import transformers.models.llama.modeling_llama

    import minilora.cli
    import minilora.kernels.cpu.attention
    import minilora.kernels.cpu.dense
    import minilora.kernels.cpu.rms_norm
    import minilora.kernels.cpu.rotary
    import minilora.kernels.cpu.softmax
    import minilora.kernels.cpu.swiglu
    import minilora.training  # noqa: F401

    del accelerate, torch, tqdm, transformers
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "tensorboard.summary"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()


def serve() -> None:
    import_everything()
    for line in sys.stdin:
        children = [start(task) for task in json.loads(line)]
        print(json.dumps([finish(*child) for child in children]), flush=True)


def start(task: dict[str, Any]) -> tuple[int, int, float | None, int]:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os._exit(child(task, tell))
    os.close(tell)
    return pid, ready, task.get("after"), task.get("signal", 0)


def finish(pid: int, ready: int, after: float | None, number: int) -> tuple[int, dict[str, Any]]:
    if after is not None:
        time.sleep(after)
        os.kill(pid, number)
    said = b""
    while part := os.read(ready, 1 << 16):
        said += part
    os.close(ready)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, json.loads(said) if said else {}


def child(task: dict[str, Any], tell: int) -> int:
    said: dict[str, Any] = {}
    code = 0
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        time.sleep(task.get("delay", 0))
        calls = watch(task)
        work(task)
        said["calls"] = calls[0]
    except KeyboardInterrupt as error:
        code = 128 + getattr(error, "signal", signal.SIGINT)
    except BaseException as error:
        code, said = 1, {"error": type(error).__name__, "message": str(error)}
        said["os"] = isinstance(error, OSError)
    os.write(tell, json.dumps(said).encode())
    return code


# A rename over a name that is there needs no space.
WRITES = {"os.mkdir"}
CALLS = {*WRITES, "os.rename", "open", "os.remove", "os.rmdir", "os.truncate"}


def watch(task: dict[str, Any]) -> list[int]:
    """Counts the calls of the file system in the task's folder; at the n-th a signal arrives.

    With "full" instead of "signal" the calls that write fail from there on, or that one alone.
    """
    calls = [0]
    base, at, number = task["base"], task.get("call"), task.get("signal")
    if limit := task.get("limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def count(event: str, path: object, writes: bool) -> None:
        # What has no name of its own, as the names within a folder that is open, counts too.
        if isinstance(path, str) and path.startswith("/") and not path.startswith(base):
            return
        if task.get("full") and not writes:
            return
        calls[0] += 1
        if at is None or calls[0] < at or (calls[0] > at and task.get("full") != "from"):
            return
        if task.get("full"):
            raise OSError(28, "No space left on device", path)
        os.kill(os.getpid(), number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS:
            path = arguments[0]
            path = os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else path
            opened = event == "open" and isinstance(arguments[2], int)
            made = opened and bool(arguments[2] & (os.O_CREAT | os.O_WRONLY))
            count(event, path, event in WRITES or made)

    fsync = os.fsync

    def counted(handle: int) -> None:
        count("fsync", None, True)
        fsync(handle)

    os.fsync = counted
    sys.addaudithook(hook)
    return calls


def work(task: dict[str, Any]) -> None:
    """Does a task: a run, a merge on the command line, or a saved adapter."""
    if task["do"] == "finetune":
        from minilora.training import FinetuneConfig, finetune

        finetune(FinetuneConfig(**task["settings"]))
    elif task["do"] == "merge":
        from minilora.cli import app

        app(["merge", *task["arguments"]], standalone_mode=False)
    else:
        save_one(Path(task["folder"]), task["seed"])


def save_one(folder: Path, seed: int) -> None:
    """Saves an adapter that depends on the seed."""
    import torch

    import minilora

    torch.manual_seed(seed)
    model = minilora.inject(torch.nn.Sequential(torch.nn.Linear(16, 8)), r=2 + seed, seed=seed)
    for parameter in minilora.adapter_parameters(model):
        with torch.no_grad():
            parameter.normal_()
    minilora.save_adapter(model, folder)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
