"""Code planted in a model's folder: none of it may run, whoever answers "y" on standard input.

Each case plants code in one of PLACES and gives the folder to one of COMMANDS, in a process of its
own whose standard input says "y" for ever. The code writes a marker file. The command either does
what it does without the code, or refuses the folder by name.
"""

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_folder
from fuzzing import REFUSED, SAME, Wrong

SECONDS = 60

MARKER = "planted-code-ran"

# Written at import, at a call, or when it is unpickled.
CODE = f"""
import pathlib, sys
pathlib.Path({{root!r}}, {MARKER!r}).write_text(" ".join(sys.argv))
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class PlantedConfig(LlamaConfig): model_type = "planted"
class PlantedModel(LlamaForCausalLM): config_class = PlantedConfig
class PlantedTokenizer(PreTrainedTokenizerFast): pass
def generate(model, **kwargs): return model.generate(**kwargs)
"""


class Unpickled:
    """A pickle of it writes the marker when it is read."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __reduce__(self) -> Any:
        return Path.write_text, (self.root / MARKER, "unpickled")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def module(model: Path, name: str = "planted") -> None:
    path = model / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CODE.format(root=str(model.parent)))


def pickled(model: Path, name: str) -> None:
    with (model / name).open("wb") as file:
        pickle.dump(Unpickled(model.parent), file)


AUTO = {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedModel"}


def model_class_of_an_unknown_type(model: Path) -> None:
    module(model)
    edit(model / "config.json", model_type="planted", architectures=["PlantedModel"], auto_map=AUTO)


def model_class_of_a_known_type(model: Path) -> None:
    module(model)
    edit(model / "config.json", auto_map=AUTO)


def model_class_without_a_config_class(model: Path) -> None:
    module(model)
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "planted.PlantedModel"})


def class_in_another_folder(model: Path) -> None:
    """`repository--module.Class`: the repository is the folder beside the model's."""
    other = model.parent / "other"
    other.mkdir()
    (other / "planted.py").write_text(CODE.format(root=str(model.parent)))
    auto = {key: f"{other}--{name}" for key, name in AUTO.items()}
    edit(model / "config.json", model_type="planted", auto_map=auto)


def tokenizer_class(model: Path) -> None:
    module(model)
    auto = {"AutoTokenizer": ["planted.PlantedTokenizer", "planted.PlantedTokenizer"]}
    edit(model / "tokenizer_config.json", auto_map=auto, tokenizer_class="PlantedTokenizer")


def tokenizer_class_as_a_list(model: Path) -> None:
    module(model)
    auto = ["planted.PlantedTokenizer", None]
    edit(model / "tokenizer_config.json", auto_map=auto, tokenizer_class="PlantedTokenizer")


def custom_generate(model: Path) -> None:
    module(model, "custom_generate/generate")
    edit(model / "generation_config.json", custom_generate=str(model))


def pickled_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    pickled(model, "pytorch_model.bin")


