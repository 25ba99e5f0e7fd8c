"""Did it work: probes, pictures of base and erased model, judges, scores with intervals."""
