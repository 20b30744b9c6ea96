"""An OpenAI-compatible server whose answers are the average of the draws, and say how sure they are."""
