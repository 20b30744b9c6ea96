"""The documents that one command writes and another reads, as pydantic types. Importing them imports no torch."""
