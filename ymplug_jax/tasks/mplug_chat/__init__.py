"""Tasks of the chat model."""
