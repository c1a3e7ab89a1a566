"""GGUF, the format of llama.cpp: its header, its blocks of packed numbers, its names, and what it leaves unsaid."""
