"""Evicted KV: how it is laid out, encoded and stored on the host, and what recall by pages keeps on the device."""
