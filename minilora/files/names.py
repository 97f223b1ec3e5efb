"""Names of modules and parameters without what wrappers add to them."""

# PEFT's model around the base model.
PEFT_PREFIX = "base_model.model."

# torch.compile and FSDP add their part anywhere in a name, DDP and PEFT at its start.
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.")
_AT_START = (PEFT_PREFIX, "module.")


def canonical_name(name: str) -> str:
    """Returns a name without the parts that torch.compile, DDP, FSDP and PEFT add to it.

    Example:
        >>> canonical_name("module._orig_mod.layers.0._fsdp_wrapped_module.q_proj")
        'layers.0.q_proj'
    """
    for part in _ANYWHERE:
        name = name.replace(part, "")
    while name.startswith(_AT_START):
        prefix = next(prefix for prefix in _AT_START if name.startswith(prefix))
        name = name.removeprefix(prefix)
    return name
