"""Where edits meet the activations: hooks, gates, ops, the books of every UNet call, the sampler."""
