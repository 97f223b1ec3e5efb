"""Several processes: a model's parameters in shards, one on each."""

from minilora.distributed.sharding import repeated_blocks as repeated_blocks
from minilora.distributed.sharding import shard as shard
