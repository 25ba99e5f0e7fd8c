"""How the built-in checkpoint and its judges are made and measured; users never run it."""
