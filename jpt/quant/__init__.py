"""Weight types: the type of a weight decides how a product is computed."""
