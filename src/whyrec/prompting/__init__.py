"""History and items → text and token ids: the one place that knows the chat format."""
