"""A whole step by formula, and many layouts side by side. Pure Python; it never calls the rehearsal."""
