"""Tasks of the chat model; see docs/models/mplug_chat.md."""
