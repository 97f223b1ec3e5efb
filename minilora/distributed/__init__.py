"""Several processes: a model's parameters in shards, one on each."""

from minilora.distributed.agreement import all_or_none as all_or_none
from minilora.distributed.sharding import load_shards as load_shards
from minilora.distributed.sharding import local_parts as local_parts
from minilora.distributed.sharding import repeated_blocks as repeated_blocks
from minilora.distributed.sharding import shard as shard
