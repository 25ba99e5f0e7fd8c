"""Names and what they stand for: families of files, settings, presets. No torch."""
