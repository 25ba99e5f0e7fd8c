"""Metrics: a trial -> scores. A member has `score(trial)`; what does not apply yields nothing."""
