"""The training recipe: config, data, the loop, checkpoints of a run."""

from minilora.training.loop import FinetuneConfig as FinetuneConfig
from minilora.training.loop import finetune as finetune
