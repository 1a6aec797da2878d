"""CaliDrop for vLLM: KV-cache eviction with calibration and recall, per request (arXiv 2507.19906).

Import-light on purpose: an engine process imports this package while it unpickles its configuration.
"""
