"""The server: OpenAI's interface over HTTP."""
