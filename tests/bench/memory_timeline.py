"""Where the memory of a training step goes, by phase: what is resident, and the tensors alive.

    python tests/bench/memory_timeline.py
    python tests/bench/memory_timeline.py --checkpointing --dropout 0.05 --sides minilora

For each phase (imports, loading, adapters, forward, backward, update) of each side: what the
process has resident in anonymous memory and in pages of mapped files, the peak of both during the
phase, and the bytes of tensors that are alive. The two differ by libraries, by freed memory that
the C library keeps, and by what kernels allocate for themselves. Then the largest tensors at the
moment at which the most bytes were alive, under the operator that made them.

Memory does not depend on what else runs, so this script does not wait for a quiet machine.
"""

import argparse
import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import side_by_side as bench
import torch
from sides import (
    OURS,
    SIDES,
    THEIRS,
    Case,
    child_arguments,
    import_libraries,
    set_adapters,
    smollm2,
    text_ids,
)
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST = 10


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, while anything holds them.

    A storage counts once, however many tensors share it. What existed before is given to `count`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, dict[str, Any]] = {}
        self.now = self.most = 0
        self.at_most: list[dict[str, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.count(value, str(op))
        return result

    def count(self, tensor: torch.Tensor, made_by: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.is_meta or key in self.alive or size == 0:
            return
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self.alive[key] = {"bytes": size, "shape": shape, "dtype": dtype, "made by": made_by}
        self.now += size
        weakref.finalize(storage, self.forget, key)
        if self.now > self.most:
            self.most, self.at_most = self.now, list(self.alive.values())

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, {"bytes": 0})["bytes"]

    def restart(self) -> None:
        """The most starts again at what is alive now."""
        self.most, self.at_most = self.now, list(self.alive.values())


def largest(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors of one kind together: {count, bytes of all, shape, dtype, made by}, largest first."""
    groups: dict[str, dict[str, Any]] = {}
    for one in tensors:
        key = json.dumps([one["shape"], one["dtype"], one["made by"]])
        group = groups.setdefault(key, one | {"bytes": 0, "count": 0})
        group["bytes"] += one["bytes"]
        group["count"] += 1
    return sorted(groups.values(), key=lambda group: -group["bytes"])[:LARGEST]


class Timeline:
    """The rows of one side. Use `with timeline.phase("forward"):`."""

    def __init__(self) -> None:
        self.live = LiveTensors()
        self.rows: list[bench.Result] = []
        self.top: list[dict[str, Any]] = []
        self.most = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        bench.restart_peak()
        self.live.restart()
        yield
        row = {"phase": name, "anonymous": bench.memory("RssAnon")}
        row |= {"files": bench.memory("RssFile"), "peak": bench.memory("VmHWM")}
        row |= {"alive": self.live.now, "most alive": self.live.most}
        self.rows.append(row)
        if self.live.most > self.most:
            self.most, self.top = self.live.most, largest(self.live.at_most)


def measure(side: str, folder: Path, case: Case, steps: int, threads: int) -> bench.Result:
    """The timeline of one side in this process: the phases of the last step are reported."""
    torch.set_num_threads(threads)
    timeline = Timeline()
    with timeline.phase("imports"):
        import_libraries(side, folder)
    ids = text_ids(folder, case.batch, case.length)

    with timeline.phase("load, quantize, adapters"):
        built = SIDES[side](folder, case)
        set_adapters(built.model)
        for tensor in (*built.model.parameters(), *built.model.buffers()):
            timeline.live.count(tensor, "the model")

    optimizer = torch.optim.AdamW(built.trained, lr=1e-4)
    with built.context():
        for step in range(1, steps + 1):
            number = "first" if step == 1 else "last"
            report = timeline.phase if step in (1, steps) else lambda _: contextlib.nullcontext()
            with timeline.live:
                with report(f"{number} step, forward"):
                    loss = built.loss(ids)
                with report(f"{number} step, backward"):
                    loss.backward()
                del loss
                with report(f"{number} step, update"):
                    optimizer.step()
                    optimizer.zero_grad()
    return {"rows": timeline.rows, "most": timeline.most, "largest": timeline.top}


def phase_table(side: str, rows: list[bench.Result]) -> str:
    columns = [f"{side}, MB", "anonymous", "files", "peak", "tensors alive", "at most"]
    keys = ("anonymous", "files", "peak", "alive", "most alive")
    return bench.table(
        columns, [[row["phase"], *(f"{row[key] / 1e6:,.0f}" for key in keys)] for row in rows]
    )


def largest_table(result: bench.Result) -> str:
    columns = [f"of {result['most'] / 1e6:,.0f} MB alive at most", "tensors", "MB", "made by"]
    lines = []
    for group in result["largest"]:
        kind = f"{group['dtype']} {list(group['shape'])}"
        lines.append([kind, group["count"], f"{group['bytes'] / 1e6:,.1f}", group["made by"]])
    return bench.table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[OURS, THEIRS])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    bench.add_options(parser)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**child_arguments(options.child))))
        return

    options.noisy = not options.store
    bench.begin(parser, options)
    names = ("dtype", "batch", "length", "checkpointing", "dropout")
    case = Case(**{name: getattr(options, name) for name in names})
    print(f"{case}; MB are 10⁶ bytes\n")
    arguments = {"folder": str(options.model or smollm2()), "case": case.to_dict()}
    arguments |= {"steps": options.steps}
    results = {}
    for side in options.sides:
        results[side] = bench.run(__file__, arguments | {"side": side}, options.threads)
        print(phase_table(side, results[side]["rows"]))
        print(largest_table(results[side]), flush=True)
    bench.finish("memory_timeline", {"case": case.to_dict(), "sides": results}, options)


if __name__ == "__main__":
    main()
