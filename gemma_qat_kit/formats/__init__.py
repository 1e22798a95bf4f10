"""Number formats: how a weight tensor becomes codes and scales, and how those lie in a file. One module per format."""
