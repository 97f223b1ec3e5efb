"""Several processes, started by torchrun: how they join, and a model in shards, one on each.

What shards is imported when it is first used: FSDP2 takes a second to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.distributed.sharding import all_processes as all_processes
    from minilora.distributed.sharding import load_shards as load_shards
    from minilora.distributed.sharding import local_parts as local_parts
    from minilora.distributed.sharding import repeated_blocks as repeated_blocks
    from minilora.distributed.sharding import shard as shard

# Name -> the module that it is imported from.
_MODULE = {
    "all_processes": "sharding",
    "load_shards": "sharding",
    "local_parts": "sharding",
    "repeated_blocks": "sharding",
    "shard": "sharding",
}

__all__ = ["all_processes", "load_shards", "local_parts", "repeated_blocks", "shard"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
