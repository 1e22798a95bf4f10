"""From a checkpoint, a loaded model or a state dict to a GGUF that llama.cpp runs."""
