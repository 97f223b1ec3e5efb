"""Fine-tuning: the config, the data, the loop, checkpoints of a run."""

from minilora.training.config import FinetuneConfig as FinetuneConfig
from minilora.training.interrupts import Interrupted as Interrupted
from minilora.training.recipe import finetune as finetune
from minilora.training.result import Result as Result
from minilora.training.samples import Sample as Sample
