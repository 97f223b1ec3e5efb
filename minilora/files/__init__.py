"""Files on disk: adapters in PEFT's layout, safetensors, checksums, atomic writes."""

from minilora.files.adapters import load_adapter as load_adapter
from minilora.files.adapters import save_adapter as save_adapter
