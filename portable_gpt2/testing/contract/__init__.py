"""The members of `Backend`, and every function of its namespace that portable code calls: the first level."""
