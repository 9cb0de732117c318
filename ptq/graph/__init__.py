"""What is in an ONNX file, and how is it changed? No PyTorch here."""
