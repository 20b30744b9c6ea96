"""Training and evaluation data: chats, and how a model reads them."""
