"""Views of routing to point at: the nouns of `llama4lab.viz.routing`."""
