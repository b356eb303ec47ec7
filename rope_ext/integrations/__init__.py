"""rope_ext in other libraries: under their function names, in transformers, in ONNX."""
