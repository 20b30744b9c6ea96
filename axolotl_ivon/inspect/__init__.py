"""What an adapter holds, and how its training went."""
