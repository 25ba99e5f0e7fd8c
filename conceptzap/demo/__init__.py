"""The built-in checkpoint: its world, its recipe, its judges and how they are measured."""
