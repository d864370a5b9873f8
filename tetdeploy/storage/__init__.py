"""What is written and read, whole or not at all:

- `files`: any file or folder; `form`: JSON, and what it must look like; `tensor_file`, `shards`: tensors.
- `run_folder`: the names in a run's folder; `metrics`: its line for each epoch.
- `model_file`: an exported model; `provenance`: what a file says of where it comes from.
"""
