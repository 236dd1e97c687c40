"""Networks that have learned to edit: what they are made of, how they are trained and kept."""
