"""From corpora of any size to token files."""
