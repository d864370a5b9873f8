"""What runs a model, and what is known of the GPU. `sessions` chooses, `tetdeploy.engine.open_engine` for TensorRT."""
