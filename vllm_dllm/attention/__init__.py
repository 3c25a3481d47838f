"""Who sees whom: each row sees its request's context (intervals of paged K/V) and the rows of its own node."""
