"""What methods learn from and how: lessons, gates, closed forms, the one training loop."""
