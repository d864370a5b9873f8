"""What runs a model beside ONNX Runtime on a CPU, and what is known of the GPU. `tetdeploy.engine` chooses."""
