"""AdamW with states that can move to host memory, and retrying a step that ran out of memory."""

from minilora.optim.adamw import PagedAdamW as PagedAdamW
from minilora.optim.retry import retry_on_oom as retry_on_oom
