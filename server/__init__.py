"""The server of vllm-calidrop, installed as `vllm_calidrop_server`: routes and metrics beside vLLM's own."""
