"""Load on the endpoint: many streaming clients that differ, leave and err; what must be left afterwards is nothing."""
