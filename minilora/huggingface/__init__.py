"""transformers models: loading, generation, gradient checkpointing, the bundled demo model."""

from minilora.huggingface.activation_checkpointing import (
    gradient_checkpointing as gradient_checkpointing,
)
from minilora.huggingface.causal_loss import causal_lm_loss as causal_lm_loss
from minilora.huggingface.cuda_graph import NotRecordableError as NotRecordableError
from minilora.huggingface.cuda_graph import decode_graph as decode_graph
from minilora.huggingface.efficient import efficient_training as efficient_training
from minilora.huggingface.generation import generate as generate
from minilora.huggingface.generation import generate_batch as generate_batch
from minilora.huggingface.generation import stream as stream
from minilora.huggingface.loading import load_dense as load_dense
from minilora.huggingface.pretrained import load as load
from minilora.huggingface.sampling import GREEDY as GREEDY
from minilora.huggingface.sampling import Sampling as Sampling
from minilora.huggingface.trainer import AdapterCheckpoints as AdapterCheckpoints
from minilora.huggingface.trainer import checkpoint_adapters as checkpoint_adapters
from minilora.huggingface.trainer_loss import ChunkedLoss as ChunkedLoss
