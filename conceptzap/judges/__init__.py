"""Judges: pictures -> labels. A member has `load(base, option, world)` -> judges with `kinds` and `look`."""
