"""`mars reproduce`: every table and figure of the papers, from its runs to published beside measured."""
