"""Files that are complete or not there: adapters in PEFT's layout, safetensors, atomic writes."""

from minilora.files.adapters import load_adapter as load_adapter
from minilora.files.adapters import save_adapter as save_adapter
