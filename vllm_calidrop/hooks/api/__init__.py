"""The wraps of vLLM's API process: settings of requests, and reports in responses."""
