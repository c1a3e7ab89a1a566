"""Images, watched and changed."""
