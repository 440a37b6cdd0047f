"""Images and what their storage can do."""
