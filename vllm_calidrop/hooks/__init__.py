"""Every place where vLLM is wrapped: one file per wrapped thing, each with its reason."""
