"""AdamW whose states can leave the device, and a training step that is retried when memory runs out."""

from minilora.optim.adamw import PagedAdamW as PagedAdamW
from minilora.optim.retry import retry_on_oom as retry_on_oom
