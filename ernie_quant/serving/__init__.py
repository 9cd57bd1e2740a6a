"""Plug-ins for programs that load our files: what vLLM and transformers lack for some of them. They decode as `runtimes` does."""