def pickled_weights_beside(model: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        pickled(model, name)


def pickled_weights_named(model: Path) -> None:
    pickled(model, "adapter_model.bin")
    edit(model / "config.json", transformers_weights="adapter_model.bin")


def adapter_beside(model: Path) -> None:
    """transformers loads an adapter that lies in a model's folder, if peft is installed."""
    pickled(model, "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "auto_mapping": None}
    text = json.dumps({**config, "base_model_name_or_path": str(model)})
    (model / "adapter_config.json").write_text(text)


def adapter_that_names_its_base(model: Path) -> None:
    """An adapter alone: transformers goes on to the base that it names, wherever that is."""
    other = shutil.copytree(model, model.parent / "other")
    model_class_of_an_unknown_type(other)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(other)}
    (model / "adapter_config.json").write_text(json.dumps(config))
    (model / "config.json").unlink()


def distributed_checkpoint(model: Path) -> None:
    (model / "model.safetensors").rename(model / "shard-00000-model-00001-of-00001.safetensors")
    pickled(model, ".metadata")


def shard_outside(model: Path) -> None:
    pickled(model.parent, "x.safetensors")
    (model / "model.safetensors").unlink()
    places = {"model.norm.weight": "../x.safetensors"}
    index = {"metadata": {}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_is_a_pickle(model: Path) -> None:
    pickled(model, "model-00001-of-00001.bin")
    (model / "model.safetensors").unlink()
    places = {"model.norm.weight": "model-00001-of-00001.bin"}
    index = {"metadata": {}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def chat_template(model: Path) -> None:
    call = f"open({str(model.parent / MARKER)!r}, 'w')"
    parts = [
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__init__ }}{% endfor %}",
        f"{{{{ cycler.__init__.__globals__.os.system('touch {model.parent / MARKER}') }}}}",
        f"{{{{ messages.__class__.__init__.__globals__['__builtins__'].eval(\"{call}\") }}}}",
    ]
    (model / "chat_template.jinja").write_text("".join(parts))


def attention_kernel(model: Path) -> None:
    module(model, "build/planted/__init__")
    edit(model / "config.json", _attn_implementation="nobody/planted")


def expert_kernel(model: Path) -> None:
    edit(model / "config.json", experts_implementation="nobody/planted")


def quantizer(model: Path) -> None:
    module(model)
    edit(model / "config.json", quantization_config={"quant_method": "planted.PlantedConfig"})


def python_files_beside(model: Path) -> None:
    """In the folder that is also the working directory."""
    for name in ("sitecustomize", "kernels", "modeling_llama", "configuration_llama", "llama"):
        module(model, name)


PLACES: list[Callable[[Path], None]] = [
    model_class_of_an_unknown_type, model_class_of_a_known_type,
    model_class_without_a_config_class, class_in_another_folder, tokenizer_class,
    tokenizer_class_as_a_list, custom_generate, pickled_weights, pickled_weights_beside,
    pickled_weights_named, adapter_beside, adapter_that_names_its_base, distributed_checkpoint,
    shard_outside, shard_is_a_pickle, chat_template, attention_kernel, expert_kernel, quantizer,
    python_files_beside,
]  # fmt: skip
# The last one is generate with an adapter that names the model.
COMMANDS = ("generate", "finetune", "plan", "merge", "chat", "adapter")

FULL = len(PLACES) * len(COMMANDS)
SAMPLE, CI = 20, 2


def run(seed: int, folder: Path) -> str:
    # Neighbouring seeds are of other places and other commands.
    place = PLACES[seed % len(PLACES)]
    command = COMMANDS[(seed % len(PLACES) + seed // len(PLACES)) % len(COMMANDS)]
    root = tiny_folder.shared()
    model = shutil.copytree(root / "model", folder / "model")
    place(model)

    done = minilora(command, folder, model)
    if (folder / MARKER).exists():
        raise Wrong("executed", f"{place.__name__}, {command}: {(folder / MARKER).read_text()}")
    if done.returncode:
        return refused(done, folder)
    if outcome(command, folder, done.stdout) != plain_outcome(command):
        raise Wrong("silent", f"{place.__name__}, {command}: another result than without the code")
    return SAME


def minilora(
    command: str, folder: Path, model: Path, *more: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a command on a model, with an adapter and data that are not in question."""
    root = tiny_folder.shared()
    named, prompt = ["--model", str(model)], ["--prompt", "say yes", "--max-new-tokens", "4"]
    options = {
        "generate": prompt,
        "chat": ["--max-new-tokens", "4"],
        "adapter": ["--adapter", str(folder / "adapter"), *prompt],
        "finetune": ["--data", str(root / "data.jsonl"), "--out", str(folder / "out"), "--steps=1"],
        "plan": [],
        "merge": ["--adapter", str(root / "on-dense"), "--out", str(folder / "out")],
    }
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONSAFEPATH": "1"}
    start = [sys.executable, "-m", "minilora", command]
    answers = folder / "answers"
    answers.write_text("y\n" * 10_000)
    if command == "chat":
        answers.write_text("y\ny\n")
    if command == "adapter":
        tiny_folder.name_base(shutil.copytree(root / "on-dense", folder / "adapter"), str(model))
        start, named = [*start[:-1], "generate"], []
    with answers.open() as stdin:
        return subprocess.run(
            [*start, *named, *options[command], *more],
            cwd=model,
            env=environment,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )


def refused(done: "subprocess.CompletedProcess[str]", folder: Path) -> str:
    lines = done.stderr.strip().splitlines()
    if done.returncode != 1 or "Traceback" in done.stderr or not lines:
        raise Wrong("raw", f"exit code {done.returncode}: {done.stderr[-2000:]}")
    named = str(folder / "model") in lines[-1] or "chat template" in lines[-1]
    if not (lines[-1].startswith("minilora: ") and named):
        raise Wrong("raw", f"the message names no file: {done.stderr[-2000:]}")
    if (folder / "out").exists():
        raise Wrong("changed", "there is an output folder")
    return REFUSED


def outcome(command: str, folder: Path, stdout: str) -> Any:
    """What a command printed or wrote, without names of folders and times."""
    if command in ("generate", "chat", "adapter"):
        return stdout
    if command == "plan":
        return stdout.partition(": ")[2]

    from minilora.files.tensors import read_tensors

    name = "adapter_model.safetensors" if command == "finetune" else "model.safetensors"
    tensors, _ = read_tensors(folder / "out" / name)
    return {key: tensor.flatten().tolist() for key, tensor in tensors.items()}


@functools.cache
def plain_outcome(command: str) -> Any:
    with tempfile.TemporaryDirectory() as path:
        done = minilora(command, Path(path), tiny_folder.shared() / "model")
        assert done.returncode == 0, done.stderr
        return outcome(command, Path(path), done.stdout)
