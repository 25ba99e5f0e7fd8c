"""What may act: policies, admission to a base, the self-test in every file."""
