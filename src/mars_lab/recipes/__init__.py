"""Named configurations: typed functions, each a base and what differs from it."""
