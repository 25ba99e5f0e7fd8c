"""From a request to what was asked for: erase, generate, apply, export."""
