"""One search as a file of settings and a folder of results."""
