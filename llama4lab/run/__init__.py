"""One pass of the model, watched or changed."""
