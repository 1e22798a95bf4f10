"""Memory: predicted before a download, measured afterwards, and both kept side by side."""
