"""What a codec costs and what it loses: bytes, error of the attention state, time of a reload."""
