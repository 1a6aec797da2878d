"""Says what a new release of vLLM changes for this package: `python -m deploy.watch_vllm` (docs/development.md)."""
