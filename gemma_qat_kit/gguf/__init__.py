"""GGUF files: their header, their keys, and how one is written whole or not at all."""
