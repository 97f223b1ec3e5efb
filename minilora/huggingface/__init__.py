"""transformers models: loading, generation, gradient checkpointing, the bundled demo model."""

from minilora.huggingface.activation_checkpointing import (
    gradient_checkpointing as gradient_checkpointing,
)
from minilora.huggingface.generation import generate as generate
from minilora.huggingface.loading import load_dense as load_dense
