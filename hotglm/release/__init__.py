"""What stands on a disk: paths to verified, open files of weights. Imports neither torch nor safetensors."""
