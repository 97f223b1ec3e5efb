"""The transformers side: loading, generation, gradient checkpointing."""
