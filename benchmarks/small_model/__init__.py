"""A tiny, really trained Llama whose tasks show what evicting KV costs."""
