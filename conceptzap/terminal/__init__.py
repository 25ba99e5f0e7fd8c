"""What a terminal shows: results, progress, pictures, the state of this machine. No torch."""
