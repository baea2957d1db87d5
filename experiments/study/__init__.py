"""Study: which runs are compared, and what they say together."""
