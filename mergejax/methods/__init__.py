"""Named methods and the pieces that they share."""
