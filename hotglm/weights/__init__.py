"""safetensors bytes, mappings and modules to tensors in an arena."""
