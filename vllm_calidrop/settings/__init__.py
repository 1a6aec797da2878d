"""What a request may ask for and what the operator presets, parsed once and typed from then on."""
