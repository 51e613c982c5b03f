"""Graphs for devices without torch: traced from the model's own modules, exported to ONNX."""
