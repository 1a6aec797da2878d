"""The server side of vllm-calidrop, installed as `vllm_calidrop_server`.

It will hold the routes, request models and application that vLLM's own OpenAI server gains from the plugin. Nothing is
here yet but the command line (`cli.py`): compression itself needs only `vllm serve --attention-backend calidrop`.
"""
