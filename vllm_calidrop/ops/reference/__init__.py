"""The operators in torch: readable, and what the other sets are compared with."""
