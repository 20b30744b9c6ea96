"""Pictures. They take arrays and records, and give a matplotlib figure in one house style."""
