"""Pages that can be looked at: the report of an evaluation."""
