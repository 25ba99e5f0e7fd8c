"""What attacks share: who is attacked, texts with free tokens, the search, and trying what was found."""
